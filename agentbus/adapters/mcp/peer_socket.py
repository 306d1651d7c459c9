"""Unix stream sockets between our server and its agent process: each talks to the other alone.

Connects to a socket of the agent process, and makes sockets of ours. Knows no client and no protocol. Implements
[INBOX-5], [MOD-6], [UNINST-2].
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path

import anyio

from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

__all__ = ["caller", "clear_dead", "connect", "leftovers", "listen", "listener", "other_end", "write"]

_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


def connect(path: Path, host: Process) -> socket.socket:
    """A non-blocking connection to `path`, on which `host` listens. [INBOX-5]

    Raises DeliveryFailed, with the reason, and FileNotFoundError.
    """
    _check(path)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:  # a sandbox, or no descriptor left
        raise DeliveryFailed(f"no unix socket is to be had ({error.strerror})") from error
    try:
        connection.setblocking(False)
        connection.connect(str(path))
        if sys.platform == "linux":
            pid, uid = other_end(connection)
            if pid != host.pid or uid != os.geteuid():
                raise DeliveryFailed(f"{path} belongs to process {pid}, not to the session's process {host.pid}")
    except OSError as error:
        connection.close()
        if error.errno == errno.ENOENT:
            raise FileNotFoundError(path) from error
        raise DeliveryFailed(f"{path} does not answer ({error.strerror})") from error
    except BaseException:
        connection.close()
        raise
    return connection


def listener(path: Path) -> int | None:
    """The process that listens on `path`, if it is ours and the system tells; else None."""
    if sys.platform != "linux":
        return None
    with suppress(OSError, DeliveryFailed), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        _check(path)
        asking.setblocking(False)
        asking.connect(str(path))
        pid, uid = other_end(asking)
        return pid if uid == os.geteuid() else None
    return None


def listen(path: Path) -> socket.socket:
    """A non-blocking socket of ours (0600) that listens at `path`. The folder has to be ours alone. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.bind(str(path))
        try:
            path.chmod(0o600)
            made.listen(64)
        except OSError:
            path.unlink(missing_ok=True)  # else it is in the way of the next one
            raise
    except OSError:
        made.close()
        raise
    return made


def leftovers(folder: Path, names: re.Pattern[str]) -> list[str]:
    """The names in `folder` of the home that are such names of our sockets; none if it cannot be read. [UNINST-2]"""
    try:
        return sorted(name for name in os.listdir(folder) if names.fullmatch(name))
    except OSError:
        return []


def clear_dead(folder: Path, names: re.Pattern[str]) -> None:
    """Remove such sockets on which nobody listens: their servers were killed."""
    for name in leftovers(folder, names):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.setblocking(False)
            try:
                asking.connect(str(folder / name))
            except ConnectionRefusedError:
                (folder / name).unlink()


def caller(connection: socket.socket) -> int | None:
    """The process that has connected to a socket of ours; None where the system does not tell. Raises OSError."""
    return other_end(connection)[0] if sys.platform == "linux" else None


def other_end(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end, as they were when it connected or listened. Raises OSError. Linux."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


async def write(connection: socket.socket, data: bytes) -> None:
    """Write all of `data`, for as long as that takes. Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[connection.send(left) :]
        except BlockingIOError:
            await anyio.wait_writable(connection)


def _check(path: Path) -> None:
    """Refuse a path that is not our own socket in our own folder. [INBOX-5]

    Raises DeliveryFailed, and FileNotFoundError.
    """
    try:
        facts, folder = os.lstat(path), os.lstat(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DeliveryFailed(f"{path} cannot be accessed ({error.strerror})") from error
    if not stat.S_ISSOCK(facts.st_mode):
        raise DeliveryFailed(f"{path} is not a socket")
    if facts.st_uid != os.geteuid() or folder.st_uid != os.geteuid():
        raise DeliveryFailed(f"{path} or its folder belongs to another user")
    if not stat.S_ISDIR(folder.st_mode) or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DeliveryFailed(f"{path.parent} can be written by other users, or is a symlink")
