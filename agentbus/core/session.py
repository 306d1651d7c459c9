"""The life of one peer in one process: claim a name, listen, drain, heartbeat, leave.

Adapters and Python programs share this code; it knows neither. It never blocks the event loop: it waits for a busy
database with `retry_while_busy`. Implements [PRES-3], [NAME-7], [WAKE-5], [STATE-4], [ASK-1].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from agentbus.core.asking import AnswerWait, Asked, question
from agentbus.core.bus import PULL, Bus, Claimed, GroupSent, Sent, retry_while_busy
from agentbus.core.checkpoints import Checkpoints
from agentbus.core.config import MEMBER_DAYS, RETENTION, prepare_home
from agentbus.core.drain import Pace
from agentbus.core.errors import AgentbusError, BrokenSetup, Busy, Refused, TryAgain
from agentbus.core.lookout import Lookout
from agentbus.core.model import Arrival, Envelope, Peer, Renamed, Unread
from agentbus.core.names import BUS_NAME, is_group
from agentbus.core.ports import Delivery, Record, Trigger, Wakes
from agentbus.core.presence import BEAT, Held
from agentbus.core.process import Life, life
from agentbus.core.proof import Followed, Proofs
from agentbus.core.pump import Pump
from agentbus.core.queries import OLD_MS
from agentbus.core.upkeep import Upkeep, about_old, join_groups, lengthen, settle_ended
from agentbus.core.wakes import SharedWakes

__all__ = ["Checkpoints", "Session"]

_T = TypeVar("_T")

HEARTBEAT_S = 15.0
# The time that a predecessor can still need to leave, if it got its SIGINT 0.1 s ago. [NAME-7]
_PREDECESSOR_PATIENCE_S = 0.3
_PREDECESSOR_POLL_S = 0.02
# How often `check` re-reads the mailbox in case a wake was lost: as often as the safety poll of a drain. [DRAIN-5]
_CHECK_POLL_S = 3.0
# So much old mail is still pushed: more would bury what is new, and flood the context at a start. [OLD-4]
MOST_OLD = 20


class Session:
    """One peer. Call `claim`, then `run` in a task; `stop` and `close` end it.

    `delivery` is None if nothing is pushed: mail waits for `check`. With `holds_old` the reader can `check`: much old
    mail is not pushed. `triggers` are tried in order until one can be armed. `say` takes one line for people to read,
    for example on stderr. `conversation` says what the client calls its conversation just now, or "" if that is not
    known. `record` is what the client records of what its model was given, if anything. `is_proof_wanted`: what the
    client took can still not reach the model. Not so for a program, which has a message when the delivery has
    returned it. `retention_hours` and `member_days` can lengthen what the bus keeps; 0 does not. `groups` are joined at
    the start. `beside` is what a delivery needs to run, for as long as the session does.
    """

    def __init__(
        self,
        bus: Bus,
        arrival: Arrival,
        *,
        triggers: Sequence[Trigger],
        delivery: Delivery | None,
        record: Record | None = None,
        is_proof_wanted: bool = False,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
        retention_hours: int,
        member_days: int = 0,
        groups: Sequence[str] = (),
        pace: Pace | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        holds_old: bool = False,
        conversation: Callable[[], str] = str,
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        self.bus = bus
        self._arrival = arrival
        self._triggers = triggers
        self._delivery = delivery
        self._is_proof_wanted = is_proof_wanted
        self._proofs = Proofs(record, mark=self._mark_proven, note=self._note_places) if record and delivery else None
        self._checkpoints = checkpoints
        self._say = say
        self._lengthened = {RETENTION: retention_hours, MEMBER_DAYS: member_days}
        self._groups = groups
        self._pace = pace
        # Whether much old mail is not pushed; up to which id it is held back; the line that says so. [OLD-4]
        self._holds_old = holds_old
        self._held = 0
        self._first: Envelope | None = None
        self._conversation = conversation
        self._beside = beside
        self._claimed: Claimed | None = None
        self._armed: Trigger | None = None
        self._pump: Pump | None = None
        self._wakes: SharedWakes | None = None
        # Ids that a check has returned, and whose result is not written yet. The pump leaves them alone.
        self._checked: set[int] = set()
        # Questions whose answers a call waits for. The pump and a check leave these to it. [ASK-1]
        self._asking: set[int] = set()
        # How many parts of a message that is too long for one answer the reader has. A restart begins again. [READ-4]
        self._parts: dict[int, int] = {}
        self._is_running = False
        self._arming = AsyncExitStack()
        self._troubles: dict[str, str] = {}
        # Set when the host process is gone although our stdin and stdout are still open. [LIFE-2]
        self.orphaned = anyio.Event()
        self._scope = anyio.CancelScope()
        self.ended = anyio.Event()  # set once `run` has ended
        # Sends of one session are committed in the order of the calls, even if the database is busy.
        self._turn = anyio.Lock()
        # The bus that was joined, and through which opening of its file. [STORE-6], [STORE-7]
        self._bus_id = ""
        self._generation = bus.store.generation
        self._upkeep = Upkeep(bus, say, self._wake_itself)
        # Whether the last read found mail that it did not hand out.
        self._is_held_back = False
        self._heartbeat_s = heartbeat_s
        # What the model has to be told with the next answer: that its name has changed under it. [PRES-5]
        self._notice = ""
        # Whether another process is the peer, and this one only acts for it. [LATE-2]
        self.is_guest = False

    @property
    def peer(self) -> Peer:
        """This peer, with the name it has now."""
        assert self._claimed is not None, "claim() comes first"
        return self._claimed.peer

    @property
    def wished_holder(self) -> Peer | None:
        """The peer that holds the name that this session wished for. None if the session got that name."""
        assert self._claimed is not None, "claim() comes first"
        return self._claimed.wished_holder

    @property
    def claim_note(self) -> str:
        """Why this session has the name that it has, in a clause, if that is not what was to be expected. [NAME-8]"""
        assert self._claimed is not None, "claim() comes first"
        return self._claimed.note

    def take_notice(self) -> str:
        """What the reader of this session has to be told, once: one sentence, or nothing. [PRES-5]"""
        notice, self._notice = self._notice, ""
        return notice

    async def claim(self, *, alone: bool = False) -> Peer | None:
        """Become a peer. Waits up to 0.3 s for a predecessor that is leaving. [NAME-4], [NAME-7]

        With `alone`, the result is None, and nothing has changed, if a session of the same agent process and launch
        name still lives then. [TWIN-1]

        Raises Busy, and the errors of `database.explain`.
        """
        give_up_at = anyio.current_time() + _PREDECESSOR_PATIENCE_S
        while self._claimed is None:
            is_late = anyio.current_time() >= give_up_at
            self._claimed = await self._claim(self._triggers[0].endpoint, join_crowd=is_late and not alone)
            if self._claimed is None:
                if is_late and alone:
                    return None
                await anyio.sleep(_PREDECESSOR_POLL_S)
        self._bus_id = self.bus.store.identity()
        await self._set_up()
        await self._begin_proofs()
        try:
            await settle_ended(self.bus, self._say)
        except AgentbusError as error:
            self._say(f"what earlier sessions took was not looked at: {error}")  # the next heartbeat tries again
        if self._holds_old:
            await self._hold_old()
        return self.peer

    async def _set_up(self) -> None:
        await lengthen(self.bus, self._lengthened, self._say)
        await join_groups(self.bus, self.peer.name, self._groups, self._say)

    async def be_guest_of(self, conversation: str) -> None:
        """Act for the present peer of `conversation`, which another process is: its main agent. [LATE-2]

        Raises Refused when there is no such peer, and Busy.
        """
        peer = await retry_while_busy(lambda: self.bus.of_conversation(conversation))
        if peer is None:
            raise Refused("the main agent of this session is not on the bus", hint="let it send for you")
        self._claimed = Claimed(peer=peer, wished_holder=None)
        self.is_guest = True

    async def _hold_old(self) -> None:
        """Hold back much mail that is older than a day, and tell the reader of it first. [OLD-4]"""
        peer = self.peer
        old = self.bus.store.queries.old(peer.name, peer.started_at - OLD_MS, peer.session)
        if old.count <= MOST_OLD:
            return
        self._held = old.newest_id
        line = about_old(old, peer.name)
        if self._delivery is None:
            self._notice = line
            return
        sent = await retry_while_busy(lambda: self.bus.send(BUS_NAME, peer.name, line))
        self._first = Envelope(sent.id, BUS_NAME, peer.name, line, self.bus.clock())

    def twin(self) -> Peer | None:
        """The live session of the same agent process and launch name. Reads only. Raises as `Bus.peers`. [TWIN-1]"""
        asked = self._arrival
        for peer in self.bus.peers():
            if (peer.host, peer.launch_name, peer.domain) == (asked.host, asked.launch_name, asked.domain):
                return peer
        return None

    async def _begin_proofs(self) -> None:
        if not self._is_proof_wanted:
            return
        store, session = self.bus.store, self.peer.session
        known: Sequence[str] = (store.proof(session) or "").splitlines()
        if self._proofs is not None:
            known = self._proofs.begin(known, store.unproven(session))
        await self._note_places(known)

    async def _note_places(self, places: Sequence[str]) -> None:
        proof = "\n".join(places)
        await retry_while_busy(lambda: self.bus.store.set_proof(self.peer.session, proof))

    async def _mark_proven(self, ids: Sequence[int]) -> None:
        if self._is_another_file():
            return
        carrier = self._delivery.carrier if self._delivery is not None else PULL
        await retry_while_busy(lambda: self.bus.mark_read(self.peer, ids, read_by="transcript", carrier=carrier))

    def count_earlier(self) -> int:
        """How many messages an earlier session of this name took, of which nothing tells whether they were read."""
        return self.bus.store.count_earlier(self.peer.session, self.peer.process.pid)

    async def _claim(
        self,
        endpoint: Callable[[str], str],
        *,
        join_crowd: bool,
        again: Peer | None = None,
        held: Held | None = None,
    ) -> Claimed | None:
        return await retry_while_busy(
            lambda: self.bus.claim(self._arrival, endpoint, join_crowd=join_crowd, again=again, held=held)
        )

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Listen, drain and heartbeat until the delivery is closed or `stop` is called.

        Reports to `task_status` as soon as senders can wake this session.

        Raises BrokenSetup when no trigger can be armed.
        """
        self._is_running = True
        try:
            with self._scope:
                wakes = self._wakes = SharedWakes(await self._arm(self._arming))
                with self._make_lookout(wakes).watching() as lookout:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._heartbeat, lookout)
                        tasks.start_soon(self._checkpoints.run, self._say)
                        for one in self._beside:
                            tasks.start_soon(one)
                        if self._proofs is not None:
                            tasks.start_soon(self._proofs.run)
                        if self._delivery is None:
                            task_status.started()
                            await wakes.listen()
                        else:
                            self._pump = self._make_pump(wakes, self._delivery, is_watched=lookout.is_watching)
                            task_status.started()
                            await self._pump.run()
                        tasks.cancel_scope.cancel()
        finally:
            # Disarming awaits nothing, so a cancelled task can do it too.
            await self._arming.aclose()
            self.ended.set()

    async def stop(self) -> None:
        """Stop `run` and wait until it has stopped listening. Nothing in this blocks."""
        self._scope.cancel()
        if self._is_running:
            await self.ended.wait()

    def close(self) -> None:
        """Mark the taken messages and end the presence. Call it once `run` has ended, and again after TryAgain.

        Raises TryAgain when the database is busy. If it stays busy, the messages that were not marked are delivered
        again, and the row is reaped when the process is gone.
        """
        if self.is_guest:
            return
        if self._pump is not None:
            self._pump.settle()
        if self._claimed is not None:
            self.bus.leave(self.peer)
            if self._claimed.held is not None:
                self._claimed.held.release()

    def _make_lookout(self, wakes: Wakes) -> Lookout:
        return Lookout(
            self.bus.store.mark,
            heartbeat_s=self._heartbeat_s,
            safety_s=(self._pace or Pace()).safety_s,
            is_quiet=self._is_quiet,
            is_idle=lambda: self._pump is not None and self._pump.is_idle,
            is_held_back=lambda: self._is_held_back,
            release=wakes.release,
        )

    def _make_pump(self, wakes: Wakes, delivery: Delivery, *, is_watched: bool) -> Pump:
        def mark(ids: Iterable[int]) -> None:
            self._mark(ids, delivery.carrier)

        followed = delivery if self._proofs is None else Followed(delivery, self._proofs)
        return Pump(read=self._read, mark=mark, delivery=followed, wakes=wakes, pace=self._pace, is_watched=is_watched)

    def _read(self, limit: int) -> list[Envelope]:
        checked = self._checked
        self._is_held_back = False
        try:
            pending = self.bus.due(self.peer, limit + len(checked) + len(self._asking), self._held)
            if pending is None or (self._first and self.bus.pause_of(self.peer) is not None):
                self._is_held_back = True
                return []
        except Busy:
            raise
        except AgentbusError as error:
            raise self._noted("read", error) from error
        self._troubles.pop("read", None)
        first = self._first
        if first is not None:
            pending = [first, *(envelope for envelope in pending if envelope.id != first.id)][:limit]
        if not checked and not self._asking:
            return pending
        free = [one for one in pending if self._is_free(one)][:limit]
        self._is_held_back = bool(pending) and not free
        return free

    def _is_free(self, envelope: Envelope) -> bool:
        """Whether no call has it, or waits for it."""
        return envelope.id not in self._checked and envelope.thread not in self._asking

    def _is_another_file(self) -> bool:
        """Whether the store has another file, not joined yet: known ids mean other messages there. [STORE-6]"""
        return self.bus.store.generation != self._generation

    def _mark(self, ids: Iterable[int], carrier: str) -> None:
        if self._is_another_file():
            return
        try:
            marked = list(ids)
            self.bus.mark(self.peer, marked, carrier)
            if self._first is not None and self._first.id in marked:
                self._first = None
        except Busy:
            raise
        except AgentbusError as error:
            raise self._noted("mark", error) from error
        self._troubles.pop("mark", None)

    def _noted(self, what: str, error: AgentbusError) -> TryAgain:
        """Turn any error of the database into TryAgain for the pump, and report it once. [DRAIN-6]"""
        if str(error) != self._troubles.get(what):
            self._say(str(error))
        self._troubles[what] = str(error)
        return TryAgain(str(error))

    async def _arm(self, stack: AsyncExitStack) -> Wakes:
        # [WAKE-5]
        for number, trigger in enumerate(self._triggers, 1):
            endpoint = trigger.endpoint(self.peer.session)
            try:
                wakes = await stack.enter_async_context(trigger.arm(endpoint))
            except BrokenSetup as error:
                if number == len(self._triggers):
                    raise
                self._say(f"trigger {trigger.name} cannot be used ({error}); trying {self._triggers[number].name}")
                continue
            self._armed = trigger
            if (trigger.name, endpoint) != (self.peer.trigger, self.peer.endpoint):
                await self._move_endpoint(trigger.name, endpoint)
            return wakes
        raise AssertionError("a session needs a trigger")

    async def _move_endpoint(self, trigger: str, endpoint: str) -> None:
        await retry_while_busy(lambda: self.bus.store.set_trigger(self.peer.session, trigger, endpoint))
        self._arrival = replace(self._arrival, trigger=trigger)
        self._update(replace(self.peer, trigger=trigger, endpoint=endpoint))

    async def set_delivery(self, delivery: str, reason: str) -> None:
        """Record how this session receives messages from now on, and why. Raises Busy. [VOID-2]"""
        await retry_while_busy(lambda: self.bus.store.set_delivery(self.peer.session, delivery, reason))
        self._arrival = replace(self._arrival, delivery=delivery, delivery_reason=reason)
        self._update(replace(self.peer, delivery=delivery, delivery_reason=reason))

    def _update(self, peer: Peer) -> None:
        assert self._claimed is not None
        self._claimed = replace(self._claimed, peer=peer)

    async def _heartbeat(self, lookout: Lookout) -> None:
        while True:
            await lookout.beat()
            try:
                await self._beat()
            except AgentbusError as error:
                # The lock says that this session lives, whatever a beat could not do; the next one tries again.
                self._say(f"heartbeat: {error}")

    def _is_quiet(self) -> bool:
        """Whether a heartbeat would find nothing to do. Costs a tenth of one."""
        held = self._claimed.held if self._claimed is not None else None
        return (
            held is not None
            and held.is_in_place()
            and life(self._arrival.host) is not Life.ENDED
            and self._wakes is not None
            and self._wakes.is_reachable()
            and self._conversation() in ("", self._arrival.conversation)
            and not self.bus.store.is_replaced()
            and self._upkeep.is_quiet()
        )

    async def _beat(self) -> None:
        # A process that cannot be seen from here is not a dead one: then the end of stdin tells. [LIFE-2]
        if life(self._arrival.host) is Life.ENDED:
            self._say(f"the agent process {self._arrival.host.pid} has ended, and so does this one")
            self.orphaned.set()
            return
        await self._reopen_if_replaced()
        if self._wakes is not None and not self._wakes.is_reachable():
            await self._arm_anew(self._wakes)
        await self._show_presence()
        await self._follow_conversation()
        await self._upkeep.look_after(self.peer.name)

    async def _follow_conversation(self) -> None:
        """Record the conversation that the client has turned to, as by `/clear`: it keeps this name. [NAME-8]"""
        now = self._conversation()
        if now and now != self._arrival.conversation:
            store, peer = self.bus.store, self.peer
            await retry_while_busy(lambda: store.turn_to(peer.session, peer.process.pid, now, now=self.bus.clock()))
            self._arrival = replace(self._arrival, conversation=now)

    async def _show_presence(self) -> None:
        """See to it that others can tell that this session lives. Where it holds a lock, this writes nothing."""
        assert self._claimed is not None
        store, peer, held = self.bus.store, self.peer, self._claimed.held
        if held is not None and not held.is_in_place():
            self._say(f"the lock file in {store.presence.folder} was removed, and is made again")
            await self._reclaim_name()
        elif not store.is_present(peer.session, peer.process.pid):
            await self._reclaim_name()
        elif peer.presence == BEAT:
            await retry_while_busy(lambda: store.beat(peer.session, peer.process.pid, now=self.bus.clock()))

    async def _arm_anew(self, wakes: SharedWakes) -> None:
        """Listen again at the endpoint that senders use, after the socket or its folder was removed. [WAKE-6]"""
        arming = AsyncExitStack()
        wakes.replace(await self._arm(arming))
        old, self._arming = self._arming, arming
        await old.aclose()
        self._say("the socket or wake file of this session was removed; it has made a new one")

    async def _reopen_if_replaced(self) -> None:
        """If bus.db was deleted or replaced, reopen it: two groups of sessions must not use two files. [STORE-6]"""
        store = self.bus.store
        if store.is_replaced():
            prepare_home(store.path.parent)
            store.reopen()
        identity = store.identity()
        if store.generation == self._generation and identity == self._bus_id:
            return
        if identity == self._bus_id:
            self._say(f"{store.path} was put back: this is the same bus, in the state of that file")
        else:
            self._say(f"{store.path} is another bus now: joined it; what was unread in the old one is not here")
        # Ids of another bus, or of an earlier state of this one, mean other messages.
        if self._pump is not None:
            self._pump.forget()
        if self._proofs is not None:
            self._proofs.forget()
        self._checked.clear()
        self._asking.clear()
        self._parts.clear()
        self._held, self._first = 0, None
        self._bus_id, self._generation = identity, store.generation
        await self._reclaim_name()
        await self._set_up()

    async def _reclaim_name(self) -> None:
        """Be present again: in another file, or after others took this session for ended. [PRES-3], [STORE-6]"""
        assert self._claimed is not None
        before, held = self.peer, self._claimed.held
        claimed = await self._claim(lambda _session: before.endpoint, join_crowd=True, again=before, held=held)
        assert claimed is not None, "a claim that joins the crowd does not wait"
        self._claimed = claimed
        await self._begin_proofs()
        # The messages that came while it was away are due now, not at the next safety poll.
        self._wake_itself()
        if claimed.peer.name != before.name:
            await self._tell_new_name(before.name, claimed.peer.name)

    async def _tell_new_name(self, before: str, after: str) -> None:
        """Tell the model that its name has changed: with the next answer, and by a message. [PRES-5]"""
        self._notice = f'your name on the bus is "{after}" now: "{before}" was taken by another session meanwhile'
        self._say(self._notice)
        await retry_while_busy(lambda: self.bus.send(BUS_NAME, after, self._notice or f'your name is "{after}" now'))

    async def send(self, to: object, text: object, *, reply_to: int | None = None) -> Sent | GroupSent:
        """Send as this peer, to a name or to a group. Raises what `Bus.send` and `Bus.send_group` raise."""
        return await self._in_turn(lambda: self._send(to, text, reply_to))

    async def ask(self, to: object, text: object, wait_s: float) -> Sent:
        """Send a question whose answer is waited for, for `wait_s` seconds at most. Then call `answer` at once. [ASK-1]

        Raises what `Bus.send` raises, and Refused for a subagent; then nothing was sent.
        """
        if self.is_guest:
            raise Refused(
                "the answer would go to the main agent of this session, and you are a subagent of it",
                hint="use send_message, or let the main agent ask",
            )
        return await self._in_turn(lambda: self._send_question(to, text, wait_s))

    async def answer(self, sent: Sent, wait_s: float) -> Asked:
        """How the question `sent` ends: with its answer, or why there is none.

        The answer is not pushed, and not returned by a check, until `checked` is called, once, with its id.
        """
        try:
            wait = AnswerWait(self.bus, sent, wait_s, look=partial(self._take_answer, sent.id))
            return await wait.ended(self._next_wake)
        finally:
            self._asking.discard(sent.id)
            # What else came in the thread, or comes after this, is pushed.
            self._wake_itself()

    def _send_question(self, to: object, text: object, wait_s: float) -> Sent:
        asks = question(to, wait_s, self.bus.clock())
        sent = self.bus.send(self.peer.name, to, text, sender_session=self.peer.session, question=asks)
        self._asking.add(sent.id)  # without a turn of the event loop in between: no answer is pushed before
        return sent

    def _take_answer(self, question_id: int) -> Envelope | None:
        # Not in another file: there the id means another message.
        if question_id not in self._asking or self._is_another_file():
            return None
        answer = self.bus.store.queries.answer(question_id)
        if answer is None or self.bus.pause_of(self.peer) is not None:  # [BRAKE-1]
            return None
        self._checked.add(answer.id)
        return answer

    async def _next_wake(self, timeout_s: float) -> None:
        await (anyio.sleep(timeout_s) if self._wakes is None else self._wakes.beside(timeout_s))

    def send_now(self, to: object, text: object, *, reply_to: int | None = None) -> Sent | GroupSent:
        """The same as `send`, without waiting. Raises Busy, too, if it would have to wait."""
        return self._at_once(lambda: self._send(to, text, reply_to))

    def _send(self, to: object, text: object, reply_to: int | None) -> Sent | GroupSent:
        send = self.bus.send_group if is_group(to) else self.bus.send
        sent = send(self.peer.name, to, text, reply_to=reply_to, sender_session=self.peer.session)
        if self._proofs is not None and reply_to is not None:
            self._proofs.drop([reply_to])
        return sent

    async def broadcast(self, text: object, *, everywhere: bool = False) -> list[Sent]:
        """Send to every other peer that is present. Raises what `Bus.broadcast` raises."""
        return await self._in_turn(lambda: self._broadcast(text, everywhere=everywhere))

    def broadcast_now(self, text: object, *, everywhere: bool = False) -> list[Sent]:
        """The same, without waiting. Raises what `Bus.broadcast` raises, and Busy if it would have to wait."""
        return self._at_once(lambda: self._broadcast(text, everywhere=everywhere))

    def _broadcast(self, text: object, *, everywhere: bool) -> list[Sent]:
        return self.bus.broadcast(self.peer.name, text, sender_session=self.peer.session, everywhere=everywhere)

    def _at_once(self, call: Callable[[], _T]) -> _T:
        store = self.bus.store
        if self._turn.locked() or store.is_replaced() or self._is_another_file():
            raise Busy
        return call()

    async def _in_turn(self, call: Callable[[], _T]) -> _T:
        # Usually nothing is ahead of this send. Taking the lock and switching tasks would double its cost, so try
        # without them first.
        with suppress(Busy):
            return self._at_once(call)
        async with self._turn:
            await self._reopen_if_replaced()
            return await retry_while_busy(call)

    async def rename(self, name: object) -> Renamed:
        """Take another name and keep the pending messages. Raises what `Bus.rename` raises."""
        async with self._turn:
            renamed = await retry_while_busy(lambda: self.bus.rename(self.peer, name))
            assert self._claimed is not None
            self._claimed = replace(self._claimed, peer=replace(self.peer, name=renamed.name), note="")
        # What waits under the new name is due now, not at the next safety poll.
        self._wake_itself()
        if renamed.kept:
            self._say(renamed.kept_note)
        return renamed

    async def set_status(self, text: object) -> str:
        """Say what this peer is doing; empty clears it. Raises what `Bus.set_status` raises. [STATUS-1]"""
        peer = await self._in_turn(lambda: self.bus.set_status(self.peer, text))
        self._update(peer)
        return peer.status

    def _wake_itself(self) -> None:
        if self._armed is not None:
            self._armed.notify(self.peer.endpoint)

    def count_unread(self, limit: int) -> int:
        """How many messages this session is not known to have read, and can read now; counting stops at `limit`."""
        return 0 if self.bus.pause_of(self.peer) is not None else self.bus.count_unread(self.peer, limit)

    async def check(self, wait_s: float, limit: int) -> list[Unread]:
        """The oldest `limit` unread messages. Waits up to `wait_s` seconds if there are none. [READ-1]

        The messages returned are not pushed and not returned again until `checked` is called, once, with their ids.
        """
        give_up_at = anyio.current_time() + wait_s
        # Only the first look: what was shown before does not end a wait for what is new. [READ-6]
        shown = self.bus.shown(self.peer, limit)
        while True:
            unread, shown = self._take_unread(limit, shown), []
            left_s = give_up_at - anyio.current_time()
            if unread or left_s <= 0:
                return unread
            await self._next_wake(min(left_s, _CHECK_POLL_S))

    def _take_unread(self, limit: int, shown: Sequence[Unread]) -> list[Unread]:
        if self.bus.pause_of(self.peer) is not None:  # [BRAKE-1]
            return []
        found = [*shown, *self.bus.unread(self.peer, limit + len(self._checked) + len(self._asking), self._held)]
        # Old mail that is held back comes last. [OLD-4]
        found.sort(key=lambda one: (one.envelope.id <= self._held, one.envelope.id))
        unread = [one for one in found if self._is_free(one.envelope)][:limit]
        self._checked.update(one.envelope.id for one in unread)
        is_out = self._pump.is_out if self._pump is not None else lambda _id: False
        return [replace(one, was_pushed=one.was_pushed or is_out(one.envelope.id)) for one in unread]

    def parts_read(self, envelope_id: int) -> int:
        """How many parts of a message the reader has, if it is too long for one answer. [READ-4]"""
        return self._parts.get(envelope_id, 0)

    async def checked(
        self,
        ids: Sequence[int],
        *,
        reached: bool,
        partly: Collection[int] = (),
        is_certain: bool = True,
        carrier: str = PULL,
    ) -> None:
        """End a check, or an ask. `reached`: its messages have reached the reader, so they are read. [READ-1]

        Of the messages in `partly` one more part has reached the reader, and there are more: these are not read yet.
        Unless `is_certain`, the reader may not be whom they are for: they are offered once more. [READ-6]

        Raises Busy when they are read but cannot be marked: then they will be returned again.
        """
        try:
            # If the database was replaced meanwhile, these ids were forgotten: they mean other messages now.
            known = [] if self._is_another_file() else [one for one in ids if one in self._checked]
            read = [one for one in known if one not in partly]
            if reached:
                self._parts.update({one: self.parts_read(one) + 1 for one in known if one in partly})
            if reached and read:
                await retry_while_busy(
                    lambda: self.bus.mark_read(self.peer, read, carrier=carrier, is_certain=is_certain)
                )
                if self._proofs is not None:
                    self._proofs.drop(read)
                if self._first is not None and self._first.id in read:
                    self._first = None
                for one in read:
                    self._parts.pop(one, None)
        finally:
            self._checked.difference_update(ids)
            if not reached:
                self._wake_itself()

    async def peers(self) -> list[Peer]:
        """The present peers, this one included."""
        return await retry_while_busy(self.bus.peers)
