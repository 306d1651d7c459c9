"""What the console knows, and what it does for the person. Draws nothing, and knows no terminal.

It reads the bus by pages, so that a history of any length opens at once, and it looks again when it is woken.
Implements [CONSOLE-1] to [CONSOLE-4].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agentbus import registry
from agentbus.core.asking import question
from agentbus.core.bus import Bus
from agentbus.core.config import Settings
from agentbus.core.errors import Refused
from agentbus.core.model import MessageState, Pause, Peer, Status
from agentbus.core.names import is_group
from agentbus.core.search import Found
from agentbus.core.session import Session

__all__ = ["EVERYTHING", "MOST_COUNTED", "MOST_OF_THREAD", "Desk", "Filter", "Look", "Thread"]

# What one page of the history shows, and how far one read goes back to find it: a filter that few messages meet must
# not keep a key waiting.
PAGE = 100
SPAN = 20_000
# Of a thread, the newest so many messages are shown; and so many when it is shown alone, which takes 0.1 s to draw.
_TAIL = 20
MOST_OF_THREAD = 1_000
# Messages whose state is followed: those of the newest pages, which are on the screen or near it.
_FOLLOWED = 500
# A search waits so long for a busy database, as a command does.
_SEARCH_BUSY_MS = 10_000
# Unopened messages are counted up to here.
MOST_COUNTED = 1_000
# A question of the person waits for its answer for a day.
_ASK_S = 86_400
# How these messages are delivered, and how it is known that they were read.
CARRIER = "console"
READ_BY = "person"


@dataclass(frozen=True, slots=True)
class Filter:
    """Which messages are shown. `thread`: that conversation alone, all of it."""

    peer: str = ""
    group: str = ""
    thread: int = 0
    is_unread: bool = False
    is_unanswered: bool = False

    def __str__(self) -> str:
        if self.thread:
            return f"thread #{self.thread}"
        if self.is_unanswered:
            return "questions without an answer"
        if self.is_unread:
            return "unread, to you"
        return self.group or self.peer or "all"


EVERYTHING = Filter()


@dataclass(slots=True)
class Thread:
    """A conversation: its messages, the oldest first. `is_cut`: it has older ones, which are not shown."""

    root: int
    messages: list[Status]
    is_cut: bool = False

    @property
    def newest(self) -> int:
        """The id of its newest message: threads stand in the order of these."""
        return self.messages[-1].id


@dataclass(slots=True)
class Look:
    """What has changed since the last look. `mine`: new messages to the person."""

    is_changed: bool = False
    is_new_bus: bool = False
    mine: list[Status] = field(default_factory=list)


class Desk:
    """The bus as the person `name` sees it. Not for several threads; every method that reads takes milliseconds.

    Every method raises what its call of the bus raises.
    """

    def __init__(self, bus: Bus, settings: Settings, name: str) -> None:
        self.bus = bus
        self.settings = settings
        self.name = name
        # The peer that the person is in this console; None until it has joined, and while another console is that.
        self.session: Session | None = None
        self.shown = EVERYTHING
        self.threads: list[Thread] = []
        self.peers: list[Peer] = []
        self.waiting: dict[str, int] = {}
        self.groups: dict[str, list[str]] = {}
        self.pauses: dict[str, Pause] = {}
        self.activity: dict[str, str] = {}
        self.unread = 0  # messages to the person that are not opened yet; counting stops at MOST_COUNTED
        self._below: int | None = None  # where the next page begins; None when there is no older one
        self._newest = 0
        self._version = -1

    # -- reading ---------------------------------------------------------------------------------------------

    def open(self, shown: Filter = EVERYTHING) -> None:
        """Show the newest messages that `shown` lets through. The first page is read by `more`."""
        queries = self.bus.store.queries
        self.shown = shown
        self.threads = []
        self._newest = queries.newest_id()
        self._below = None if shown.thread else self._newest + 1
        if shown.thread:
            self.threads = [self._thread(shown.thread)]

    @property
    def has_more(self) -> bool:
        """Whether there can be older messages than those in `threads`."""
        return self._below is not None

    def more(self) -> int:
        """Go back by one step. Returns how many messages it brought: perhaps none, although `has_more`."""
        if self._below is None:
            return 0
        found, self._below = self.bus.store.queries.page(self._below, PAGE, SPAN, *self._condition())
        before = {thread.root for thread in self.threads}
        roots = dict.fromkeys(one.root for one in found)
        older = [self._thread(root, found) for root in roots if root not in before]
        self.threads = sorted([*older, *self.threads], key=lambda one: one.newest)
        return sum(len(one.messages) for one in older)

    def _condition(self) -> tuple[str, ...]:
        """The filter as a condition on the row m, and its values."""
        shown = self.shown
        if shown.is_unread:
            return "m.recipient = ? AND m.read_at IS NULL", self.name
        if shown.is_unanswered:
            return ("m.answer_by IS NOT NULL AND NOT EXISTS (SELECT 1 FROM messages a WHERE a.reply_to = m.id)",)
        if shown.group:
            return "m.to_group = ?", shown.group
        if shown.peer:
            return "? IN (m.sender, m.recipient)", shown.peer
        return ("1",)

    def _thread(self, root: int, known: Sequence[Status] = ()) -> Thread:
        """The thread that `root` began: its end, or all of it where it is shown alone. `known`: read already."""
        queries = self.bus.store.queries
        if self.shown.thread:
            messages = list(queries.thread(root, MOST_OF_THREAD + 1))[::-1]
            return Thread(root, messages[-MOST_OF_THREAD:], is_cut=len(messages) > MOST_OF_THREAD)
        # A reply from before threads were recorded is in no index, but it can be among those that were just read.
        found = {one.id: one for one in [*queries.newest_of(root, _TAIL + 1), *(o for o in known if o.root == root)]}
        messages = sorted(found.values(), key=lambda one: one.id)
        return Thread(root, messages[-_TAIL:], is_cut=len(messages) > _TAIL)

    def look(self, *, thoroughly: bool = False) -> Look:
        """Read what has changed since the last look: unless `thoroughly`, only if another process has written."""
        store = self.bus.store
        found = Look()
        if store.is_replaced():
            store.reopen()
            self._version = -1
            self.open(EVERYTHING)
            found.is_new_bus = True
        version = store.queries.version()
        if version == self._version and not thoroughly:
            return found
        found.is_changed = True
        since = self._newest
        newest = store.queries.newest_id()
        new = self._arrived(newest)
        unopened = [] if self.is_taken else store.queries.unopened(self.name, MOST_COUNTED, above=since)
        found.mine = store.queries.among(unopened)
        self._follow(new)
        # At the end: what could not be read is read by the next look.
        self._newest, self._version = newest, version
        return found

    def _arrived(self, newest: int) -> list[Status]:
        """The messages since the last look: of a burst the newest only, as the page shows them."""
        queries = self.bus.store.queries
        if newest - self._newest > PAGE:
            # Too many to be put in one by one: the newest page is read anew, and the rest is there to scroll to.
            new, _next = queries.page(newest + 1, PAGE, newest - self._newest)
            self.open(self.shown)
            self.more()
        else:
            new = queries.after(self._newest, PAGE)
        return new

    def _follow(self, new: Sequence[Status]) -> None:
        """Bring `threads` up to date: the new messages, and the states of those that are not read yet."""
        queries = self.bus.store.queries
        unsettled = [one for thread in self.threads for one in thread.messages if one.state is not MessageState.READ]
        unsettled = unsettled[-_FOLLOWED:]
        now = {one.id: one for one in queries.among([one.id for one in unsettled])}
        for thread in self.threads:
            if any(one.id in now for one in thread.messages):
                thread.messages = [now.get(one.id, one) for one in thread.messages]
        # Those that were taken back, or pruned.
        gone = {one.id for one in unsettled} - now.keys()
        if gone:
            for thread in self.threads:
                thread.messages = [one for one in thread.messages if one.id not in gone]
            self.threads = [thread for thread in self.threads if thread.messages]
        touched = {one.root for one in new}
        known = {thread.root for thread in self.threads}
        if self.shown.thread:
            # It is not read as a whole again: that takes 0.1 s in a long history.
            fresh = set()
            for thread in self.threads:
                there = {one.id for one in thread.messages}
                thread.messages += [one for one in new if one.root == thread.root and one.id not in there]
        else:
            passed = queries.among([one.id for one in new], *self._condition())
            fresh = (touched & known) | {one.root for one in passed}
        if fresh:
            kept = [thread for thread in self.threads if thread.root not in fresh]
            again = [self._thread(root, new) for root in fresh]
            self.threads = sorted([*kept, *again], key=lambda one: one.newest)

    def forget(self) -> None:
        """Drop the oldest messages of a long list, so that a look stays as quick. `more` reads them again."""
        kept = 0
        for number in range(len(self.threads) - 1, -1, -1):
            kept += len(self.threads[number].messages)
            if kept > _FOLLOWED and not self.shown.thread:
                self._below = self.threads[number].newest + 1
                del self.threads[: number + 1]
                return

    def look_at_peers(self) -> None:
        """Read who is there, and for whom messages wait."""
        self.peers = self.bus.peers()
        queries = self.bus.store.queries
        self.waiting = queries.waiting()
        self.groups = queries.groups()
        self.pauses = queries.pauses(self.bus.clock())
        self.activity = {peer.name: self.bus.activity(peer) for peer in self.peers}
        self.unread = 0 if self.is_taken else len(queries.unopened(self.name, MOST_COUNTED))

    @property
    def seat(self) -> Peer | None:
        """The peer that has the name of the person; None if there is none."""
        return next((one for one in self.peers if one.name == self.name), None)

    @property
    def is_taken(self) -> bool:
        """Whether a session has the name, so that its mail is not the person's."""
        return self.seat is not None and not self.seat.is_person

    def next_unread(self) -> Status | None:
        """The oldest message to the person that is not opened yet; None if there is none."""
        queries = self.bus.store.queries
        return next(iter(queries.among(queries.unopened(self.name, 1))), None)

    def names(self) -> Iterator[str]:
        """Whom one can write to: the peers, those for whom mail waits, and the groups."""
        names = {peer.name for peer in self.peers} | set(self.waiting)
        yield from sorted(names - {self.name})
        yield from self.groups

    # -- searching -------------------------------------------------------------------------------------------

    def search(self, words: str, tell: Callable[[int, int], None]) -> Found:
        """The best matches for `words`. It can take seconds: for a thread, and with a connection of its own.

        `tell` is called with how many messages are taken up into the index, and of how many. Raises what a search does.
        """
        bus, triggers = registry.open_bus(self.settings, busy_ms=_SEARCH_BUSY_MS)
        try:
            return bus.store.search_index().search(words, limit=PAGE, tell=tell)
        finally:
            bus.store.close()
            triggers.close()

    # -- acting ----------------------------------------------------------------------------------------------

    def send(self, kind: str, to: str, text: str, reply_to: int) -> str:
        """Send as the person; return what became of it, in a sentence."""
        session = None if self.session is None else self.session.peer.session
        answered = reply_to or None
        if kind == "broadcast":
            sent = self.bus.broadcast(self.name, text, sender_session=session)
            return f"sent to {len(sent)}: {', '.join(one.recipient for one in sent)}" if sent else "nobody is online"
        if kind == "ask":
            asks = question(to, _ASK_S, self.bus.clock())
            return str(self.bus.send(self.name, to, text, sender_session=session, question=asks))
        if is_group(to):
            return str(self.bus.send_group(self.name, to, text, reply_to=answered, sender_session=session))
        return str(self.bus.send(self.name, to, text, reply_to=answered, sender_session=session))

    def pause(self, name: str | None) -> str:
        """Pause a peer, or all."""
        paused = self.bus.pause(name, by=self.name)
        return f"paused: {', '.join(one.name for one in paused)}"

    def resume(self, name: str | None) -> str:
        """End the pause of a peer, or of all."""
        _meant, resumed = self.bus.resume(name, by=self.name)
        return f"resumed: {', '.join(resumed)}" if resumed else "nobody was paused"

    def take_back(self, row_id: int) -> str:
        """Take back a message that is pending."""
        return f"#{self.bus.cancel(row_id).id} is taken back"

    def read(self, row_id: int) -> None:
        """Note that the person has opened a message to them. Raises Refused while they are no peer, and Busy."""
        peer = self.seat
        if peer is None:
            raise Refused(f'nobody is on the bus as "{self.name}" yet, so #{row_id} stays unread', hint="try again")
        if self.is_taken:
            raise Refused(f'"{self.name}" is a session of {peer.runtime}, so #{row_id} is for that one to read')
        self.bus.mark_read(peer, [row_id], read_by=READ_BY, carrier=CARRIER)
