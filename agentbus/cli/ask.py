"""The command `ask`: sends a question, waits for the answer, prints its text. Implements [ASK-5], [ASK-7].

Loads little before the question is sent: what only the output needs is imported while the answer is waited for.
"""

from __future__ import annotations

import anyio

from agentbus import registry
from agentbus.cli import common
from agentbus.core import eventloop, stderr
from agentbus.core.asking import DEFAULT_S, Asked, NoAnswer, question, wait_for_answer
from agentbus.core.bus import Bus
from agentbus.core.changes import watching
from agentbus.core.config import Settings
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
    with common.bus_and_settings() as (bus, settings):
        return eventloop.run(_Ask(bus, settings, to, body, sender, wait_s, timeout is not None, as_json).run)


class _Ask:
    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        to: str,
        body: str,
        sender: str | None,
        wait_s: float,
        is_patient: bool,
        as_json: bool,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._to = to
        self._body = body
        self._sender = sender
        self._wait_s = wait_s
        self._is_patient = is_patient
        self._as_json = as_json
        self._code = 0

    async def run(self) -> int:
        """Ask and wait; a signal ends the wait as it ends `wait`."""
        asked: Asked | None = None
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:

            def end_by(number: int) -> None:
                self._code = common.SIGNALLED + number
                tasks.cancel_scope.cancel()

            await tasks.start(common.when_signalled, end_by)
            try:
                asked = await self._ask()
            except Exception as error:  # noqa: BLE001 - raised below: here it would become a group
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if asked is not None and asked.answer is None:
            raise NoAnswer(asked)
        return self._code

    async def _ask(self) -> Asked:
        bus, settings = self._bus, self._settings
        name, session = common.sending_as(bus, settings, self._sender)
        # Before the question is sent: its answer must not come unheard, nor go to the peer of that name.
        async with watching(registry.watchers(settings), poll_ms=settings.poll_ms, say=stderr.say) as wakes:
            with bus.store.waiting() as waiter:
                asks = question(self._to, self._wait_s, bus.clock(), waiter)
                sent = bus.send(name, self._to, self._body, sender_session=session, question=asks)
                answer: Envelope | None = None
                try:
                    if sent.waits:
                        stderr.line(str(sent))
                    from agentbus.cli import output  # noqa: F401 - so that the answer does not wait for it

                    asked = await wait_for_answer(
                        bus,
                        sent,
                        self._wait_s,
                        look=lambda: self._look(sent.id, session),
                        woken=wakes.wait,
                        stays=self._stays,
                    )
                    if asked.answer is not None:
                        self._show(asked.answer)
                    answer = asked.answer
                finally:
                    self._end(sent.id, answer)
        return asked

    def _look(self, question_id: int, session: str | None) -> Envelope | None:
        answer = self._bus.store.queries.answer(question_id)
        # What is for a paused session reaches it by no shell, either. [BRAKE-1]
        is_held = answer is not None and session is not None and self._is_paused(session)
        return None if is_held else answer

    def _is_paused(self, session: str) -> bool:
        return self._bus.store.pause_of(session, self._bus.clock()) is not None

    def _stays(self, asked: Asked) -> bool:
        if self._is_patient:
            stderr.line(f"{asked}; waiting all the same, for {self._wait_s:g} s in all")
        return self._is_patient

    def _show(self, answer: Envelope) -> None:
        from agentbus.cli import output

        try:
            if self._as_json:
                output.json_line(output.envelope_row(answer))
            else:
                # Only the text goes to stdout, so that ANSWER=$(agentbus ask ...) is the text alone.
                output.exactly(answer.text)
        except OutputFailed as error:
            raise DeliveryClosed(str(error), hint="the answer is still pending") from error

    def _end(self, question_id: int, answer: Envelope | None) -> None:
        try:
            self._bus.end_ask(question_id, answer)
        except AgentbusError as error:
            # It is printed, or not there. If it stays unmarked, it comes again: the lock of this command is free soon.
            stderr.say(f"the answer could not be marked as read: {error}")
