"""Identifies processes: a pid alone is reused, a pid with its start time is not.

Knows nothing about peers or mailboxes. On Linux it reads /proc (proc(5)); elsewhere it runs `ps`, which is
in POSIX, except for `lstart`, which macOS and the BSDs know. Implements [PRES-1].
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import Enum

__all__ = [
    "Life",
    "Process",
    "ancestors",
    "arguments",
    "current",
    "domain",
    "environment",
    "is_stopped",
    "life",
    "look_up",
    "parent",
]

_HAS_PROC = os.path.exists("/proc/self/stat")
# A chain of parents longer than this is a loop of reused pids, not a real one.
_MAX_ANCESTORS = 64


class Life(Enum):
    """What can be told about a process, or about a session. Unknown is never read as either of the others."""

    LIVES = "lives"
    ENDED = "ended"
    UNKNOWN = "unknown"


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


def _read(pid: int) -> _Facts | None:
    if not _HAS_PROC:
        return _read_ps(pid)
    try:
        # Where /proc is that of another pid namespace, its numbers are other processes than ours.
        is_ours = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return None
    return _read_proc(pid) if is_ours else None


def _facts(pid: int) -> _Facts | None:
    facts = _read(pid) if pid > 0 else None
    return None if facts is None or facts.is_dead else facts


def look_up(pid: int) -> Process | None:
    """The process that has `pid` now; None if there is none, or only a zombie."""
    facts = _facts(pid)
    return None if facts is None else Process(pid, facts.started)


def life(process: Process) -> Life:
    """Whether that very process, and not a later one with its pid, is running in our pid namespace.

    UNKNOWN for a process that cannot be seen from here: a parent in another namespace (pid 0), no descriptor left to
    read with, a /proc that hides others, a `ps` that cannot be started.
    """
    if process.pid <= 0:
        return Life.UNKNOWN
    facts = _read(process.pid)
    if facts is not None:
        return Life.LIVES if facts.started == process.started and not facts.is_dead else Life.ENDED
    try:
        os.kill(process.pid, 0)  # signal 0 asks, and sends nothing: kill(2)
    except ProcessLookupError:
        return Life.ENDED
    except OSError:
        pass  # it is there, and another user's
    return Life.UNKNOWN


def domain() -> str:
    """Where our pids mean something: the machine since its last start, and our pid namespace. "" if it is unknown."""
    if not _HAS_PROC:
        return sys.platform  # no namespaces there
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


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


def environment(of: Process) -> dict[str, str]:
    """The environment with which a process was started; empty where it cannot be read, as without /proc."""
    try:
        with open(f"/proc/{of.pid}/environ", "rb") as file:
            pairs = [pair.partition(b"=") for pair in file.read().split(b"\0")]
    except OSError:
        return {}
    return {os.fsdecode(name): os.fsdecode(value) for name, found, value in pairs if found}
