"""Starts the sessions that a benchmark measures: ours, with any settings, or another MCP server's."""

from __future__ import annotations

import shlex
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer

from tests.helpers import RawClient, clients

__all__ = ["Contender", "Field", "contenders"]

# The ready gate is 0.25 s; a loaded machine takes its time.
_GATE_S = 0.6


@dataclass(frozen=True)
class Contender:
    """What is measured. `command` is None for agentbus itself, which `variables` then set up."""

    label: str
    command: str | None = None
    variables: dict[str, str] = field(default_factory=dict)

    def words(self, home: Path, name: str) -> list[str]:
        """The command line of one session; empty for ours."""
        if self.command is None:
            return []
        return [word.replace("{name}", name).replace("{home}", str(home)) for word in shlex.split(self.command)]


class Field:
    """The sessions of one contender, on a bus of their own."""

    def __init__(self, contender: Contender, home: Path, start: type[RawClient]) -> None:
        self.contender = contender
        self.home = home
        self._start = start

    def start(self, *names: str, shake: bool = True) -> list[RawClient]:
        """Sessions of these names, all at once, ready to receive (with `shake`)."""
        started: list[RawClient] = []
        for name in names:
            words = self.contender.words(self.home, name)
            started.append(self._start(self.home, name, command=words, **self.contender.variables))
        if shake:
            self.shake(started)
        return started

    @staticmethod
    def shake(started: Sequence[RawClient]) -> None:
        """The handshakes of all, at once, and the wait for the ready gate."""
        shakes = [threading.Thread(target=client.handshake) for client in started]
        for shake in shakes:
            shake.start()
        for shake in shakes:
            shake.join()
        time.sleep(_GATE_S)


@contextmanager
def contenders(*which: Contender) -> Iterator[list[Field]]:
    """A field for each contender, on fresh homes under a short path; all sessions are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder, clients() as start:
        fields = []
        for number, contender in enumerate(which):
            home = Path(folder, str(number))
            if contender.command is not None:
                if not shlex.split(contender.command):
                    raise typer.BadParameter("--against is empty: give the command that starts the other server")
                home.mkdir()
            fields.append(Field(contender, home, start))  # type: ignore[arg-type]
        yield fields
