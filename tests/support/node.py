"""A stand-in for a client, as a Node process that takes orders and says what happens, in lines of JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.command import PATIENCE_S, clean_env, until

NODE = shutil.which("node")


class Stand:
    """The stand-in, as a process. `said` is all that it has said."""

    def __init__(self, home: Path, folder: Path, words: Sequence[str], **variables: str) -> None:
        self.process = subprocess.Popen(
            [str(NODE), *words],
            env=clean_env(home, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            text=True,
        )
        self.said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def order(self, do: str, **fields: Any) -> None:
        """Give an order, and wait until it is carried out."""
        assert self.process.stdin is not None
        before = len(self.all("done"))
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        until(lambda: len(self.all("done")) > before, do)

    def all(self, key: str) -> list[dict[str, Any]]:
        """What it has said with this key, in order."""
        return [one for one in list(self.said) if key in one]

    def end(self) -> None:
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(PATIENCE_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
