"""The app-server delivery: pending messages go into the session's thread, as context that is not the user's.

The person sees one line, which says which and from whom. The model gets the elements before it, as the output of a
tool that nobody called: Codex's automatic approval review takes the words of the user for the user's leave, and a
peer's must not count as these. Implements [CODEX-4], [CODEX-7].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentbus.adapters.codex.app_server import AppServer
from agentbus.adapters.codex.thread import Push, Thread
from agentbus.adapters.mcp.element import CHANNEL, Frames, parts
from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt

__all__ = ["CARRIER", "AppServerDelivery", "compose", "line"]

CARRIER = "app-server"
# The size of one push: enough for a burst.
_MAX_BYTES = 65_536
# Codex cuts the middle out of one piece of context that is longer than 1,000 tokens, which it counts as 4 bytes each
# (measured with 0.169: 4,000 bytes come whole, 4,001 do not). So a push has several pieces.
_PIECE_BYTES = 4_000
# Of a piece, this much is for what stands around the text of a part: its attributes.
_ELEMENT_BYTES = 300
# So many senders are named in the line for the person.
_MOST_NAMED = 4


def _bytes_per_char(text: str) -> int:
    return 1 if text.isascii() else max(len(one.encode()) for one in set(text))


def _elements(envelope: Envelope, frames: Frames) -> Sequence[str]:
    room = _PIECE_BYTES - _ELEMENT_BYTES
    # A frame that is made harmless is three characters longer, in ASCII.
    return parts(envelope, frames, room // _bytes_per_char(envelope.text))


def compose(batch: Sequence[Envelope], frames: Frames = CHANNEL) -> tuple[str, list[str], int]:
    """The line, the pieces of context, and the number of the first envelopes of `batch` that they hold. [CODEX-7]"""
    pieces: list[str] = []
    count = size = 0
    for envelope in batch:
        elements = _elements(envelope, frames)
        size += sum(len(one.encode()) for one in elements)
        if count and size > _MAX_BYTES:
            break
        for one in elements:
            if pieces and len(pieces[-1].encode()) + 1 + len(one.encode()) <= _PIECE_BYTES:
                pieces[-1] += f"\n{one}"
            else:
                pieces.append(one)
        count += 1
    return line(batch[:count]), pieces, count


def line(batch: Sequence[Envelope]) -> str:
    """What the person sees of a batch: which messages, and from whom."""
    names = list(dict.fromkeys(one.sender for one in batch))
    others = len(names) - _MOST_NAMED
    said = ", ".join(names[:_MOST_NAMED]) + (f" and {others} more" if others > 0 else "")
    ids = f"#{batch[0].id}" if len(batch) == 1 else f"#{batch[0].id} to #{batch[-1].id}"
    return f"agentbus: {ids} from {said}, not typed by the user"


@dataclass(frozen=True, slots=True)
class _Pushed:
    """The receipt of a push. It is taken when it stands among the items of the thread."""

    push: Push
    count: int

    def taken(self) -> bool:
        return self.push.is_taken


class AppServerDelivery:
    """Pushes messages into `thread`. `left` says why nobody watches the thread any more, or nothing."""

    carrier = CARRIER

    def __init__(
        self, server: AppServer, thread: Thread, frames: Frames = CHANNEL, left: Callable[[], str] = str
    ) -> None:
        self._server = server
        self._thread = thread
        self._frames = frames
        self._left = left

    @property
    def trouble(self) -> str:
        """Why the app server cannot be reached, or ""."""
        return self._server.trouble

    async def ready(self) -> None:
        """Return at once: a thread that was found takes messages."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Push the first envelopes of `batch`.

        Raises DeliveryFailed when nothing was pushed, also when it had to wait: more can have come meanwhile, and is
        pushed together with these. [CODEX-5]
        """
        trouble = self.trouble or self._left()
        if trouble:
            raise DeliveryFailed(trouble)
        if await self._thread.wait():
            raise DeliveryFailed("the session was busy; what has come meanwhile goes with the next push")
        text, context, count = compose(batch, self._frames)
        return _Pushed(await self._thread.push(text, context), count)
