"""What comes in from other machines: messages into mailboxes, receipts to the messages that they are about.

Takes from the line, commits, and only then acknowledges. Reports back what became of what was taken in. Implements
[LINK-3], [RCPT-1], [RCPT-2], [ADDR-7], [WIRE-3].
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import anyio

from agentbus.core.errors import InvalidRequest
from agentbus.core.linkstore import REFUSED, Incoming, Report
from agentbus.core.names import EVERYBODY_THERE, machine_name
from agentbus.core.ports import Line, Parcel
from agentbus.link.carrier import LinkBus, Patience
from agentbus.link.settings import LinkSettings
from agentbus.link.wire import MAX_REPORTS, TooNew, read_message, read_receipts, write_receipts

__all__ = ["Inbound"]

# How often the fate of what was taken in is looked at, in seconds: right after it came, a little later, from then on.
# The first is also how long a receipt waits for others.
_LOOKS_S = (0.01, 0.05, 1.0)
_SOON_S, _LATER_S = 1.0, 10.0
# After a server that did not take a receipt.
_FULL_PAUSE_S = 1.0
# The line says once in so many seconds that something could not be read: somebody may send much of it.
_SAY_AGAIN_S = 60.0


class Inbound:
    """Takes in what comes on a line, and reports what becomes of it. `heard` is told each machine that sends."""

    def __init__(
        self,
        bus: LinkBus,
        settings: LinkSettings,
        *,
        say: Callable[[str], None],
        heard: Callable[[str, str], Awaitable[None]],
        read_again: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._say = say
        self._heard = heard
        self._read_again = read_again
        self._patiently = Patience(say)
        # What has to be said at once, by machine. If it is lost, the message comes again, and so does this.
        self._reports: list[tuple[str, Report]] = []
        self._due = anyio.Event()
        self._taken_at = -_LATER_S
        # Who has sent so many things that nobody who keeps to the form could have sent.
        self.malformed = 0
        self._said_at = -_SAY_AGAIN_S

    async def receive(self, line: Line) -> int:
        """Wait for what comes, commit it, acknowledge it; return how many. Raises RelayDown and BrokenSetup."""
        parcels = await line.take()
        messages, receipts = await self._sorted(parcels)
        if messages:
            wake, reports = await self._patiently(lambda: self._bus.links.take_in(messages, now=self._bus.clock()))
            self._bus.wake_all(wake)
            self._reports += reports
        for machine, reports_there in receipts:
            await self._confirm(machine, reports_there)
        await line.ack(parcels)
        if messages or self._reports:
            self._taken_at = anyio.current_time()
            self._due.set()
        return len(parcels)

    async def _confirm(self, machine: str, reports: list[Report]) -> None:
        again = await self._patiently(lambda: self._bus.links.confirm(machine, reports, now=self._bus.clock()))
        self._bus.wake_all(())
        if again:
            self._say(
                f"{machine} knows other messages under {again:,} of our ids: this home was put back from a backup. "
                "They leave again, under new ones"
            )
            self._read_again()

    async def _sorted(self, parcels: Sequence[Parcel]) -> tuple[list[Incoming], list[tuple[str, list[Report]]]]:
        """What of `parcels` can be read and is taken: messages, and receipts by machine."""
        messages: list[Incoming] = []
        receipts: list[tuple[str, list[Report]]] = []
        for parcel in parcels:
            try:
                if not parcel.kind or machine_name(parcel.machine) != parcel.machine:
                    raise InvalidRequest(f"its subject is {parcel.name or parcel.machine}")
                if parcel.kind == "r":
                    receipts.append((parcel.machine, read_receipts(parcel.body)))
                    continue
                message = self._read(parcel)
            except TooNew as error:
                self._reports.append((parcel.machine, error.report))
                continue
            except InvalidRequest as error:
                self._note_malformed(parcel.machine, error)
                continue
            await self._heard(message.machine, message.bus)
            if self._settings.accepts(message.machine):
                messages.append(message)
            else:
                reason = f"it takes no mail from {message.machine}"
                report = Report(message.bus, message.id, REFUSED, message.digest, reason)
                self._reports.append((message.machine, report))
        return messages, receipts

    def _read(self, parcel: Parcel) -> Incoming:
        to = EVERYBODY_THERE if parcel.kind == "b" else parcel.name
        return read_message(parcel.body, machine=parcel.machine, here=self._settings.machine, to=to)

    def _note_malformed(self, machine: str, error: InvalidRequest) -> None:
        """It never can be read, so it is dropped; nobody who keeps to the form has sent it."""
        self.malformed += 1
        now = time.monotonic()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            whose = machine or "nobody known"
            self._say(f"dropped something from {whose} that is no message ({self.malformed:,} so far): {error}")

    # -- what is reported back -----------------------------------------------------------------------------

    async def report(self, line: Line) -> None:
        """Report what becomes of what was taken in, until cancelled. Raises RelayDown and BrokenSetup. [RCPT-2]"""
        version = -1
        while True:
            await self._pause()
            changed = await self._patiently(self._bus.store.queries.version)
            if changed == version and not self._due.is_set():
                continue
            version = changed
            self._due = anyio.Event()
            while await self._report(line):
                pass

    async def _pause(self) -> None:
        """Sleep until the next look: soon if something was taken in lately, at once if it is taken in meanwhile."""
        age_s = anyio.current_time() - self._taken_at
        if age_s < _SOON_S:
            await anyio.sleep(_LOOKS_S[0])
            return
        with anyio.move_on_after(_LOOKS_S[1] if age_s < _LATER_S else _LOOKS_S[2]):
            await self._due.wait()

    async def _report(self, line: Line) -> bool:
        """Send some reports, of which there are any; whether there can be more."""
        at_once, self._reports = self._reports[:MAX_REPORTS], self._reports[MAX_REPORTS:]
        stored = await self._patiently(lambda: self._bus.links.unreported(MAX_REPORTS - len(at_once)))
        by_machine: dict[str, list[Report]] = {}
        for machine, report in [*at_once, *((machine, report) for _, machine, report in stored)]:
            by_machine.setdefault(machine, []).append(report)
        if not by_machine:
            return False
        parcels = [Parcel(machine, "r", "", write_receipts(reports)) for machine, reports in by_machine.items()]
        done = await line.publish(parcels)
        if done.count < len(parcels):
            # Said by the delivery. What is in the database stays unreported.
            self._reports = [*at_once, *self._reports]
            self._due.set()
            await anyio.sleep(_FULL_PAUSE_S)
            return False
        if stored:
            marks = [(row_id, report.state) for row_id, _, report in stored]
            await self._patiently(lambda: self._bus.links.mark_reported(marks))
        return len(stored) + len(at_once) >= MAX_REPORTS
