"""Identifies processes: a pid alone is reused, a pid with its start time is not.

Knows nothing about peers or mailboxes. On Linux it reads /proc (proc(5)); elsewhere it runs `ps`, which is
in POSIX, except for `lstart`, which macOS and the BSDs know. Implements [PRES-1].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from agentbus.core.values import dataclass

__all__ = [
    "IS_SLOW",
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
    "one_look",
    "parent",
]

_HAS_PROC = os.path.exists("/proc/self/stat")
# Whether it takes a program, `ps`, to look at another process: some 10 ms, and not 20 us.
IS_SLOW = not _HAS_PROC
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


# Whether a block of `one_look` runs, and what `ps` has said in it about all processes, once it was asked.
_is_looking = False
_seen: dict[int, _Facts] | None = None


@contextmanager
def one_look() -> Iterator[None]:
    """In this block, `ps` is run once at most, for all processes, where there is no /proc.

    For code that judges many, or that judges in a transaction: it asks once before, so that nobody waits for `ps` then.
    What ends meanwhile is seen by the next look. A block in another is part of it. Not for code that awaits.
    """
    global _is_looking, _seen
    if _is_looking:
        yield
        return
    _is_looking = True
    try:
        yield
    finally:
        _is_looking, _seen = False, None


def _ps(columns: str, *which: str) -> str:
    import subprocess  # takes 3 ms, and Linux does not need it

    try:
        done = subprocess.run(
            ["/bin/ps", "-ww", "-o", columns, *which],
            capture_output=True,
            text=True,
            timeout=5,
            env={"LC_ALL": "C", "TZ": "UTC"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _parse(line: str) -> tuple[int, _Facts] | None:
    fields = line.split(None, 3)
    if len(fields) != 4:
        return None
    pid, parent_pid, state, started = fields
    return int(pid), _Facts(int(parent_pid), started.strip(), state.startswith("Z"), state.startswith("T"))


_COLUMNS = "pid=,ppid=,stat=,lstart="


def _read_ps(pid: int) -> _Facts | None:
    global _seen
    if _is_looking:
        if _seen is None:
            _seen = _read_all()
        return _seen.get(pid)
    found = _parse(_ps(_COLUMNS, "-p", str(pid)))
    return None if found is None else found[1]


def _read_all() -> dict[int, _Facts]:
    return dict(found for line in _ps(_COLUMNS, "-A").splitlines() if (found := _parse(line)) is not None)


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


def ancestors(of: int | None = None) -> list[Process]:
    """The processes above this one, or above the process `of`, nearest first, as far as they can be read."""
    found: list[Process] = []
    with one_look():
        below = None if of is None else _facts(of)
        pid = os.getppid() if of is None else 0 if below is None else below.parent_pid
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
        return _ps("args=", "-p", str(of.pid)).split()
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
