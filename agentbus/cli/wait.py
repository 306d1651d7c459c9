"""The commands that wait: `wait`, which makes a shell a peer for one message, and `send --wait-read`.

They are woken by sockets, as sessions are. Implements [WAIT-1] to [WAIT-4].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import anyio
import anyio.abc

from agentbus import registry
from agentbus.cli import common, output
from agentbus.core import eventloop, stderr
from agentbus.core.bus import Bus, Sent, now_ms
from agentbus.core.changes import SAFETY_S, watching
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, DeliveryClosed, InvalidRequest, TryAgain
from agentbus.core.model import Envelope, MessageState
from agentbus.core.names import is_group
from agentbus.core.ports import Receipt, Settled
from agentbus.core.stdout import OutputFailed, reported
from agentbus.member import peer_session

__all__ = ["send_until_read", "wait"]

RUNTIME = "shell"
_REASON = "a shell waits for one message and prints it"
# A message that has arrived when the time is up is still printed. Reading one row takes a fraction of this.
_LAST_CALL_S = 10.0


class _Printed:
    """The delivery of a shell: it prints one envelope. An envelope that cannot be printed was not handed over."""

    carrier = "shell"
    trouble = ""

    def __init__(self, show: Callable[[Envelope], None]) -> None:
        self._show = show
        self.done = anyio.Event()
        self.failure = ""

    async def ready(self) -> None:
        """A shell is ready when it has joined."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Print the first of `batch`, and never a second one. Raises DeliveryClosed when it cannot be printed."""
        if self.done.is_set():
            await anyio.sleep_forever()
        try:
            self._show(batch[0])
        except OutputFailed as error:
            self.failure = str(error)
            raise DeliveryClosed(self.failure) from error
        self.done.set()
        return Settled(1)


def _show_text(envelope: Envelope) -> None:
    # Only the text goes to stdout, so that ANSWER=$(agentbus wait) is the text alone. The sender is for the person.
    answers = "" if envelope.reply_to is None else f", answers #{envelope.reply_to}"
    stderr.line(f"#{envelope.id} from {envelope.sender}{answers}")
    output.exactly(envelope.text)


def _show_json(envelope: Envelope) -> None:
    output.json_line(output.envelope_row(envelope))


def wait(name: str | None, *, timeout_s: float | None, as_json: bool) -> int:
    """Join as a peer, wait for one message, print it, leave. Return the exit code. [WAIT-1]

    Raises Refused when a live peer has the name, TryAgain when no message has come within `timeout_s` seconds, and
    DeliveryClosed when the message cannot be printed; the message then stays pending.
    """
    with common.bus_and_settings() as (bus, settings):
        mailbox = common.own_name(bus, settings, name)
    settings = replace(settings, name=mailbox, name_note="")
    return eventloop.run(_wait, settings, _Printed(_show_json if as_json else _show_text), timeout_s)


async def _wait(settings: Settings, printed: _Printed, timeout_s: float | None) -> int:
    code = 0

    def end_by(number: int) -> None:
        nonlocal code
        code = common.SIGNALLED + number
        tasks.cancel_scope.cancel()

    async def end_with_the_session() -> None:
        await session.ended.wait()
        tasks.cancel_scope.cancel()

    async with (
        peer_session(settings, printed, runtime=RUNTIME, reason=_REASON, say=output.say, other_name=False) as session,
        anyio.create_task_group() as tasks,
    ):
        await tasks.start(common.when_signalled, end_by)
        tasks.start_soon(end_with_the_session)
        with anyio.move_on_after(timeout_s):
            await printed.done.wait()
        if not printed.done.is_set() and session.bus.pending(session.peer, 1):
            with anyio.move_on_after(_LAST_CALL_S):
                await printed.done.wait()
        tasks.cancel_scope.cancel()
    if printed.failure:
        raise DeliveryClosed(printed.failure, hint="the message is still pending")
    if printed.done.is_set():
        return 0
    if code:
        return code
    assert timeout_s is not None, "without a timeout it ends by a message or a signal"
    raise TryAgain(f'no message for "{settings.name}" within {timeout_s:g} s', hint="wait longer, or try again later")


def send_until_read(
    to: str, text: str | None, *, sender: str | None, seconds: float, reply_to: str | None = None
) -> None:
    """Send one message, print what became of it, and return once it is known to be read. [WAIT-4]

    Raises TryAgain when it is not known to be read within `seconds`, and what `common.send` raises.
    """
    if is_group(to):
        raise InvalidRequest("--wait-read waits for one reader, and a group has several", hint="send to one of them")
    common.send(to, text, sender=sender, reply_to=reply_to, then=partial(_until_read, seconds))


def _until_read(seconds: float, bus: Bus, settings: Settings, sent: Sent) -> None:
    try:
        eventloop.run(_wait_until_read, bus, settings, sent.id, seconds)
    except TryAgain:
        raise
    except AgentbusError as error:
        # The message is sent. A script that sees a failure would send it again. [SEND-6]
        raise TryAgain(f"#{sent.id} is sent, and whether it was read cannot be told: {error}") from error


async def _wait_until_read(bus: Bus, settings: Settings, row_id: int, seconds: float) -> None:
    give_up_at = anyio.current_time() + seconds
    async with watching(registry.watchers(settings), poll_ms=settings.poll_ms, say=output.say) as wakes:
        while True:
            status = bus.store.queries.status(row_id)
            if status.state is MessageState.READ:
                took = output.span(now_ms() - status.sent_at)
                with reported():
                    print(f'#{row_id} was read by "{status.recipient}" within {took}')
                return
            left_s = give_up_at - anyio.current_time()
            if left_s <= 0:
                what = "pending" if status.state is MessageState.PENDING else "delivered, not known to be read,"
                raise TryAgain(
                    f'#{row_id} for "{status.recipient}" is {what} after {seconds:g} s',
                    hint=f"agentbus doctor {status.recipient} says why, agentbus status {row_id} shows its state",
                )
            await wakes.wait(min(left_s, SAFETY_S))
