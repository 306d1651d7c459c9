"""Run the command line, wait for conditions, and put a `claude` on PATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the benchmarks use this, and need no pytest
    import pytest

# Reached only when something is broken; a loaded machine needs a fraction of it.
PATIENCE_S = 40.0


def clean_env(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a child: ours, without the variables that steer agentbus or come from an agent."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AGENTBUS_", "CLAUDE"))}
    return {**kept, "AGENTBUS_HOME": str(home), **variables}


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until `condition()` is true and return it."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < give_up_at, f"{what} did not come true in {PATIENCE_S} s"
        time.sleep(0.002)


def agentbus(
    home: Path, *arguments: str, stdin: str | bytes = b"", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "agentbus", *arguments],
        env=clean_env(home, **variables),
        cwd=cwd,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")
    )


def succeeds(home: Path, *arguments: str) -> str:
    """Run the command line to its end, which is exit code 0 with nothing on stderr, and return its output."""
    done = agentbus(home, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def program_on_path(program: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `program`, which says its version and nothing else, the first on PATH."""
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@dataclass
class ClaudeOnPath:
    """A `claude` on a PATH of its own, with a home folder of its own: the stand-in, or the real one."""

    home: Path
    folder: Path
    variables: dict[str, str]

    @property
    def state(self) -> dict[str, Any]:
        """The content of its `.claude.json`."""
        path = Path(self.variables.get("CLAUDE_CONFIG_DIR", self.home)) / ".claude.json"
        return dict(json.loads(path.read_text()))

    def entry(self) -> dict[str, Any] | None:
        """Its entry for agentbus, at user scope."""
        return self.state.get("mcpServers", {}).get("agentbus")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        env = {**clean_env(self.home), **self.variables}
        return subprocess.run(
            ["claude", *arguments], env=env, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    def calls(self) -> list[list[str]]:
        """The arguments of every call of the stand-in."""
        log = Path(self.variables["STAND_IN_LOG"])
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def claude_on_path(root: Path, real: str | None = None) -> ClaudeOnPath:
    """Put the stand-in, or the real `claude` at the path `real`, on a PATH of its own in `root`."""
    for name in ("bin", "home", "work"):
        root.joinpath(name).mkdir(parents=True)
    claude = root / "bin" / "claude"
    if real is None:
        stand_in = Path(__file__).with_name("claude_stand_in.py")
        claude.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{stand_in}' \"$@\"\n")
        claude.chmod(0o755)
    else:
        claude.symlink_to(os.path.realpath(real))
    variables = {
        "PATH": f"{root / 'bin'}:/usr/bin:/bin",
        "HOME": str(root / "home"),
        "STAND_IN_LOG": str(root / "calls"),
    }
    return ClaudeOnPath(root / "home", root / "work", variables)
