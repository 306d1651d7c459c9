"""The socket trigger: each peer binds a unix datagram socket, and a nudge is one empty datagram.

The default, and the fastest way without a daemon. A datagram carries no data. ECONNREFUSED shows at once that a
listener is dead. This trigger knows nothing about the mailbox. Implements [WAKE-1], [WAKE-2], [WAKE-3], [TRUST-3].
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from agentbus.core.config import Settings, check_private, prepare_folder
from agentbus.core.errors import AgentbusError, BrokenSetup
from agentbus.core.eventloop import asyncio_loop
from agentbus.core.ports import Wake

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    import anyio

__all__ = ["SocketTrigger", "make"]


def make(settings: Settings, folder: str = "sock") -> SocketTrigger:
    """The trigger of the bus with these settings, with its sockets in `folder` of the home."""
    return SocketTrigger(settings.root, folder=folder)


# Linux can reach a folder of any depth through an open descriptor of it; other systems use a short symlink.
_FD_FOLDER = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else None
# sizeof(sun_path) - 1: unix(7) on Linux, sys/un.h on macOS and the BSDs.
_MAX_PATH_BYTES = 107 if _FD_FOLDER else 103
_SUFFIX = ".sock"
_NUDGE = b"\0"
# More than any queue holds (net.unix.max_dgram_qlen is 10 to 512), so that one pass empties it. It is bounded so that
# a storm of nudges cannot keep a peer from its mailbox.
_MAX_NUDGES = 1_024

# Linux reports which user sent a datagram; on other systems only the folder's mode keeps other users out.
_CREDENTIALS: int = getattr(socket, "SO_PASSCRED", 0)
_SCM_CREDENTIALS: int = getattr(socket, "SCM_CREDENTIALS", 2)
_CREDENTIALS_SPACE = socket.CMSG_SPACE(12)  # struct ucred: pid, uid, gid, four bytes each
_UID = slice(4, 8)

_RESULTS = {
    errno.ENOENT: Wake.ABSENT,
    errno.ENOTDIR: Wake.ABSENT,
    errno.ECONNREFUSED: Wake.STALE,
    # The queue is full: wakes are already waiting, and the peer takes one of them before it reads its mailbox.
    errno.EAGAIN: Wake.FULL,
    errno.ENOBUFS: Wake.FULL,  # macOS reports a full queue with this
}


class _Listener:
    """A bound socket, with its path and its inode."""

    def __init__(self, bound: socket.socket, path: str) -> None:
        self.socket = bound
        self.path = path
        self._inode = os.lstat(path).st_ino
        self._uid = struct.pack("=I", os.geteuid())

    def fileno(self) -> int:
        """The descriptor that is readable once a nudge has arrived."""
        return self.socket.fileno()

    def is_in_place(self) -> bool:
        """Whether the file that senders look for still belongs to this socket."""
        try:
            return os.lstat(self.path).st_ino == self._inode
        except OSError:
            return False

    def empty(self) -> bool:
        """Take all nudges that have arrived. Return whether any came from our own user."""
        was_nudged = False
        for _ in range(_MAX_NUDGES):
            try:
                was_nudged |= self.take()
            except BlockingIOError:
                return was_nudged
        return True

    def take(self) -> bool:
        """Take one nudge, and return whether it came from our own user. Raises BlockingIOError when there is none."""
        if not _CREDENTIALS:
            self.socket.recv(1)
            return True
        _, ancillary, _, _ = self.socket.recvmsg(1, _CREDENTIALS_SPACE)
        # The kernel vouches for these: unix(7), SCM_CREDENTIALS. [TRUST-3]
        for _, kind, data in ancillary:
            if kind == _SCM_CREDENTIALS:
                return data[_UID] == self._uid
        return False


class _Nudges:
    """The wakes of a listener, for any event loop. Each wait registers the socket again."""

    def __init__(self, listener: _Listener) -> None:
        self._listener = listener
        self._waiting: anyio.CancelScope | None = None

    async def wait(self, timeout_s: float | None = None) -> bool:
        import anyio
        import anyio.lowlevel

        try:
            with anyio.move_on_after(timeout_s) as self._waiting:
                while not self._listener.empty():
                    await anyio.wait_readable(self._listener.socket)
                # The other tasks get their turn, and the nudge that was taken is not lost by a cancellation.
                await anyio.lowlevel.cancel_shielded_checkpoint()
                return True
        except (anyio.ClosedResourceError, ValueError, OSError):
            if self._listener.socket.fileno() >= 0:
                raise
            # It was disarmed while it waited. The code that armed again has already said where to wait from now on.
            return True
        return False

    def is_reachable(self) -> bool:
        return self._listener.is_in_place()

    def release(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()


class _LoopNudges:
    """The same for asyncio: there a reader that stays registered is woken 50 us sooner."""

    def __init__(self, listener: _Listener, loop: asyncio.AbstractEventLoop) -> None:
        self._listener = listener
        self._loop = loop
        self._was_nudged = False
        self._waiter: asyncio.Future[None] | None = None
        self._is_reading = False
        self._is_closed = False
        self._read()

    def _read(self) -> None:
        self._loop.add_reader(self._listener.socket, self._on_readable)
        self._is_reading = True

    def _on_readable(self) -> None:
        if self._waiter is None:
            # No task waits; the next wait finds the nudge. Until then, more nudges must not call this again and again.
            self._loop.remove_reader(self._listener.socket)
            self._is_reading = False
            return
        try:
            # One is enough to go and read the mailbox. The next wait looks for others: that ends with an exception.
            is_ours = self._listener.take()
        except BlockingIOError:
            return
        if is_ours:
            self._was_nudged = True
            self.release()

    async def wait(self, timeout_s: float | None = None) -> bool:
        if not self._is_reading and not self._is_closed:
            self._read()
        if not self._was_nudged and not self._is_closed and self._listener.empty():
            self._was_nudged = True
            # Not at once: who nudges again and again must not keep all other tasks waiting.
            import anyio.lowlevel

            await anyio.lowlevel.checkpoint()
        if not self._was_nudged:
            self._waiter = self._loop.create_future()
            # The loop's own timer costs a fifth of a cancel scope, and this code runs for each message.
            timer = None if timeout_s is None else self._loop.call_later(timeout_s, self.release)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        was_nudged, self._was_nudged = self._was_nudged, False
        return was_nudged

    def release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def is_reachable(self) -> bool:
        return self._listener.is_in_place()

    def close(self) -> None:
        self._is_closed = True
        self._loop.remove_reader(self._listener.socket)
        # A task that still waits here must now wait elsewhere, and might have missed a nudge.
        self._was_nudged = True
        self.release()


@contextmanager
def _nudges(listener: _Listener) -> Iterator[_Nudges | _LoopNudges]:
    loop = asyncio_loop()
    if loop is None:
        try:
            yield _Nudges(listener)
        finally:
            import anyio

            anyio.notify_closing(listener.socket)
        return
    nudges = _LoopNudges(listener, loop)
    try:
        yield nudges
    finally:
        nudges.close()


def _socket() -> socket.socket:
    """A socket that can be bound. Raises BrokenSetup where none is to be had at all."""
    made = None
    try:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.setblocking(False)
        if _CREDENTIALS:
            made.setsockopt(socket.SOL_SOCKET, _CREDENTIALS, 1)
    except OSError as error:
        if made is not None:
            made.close()
        raise BrokenSetup(
            f"the system gives this process no unix socket ({error.strerror})",
            hint="if this is a sandbox, let it use unix sockets, or set AGENTBUS_TRIGGER=file-watch",
        ) from error
    return made


class SocketTrigger:
    """Wakes peers through sockets in `home`/`folder`.

    `max_path_bytes` is the longest socket path that the system allows, in bytes. `fd_folder` is the folder in which the
    system shows open descriptors as paths, or None.
    """

    name = "socket"

    def __init__(
        self,
        home: str | Path,
        *,
        folder: str = "sock",
        max_path_bytes: int = _MAX_PATH_BYTES,
        fd_folder: str | None = _FD_FOLDER,
    ) -> None:
        self.folder = folder
        self._folder = f"{home}/{folder}"
        self._folder_bytes = len(os.fsencode(self._folder))
        self._fd_folder = fd_folder
        self._max_path_bytes = max_path_bytes
        self._sender: socket.socket | None = None
        self._folder_fd: int | None = None

    def endpoint(self, session: str) -> str:
        """A file name in the socket folder; never a path, so that a home can be moved."""
        return session + _SUFFIX

    @asynccontextmanager
    async def arm(self, endpoint: str) -> AsyncIterator[_Nudges | _LoopNudges]:
        """See Trigger, and `listen`."""
        with self.listen(endpoint) as listener, _nudges(listener) as wakes:
            yield wakes

    @contextmanager
    def listen(self, endpoint: str) -> Iterator[_Listener]:
        """Bind `endpoint`, and replace a socket file that a dead process left there.

        Raises BrokenSetup when the folder cannot be used, a live listener has the endpoint, the file system does not
        support sockets, or a sandbox refuses them.
        """
        prepare_folder(self._folder)
        path = f"{self._folder}/{endpoint}"
        if self.notify(endpoint) in (Wake.WOKEN, Wake.FULL):
            raise BrokenSetup(f"{path} is in use by a live process")
        self.clear(endpoint)
        with _socket() as bound:
            self._bind(bound, endpoint, path)
            listener = _Listener(bound, path)
            try:
                yield listener
            finally:
                # Close the socket before removing its file: a sender in between then gets STALE, not WOKEN.
                bound.close()
                # If a successor has bound a socket of that name, leave it.
                if listener.is_in_place():
                    with suppress(OSError):  # another process has just removed it
                        os.unlink(path)

    def _bind(self, listener: socket.socket, endpoint: str, path: str) -> None:
        try:
            listener.bind(self._address(endpoint))
            os.chmod(path, 0o600)
        except OSError as error:
            raise BrokenSetup(
                f"{path} cannot be bound as a unix socket ({error.strerror})",
                hint="set AGENTBUS_HOME to a folder on a local disk, or AGENTBUS_TRIGGER=file-watch",
            ) from error

    def notify(self, endpoint: str) -> Wake:
        """Send one datagram to `endpoint`. See Trigger."""
        try:
            if self._sender is None:
                self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sender.setblocking(False)
            self._sender.sendto(_NUDGE, self._address(endpoint))
        except OSError as error:
            # Any other error (no permission, not a socket): no peer can be nudged there, and its poll finds the row.
            return _RESULTS.get(error.errno or 0, Wake.ABSENT)
        except AgentbusError:
            # The folder itself cannot be used, and repairing it is not the sender's task.
            return Wake.ABSENT
        return Wake.WOKEN

    def clear(self, endpoint: str) -> None:
        """Remove the socket file of a dead peer. Leave anything that is not a socket."""
        if self._is_socket(endpoint):
            with suppress(OSError):  # another process has just removed it
                os.unlink(f"{self._folder}/{endpoint}")

    def leftovers(self) -> Iterator[str]:
        """The sockets in the folder that have the suffix of ours."""
        try:
            names = sorted(os.listdir(self._folder))
        except OSError:
            return  # there is no folder, or it cannot be read: report nothing
        yield from (name for name in names if name.endswith(_SUFFIX) and self._is_socket(name))

    def _is_socket(self, endpoint: str) -> bool:
        try:
            return "/" not in endpoint and stat.S_ISSOCK(os.lstat(f"{self._folder}/{endpoint}").st_mode)
        except OSError:
            return False

    def close(self) -> None:
        """Close the sending socket and the descriptor of the folder."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._folder_fd is not None:
            os.close(self._folder_fd)
            self._folder_fd = None

    def _address(self, endpoint: str) -> str:
        path = f"{self._folder}/{endpoint}"
        if self._folder_bytes + len(endpoint) < self._max_path_bytes and endpoint.isascii():
            return path
        # [WAKE-3]
        if self._fd_folder:
            return f"{self._fd_folder}/{self._open_folder()}/{endpoint}"
        return f"{self._short_folder()}/{endpoint}"

    def _open_folder(self) -> int:
        fd = self._folder_fd
        # If the folder was deleted and made again, it is a different folder, and st_nlink of the old one is 0.
        if fd is not None and os.fstat(fd).st_nlink == 0:
            os.close(fd)
            fd = self._folder_fd = None
        if fd is None:
            fd = self._folder_fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return fd

    def _short_folder(self) -> str:
        """A short enough symlink to the socket folder, in our own folder inside the system's temporary folder."""
        # These take 15 ms to import. Only a home whose path is too long for a socket needs them, and not on Linux.
        import hashlib
        import tempfile
        from pathlib import Path

        ours = Path(tempfile.gettempdir()) / f"agentbus-{os.getuid()}"
        prepare_folder(ours)
        link = ours / hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        with suppress(FileExistsError):
            link.symlink_to(self._folder)
        check_private(self._folder, is_folder=True)
        return str(link)
