"""Identifies processes: a pid alone is reused, a pid with its start time is not.

Knows nothing about peers or mailboxes. On Linux it reads /proc (proc(5)); elsewhere it runs `ps`, which is
in POSIX, except for `lstart`, which macOS and the BSDs know. Implements [PRES-1].
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Process", "ancestors", "arguments", "current", "is_alive", "is_stopped", "look_up", "parent"]

_HAS_PROC = os.path.exists("/proc/self/stat")
# A chain of parents longer than this is a loop of reused pids, not a real one.
_MAX_ANCESTORS = 64


@dataclass(frozen=True, slots=True)
class Process:
    """One process, told apart from any later one by `pid` and `started` (as the system reports it; only compared)."""

    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class _Facts:
    parent_pid: int
    started: str
    is_dead: bool
    is_stopped: bool


def _read_proc(pid: int) -> _Facts | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    # The command name, in parentheses, can itself hold spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    # A zombie has a pid, but it holds no socket and will never read its mail.
    return _Facts(int(fields[1]), fields[19].decode(), fields[0] in (b"Z", b"X"), fields[0] in (b"T", b"t"))


def _ps(columns: str, pid: int) -> str:
    import subprocess  # takes 3 ms, and Linux does not need it

    try:
        done = subprocess.run(
            ["/bin/ps", "-ww", "-o", columns, "-p", str(pid)],
            capture_output=True,
            text=True,
            timeout=5,
            env={"LC_ALL": "C", "TZ": "UTC"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _read_ps(pid: int) -> _Facts | None:
    fields = _ps("ppid=,stat=,lstart=", pid).split(None, 2)
    if len(fields) != 3:
        return None
    return _Facts(int(fields[0]), fields[2].strip(), fields[1].startswith("Z"), fields[1].startswith("T"))


def _facts(pid: int) -> _Facts | None:
    if pid <= 0:
        return None
    facts = _read_proc(pid) if _HAS_PROC else _read_ps(pid)
    return None if facts is None or facts.is_dead else facts


def look_up(pid: int) -> Process | None:
    """The process that has `pid` now; None if there is none, or only a zombie."""
    facts = _facts(pid)
    return None if facts is None else Process(pid, facts.started)


def is_alive(process: Process) -> bool:
    """Whether this process is running, and not a later one with the same pid."""
    return look_up(process.pid) == process


def is_stopped(process: Process) -> bool:
    """Whether it is suspended: by Ctrl-Z, SIGSTOP or a debugger."""
    facts = _facts(process.pid)
    return facts is not None and facts.is_stopped


def current() -> Process:
    """This process."""
    return look_up(os.getpid()) or Process(os.getpid(), "")


def parent() -> Process:
    """The process that started this one, or the one that adopted it."""
    pid = os.getppid()
    return look_up(pid) or Process(pid, "")


def ancestors() -> list[Process]:
    """The processes above this one, nearest first, as far as they can be read."""
    found: list[Process] = []
    pid = os.getppid()
    while pid > 0 and len(found) < _MAX_ANCESTORS:
        facts = _facts(pid)
        if facts is None:
            break
        found.append(Process(pid, facts.started))
        pid = facts.parent_pid
    return found


def arguments(of: Process) -> list[str]:
    """The command line of a process, word by word; empty when it cannot be read.

    Where only `ps` is available, a word with a space in it comes back as two words.
    """
    if not _HAS_PROC:
        return _ps("args=", of.pid).split()
    try:
        with open(f"/proc/{of.pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(word) for word in words[:-1]]
