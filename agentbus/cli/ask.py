"""The command `ask`: sends a question, waits for the answer, prints its text. Implements [ASK-5], [ASK-7].

Loads little, and no event loop: it waits for its socket with poll(2).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from agentbus import registry
from agentbus.cli import common
from agentbus.core import stderr
from agentbus.core.asking import DEFAULT_S, AnswerWait, Asked, NoAnswer, question
from agentbus.core.bus import Bus
from agentbus.core.errors import AgentbusError, DeliveryClosed
from agentbus.core.model import Envelope
from agentbus.core.stdout import OutputFailed

__all__ = ["ask"]


def ask(to: str, text: str | None, *, sender: str | None, timeout: str | None, as_json: bool) -> int:
    """Ask `to`, and print the answer. Return the exit code. [ASK-7]

    Raises NoAnswer when there is none, what `Bus.send` raises, and DeliveryClosed when the answer cannot be printed;
    it stays pending then.
    """
    wait_s = DEFAULT_S if timeout is None else common.parse_seconds("--timeout", timeout)
    body = common.text_or_stdin(text)

    def stays(ended: Asked) -> bool:
        if timeout is not None:
            stderr.line(f"{ended}; waiting all the same, for {wait_s:g} s in all")
        return timeout is not None

    with common.bus_and_settings() as (bus, settings):
        name, session = common.sending_as(bus, settings, sender)
        with (
            _signals() as signals,
            # Before the question is sent: its answer must not come unheard, nor go to the peer of that name.
            registry.watchers(settings).listening(poll_ms=settings.poll_ms, say=stderr.say) as wait_for_change,
            bus.store.waiting() as waiter,
        ):
            asks = question(to, wait_s, bus.clock(), waiter)
            sent = bus.send(name, to, body, sender_session=session, question=asks)
            answer: Envelope | None = None
            try:
                if sent.waits:
                    stderr.line(str(sent))
                from agentbus.cli import output  # noqa: F401 - so that the answer does not wait for it

                wait = AnswerWait(bus, sent, wait_s, look=lambda: _look(bus, sent.id, session), stays=stays)
                while not isinstance(asked := wait.step(), Asked):
                    wait_for_change(asked)
                    # After a look, which comes four times a second, and nowhere else: what is sent or printed is whole.
                    if signals:
                        return common.SIGNALLED + signals[-1]
                if asked.answer is None:
                    raise NoAnswer(asked)
                _show(asked.answer, as_json=as_json)
                answer = asked.answer
            finally:
                _end(bus, sent.id, answer)
    return 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the list of the SIGINT, SIGTERM and SIGHUP that come in this block. They end nothing by themselves."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(bus: Bus, question_id: int, session: str | None) -> Envelope | None:
    answer = bus.store.queries.answer(question_id)
    # What is for a paused session reaches it by no shell, either. [BRAKE-1]
    is_held = answer is not None and session is not None and bus.store.pause_of(session, bus.clock()) is not None
    return None if is_held else answer


def _show(answer: Envelope, *, as_json: bool) -> None:
    from agentbus.cli import output

    try:
        if as_json:
            output.json_line(output.envelope_row(answer))
        else:
            # Only the text goes to stdout, so that ANSWER=$(agentbus ask ...) is the text alone.
            output.exactly(answer.text)
    except OutputFailed as error:
        raise DeliveryClosed(str(error), hint="the answer is still pending") from error


def _end(bus: Bus, question_id: int, answer: Envelope | None) -> None:
    try:
        bus.end_ask(question_id, answer)
    except AgentbusError as error:
        # It is printed, or not there. If it stays unmarked, it comes again: the lock of this command is free soon.
        stderr.say(f"the answer could not be marked as read: {error}")
