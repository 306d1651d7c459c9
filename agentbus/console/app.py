"""The screen of the console: what is where, and what each key does. Implements [CONSOLE-3] to [CONSOLE-9]."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.worker import WorkerFailed

from agentbus import doctor, registry
from agentbus.cli import common
from agentbus.console import look, person
from agentbus.console.desk import EVERYTHING, MOST_COUNTED, Desk, Filter
from agentbus.console.dialogs import Choice, Question, Reading, Search
from agentbus.console.feed import Feed
from agentbus.console.panes import Composer, Details, Draft, PeerList
from agentbus.console.terminal import Terminal
from agentbus.core import config, eventloop
from agentbus.core.bus import retry_while_busy
from agentbus.core.changes import SAFETY_S, watching
from agentbus.core.errors import AgentbusError, Refused
from agentbus.core.findings import Level
from agentbus.core.model import MessageState, Status
from agentbus.core.names import address, is_group
from agentbus.core.search import MOST_RANKED
from agentbus.core.text import escaped

__all__ = ["Console", "open_console"]

_T = TypeVar("_T")

# The pause between two looks: a burst takes one look, and a key waits for no more than that.
_PAUSE_S = 0.1
# How often a console that is not the peer tries again, and how often ages are drawn anew.
_TICK_S = 10.0
# From these widths on there is room for more.
_WIDE, _WIDEST = 100, 150
# So many steps back in the history are made for one request: of a filter that few messages meet, the rest comes later.
_STEPS = 50
# What a pause does.
_PAUSING = "Whoever is paused sends nothing and gets nothing: the mail waits until you resume"


class _Main(Screen[None]):
    """What is behind all windows. A wider one shows more."""

    def on_resize(self) -> None:
        """It is wider or narrower now."""
        self.set_class(self.app.size.width >= _WIDE, "wide")
        self.set_class(self.app.size.width >= _WIDEST, "widest")

    def on_screen_resume(self) -> None:
        """Behind an open window, one is not told of a new size."""
        self.on_resize()


class Console(App[None]):
    """One window on the bus, for the person `name`."""

    TITLE = "agentbus"
    ENABLE_COMMAND_PALETTE = True
    CSS = """
    Screen { background: ansi_default; color: ansi_default; }
    #head, #where { height: 1; padding: 0 1; }
    #head { text-style: bold; }
    #where { color: ansi_bright_black; }
    #left { border-right: solid ansi_bright_black; }
    Details { display: none; }
    .wide PeerList { width: 34; }
    .widest Details { display: block; }
    ModalScreen { background: transparent; }
    /* Above: the newest message and what one writes are below. */
    ToastRack { dock: top; align: right top; margin: 1 0 0 0; }
    Toast { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "reply", "Answer"),
        Binding("s", "send", "Send"),
        Binding("a", "ask", "Ask"),
        Binding("b", "broadcast", "Broadcast", show=False),
        Binding("slash", "search", "Search", key_display="/"),
        Binding("f", "filter", "Filter"),
        Binding("u", "unread", "Next for you", show=False),
        Binding("t", "thread", "Thread", show=False),
        Binding("p", "pause", "Pause"),
        Binding("P", "pause_all", "Pause all", show=False),
        Binding("x", "cancel", "Take back", show=False),
        Binding("d", "doctor", "Why?"),
        Binding("escape", "everything", "Back", show=False),
        Binding("tab", "app.focus_next", "Next part", show=False),
        Binding("question_mark", "help", "Keys", key_display="?"),
        Binding("q", "quit", "Quit"),
        # Also where one writes and in a window: there, Textual would copy a selection.
        Binding("ctrl+c", "quit", priority=True, show=False),
    ]

    def __init__(self, desk: Desk, *, is_quiet: bool = False, is_shown: bool = False) -> None:
        # The terminal's own colours: they suit a light one too.
        super().__init__(driver_class=Terminal, ansi_color=True)
        self.theme = "ansi-dark"
        self.desk = desk
        self.is_quiet = is_quiet
        self.is_shown = is_shown
        self._is_loading = False
        self._trouble = ""  # what the last look by itself could not do: it is said once
        self.failure: BaseException | None = None  # what ended the console
        # Kept here, and not looked up: a window that is open over them hides them from a search.
        self.head = Static(id="head", markup=False)
        self.where = Static(id="where", markup=False)
        self.peer_list = PeerList(id="left")
        self.feed = Feed(desk.name)
        self.details = Details()
        self.composer = Composer(desk.names)

    def get_default_screen(self) -> Screen[Any]:
        """What is behind all windows."""
        return _Main(id="_default")

    def compose(self) -> ComposeResult:
        """The head, the three columns, and where one writes."""
        yield self.head
        yield self.where
        with Horizontal():
            yield self.peer_list
            yield self.feed
            yield self.details
        yield self.composer
        yield Footer(compact=True)

    # -- what happens by itself ------------------------------------------------------------------------------

    def on_mount(self) -> None:
        """Read what is there, and begin to follow."""
        self.desk.open()
        self.desk.look()
        self.desk.look_at_peers()
        self._load()
        self._show_peers()
        self.feed.focus()
        self._join()
        self._follow()
        self.set_interval(_TICK_S, self._tick)

    def _tick(self) -> None:
        """Draw the ages anew, and see who has gone without a word."""
        self._by_itself(self.desk.look_at_peers)
        self._show_peers()

    def _by_itself(self, call: Callable[[], None]) -> None:
        """`call()`, which nobody asked for: what goes wrong is said once, and not at each look."""
        trouble = ""
        try:
            call()
        except AgentbusError as error:
            trouble = str(error)
            if trouble != self._trouble:
                self._say(trouble)
        self._trouble = trouble

    @work(group="follow")
    async def _follow(self) -> None:
        """Look at the bus whenever it changes. [WATCH-1]"""
        settings = self.desk.settings
        watchers = registry.watchers(settings)
        while True:
            async with watching(watchers, poll_ms=settings.poll_ms, say=self._say) as wakes:
                # If the socket was removed while we listened, the outer loop arms it again. [WAKE-6]
                while wakes.is_reachable():
                    self._by_itself(self._look)
                    await anyio.sleep(_PAUSE_S)
                    await wakes.wait(SAFETY_S)
            await anyio.sleep(_PAUSE_S)

    def _look(self, *, thoroughly: bool = False) -> None:
        found = self.desk.look(thoroughly=thoroughly)
        if found.is_new_bus:
            config.prepare_home(self.desk.settings.home)
            self._say("the database was deleted or replaced: this is the new one")
            self._load()
        if found.is_changed:
            self.desk.look_at_peers()
            if self.feed.is_following:
                self.desk.forget()
            self.feed.show(self.desk.threads)
            self._show_peers()
        if found.mine:
            self._call(found.mine)

    def _call(self, mine: list[Status]) -> None:
        """Tell the person about new messages to them: once for what came together."""
        if not self.is_quiet:
            self.bell()
        if self.is_shown:
            newest = mine[-1]
            more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
            self._show_on_desktop(f"{newest.sender}{more}", newest.text)

    @work(group="desktop")
    async def _show_on_desktop(self, title: str, text: str) -> None:
        if not await person.show_on_desktop(escaped(title), look.plain(text)):
            self.is_shown = False
            self._say("nothing here shows notifications: neither notify-send nor osascript works")

    @work(group="join")
    async def _join(self) -> None:
        """Be the peer of the person's name; while another process is, try again now and then."""
        told = False
        while True:
            try:
                async with person.joined(self.desk.settings, self.desk.name, self._say) as session:
                    self.desk.session = session
                    await session.ended.wait()
            except Refused as error:
                if not told:
                    self._say(self._why_refused(error))
                told = True
            except AgentbusError as error:
                self._say(str(error))
            finally:
                self.desk.session = None
            await anyio.sleep(_TICK_S)

    def _why_refused(self, error: Refused) -> str:
        self._guarded(self.desk.look_at_peers)
        if not self.desk.is_taken:
            return f"another window is open: {error.args[0]}. Both show everything, and both can write"
        return f"{error.args[0]}: its mail is not yours to open. Another name: agentbus console --as NAME"

    def _handle_exception(self, error: Exception) -> None:
        self.failure = self.failure or (error.error if isinstance(error, WorkerFailed) else error)
        super()._handle_exception(error)

    def _fatal_error(self) -> None:
        # Textual's own prints a traceback. Here `open_console` raises the failure.
        self._close_messages_no_wait()

    # -- what is drawn ---------------------------------------------------------------------------------------

    def _show_peers(self) -> None:
        desk = self.desk
        now = desk.bus.clock()
        present = {peer.name for peer in desk.peers}
        lines = [
            (
                peer.name,
                look.peer_lines(
                    peer,
                    desk.waiting.get(peer.name, 0),
                    now,
                    is_you=peer.name == desk.name,
                    activity=desk.activity.get(peer.name, ""),
                    pause=desk.pauses.get(peer.name),
                ),
            )
            for peer in desk.peers
        ]
        lines += [(group, look.group_line(group, members)) for group, members in desk.groups.items()]
        lines += [(name, look.offline_line(name, count)) for name, count in desk.waiting.items() if name not in present]
        self.peer_list.show(lines)
        unread = f"{desk.unread:,}" + ("+" if desk.unread == MOST_COUNTED else "")
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(f"agentbus  {len(desk.peers)} online  you are {desk.name}  ")
        if desk.unread:
            head.append(f" ✉ {unread} unread for you: u ", "reverse")
        self.head.update(head)
        back = "" if desk.shown == EVERYTHING else ", Esc shows all"
        self.where.update(f"showing {desk.shown}{back}")

    def _say(self, sentence: str) -> None:
        self.notify(escaped(sentence), markup=False, timeout=8)

    def on_feed_selected(self) -> None:
        """Show the details of what is selected now."""
        self.details.show(self.feed.selected)

    def on_feed_near_top(self) -> None:
        """Go back in the history."""
        self._load()

    @work(group="load")
    async def _load(self) -> None:
        """Bring in older messages, by steps that each leave the keys their turn."""
        if self._is_loading:
            return
        self._is_loading = True
        try:
            for _step in range(_STEPS):
                came = self._guarded(self.desk.more)
                await anyio.lowlevel.checkpoint()
                if came or not self.desk.has_more:
                    break
            self.feed.show(self.desk.threads)
        finally:
            self._is_loading = False

    def _guarded(self, call: Callable[[], _T]) -> _T | None:
        """`call()`; what goes wrong with the bus is said, and the next look tries again."""
        try:
            return call()
        except AgentbusError as error:
            self._say(str(error))
            return None

    async def _done(self, call: Callable[[], _T]) -> _T | None:
        """The result of `call()`, which can have to wait for others; None, and a sentence, if it fails."""
        try:
            return await retry_while_busy(call)
        except AgentbusError as error:
            self._say(str(error))
            return None

    def _show_only(self, shown: Filter) -> None:
        self._guarded(partial(self.desk.open, shown))
        feed = self.feed
        feed.is_following = True
        feed.show(self.desk.threads)
        self._load()
        self._show_peers()
        feed.focus()

    # -- what the keys do ------------------------------------------------------------------------------------

    def action_reply(self) -> None:
        """Answer the selected message; of one's own message, say more to the same recipient."""
        chosen = self.feed.selected
        if chosen is None:
            self._say("no message is selected: choose one with the arrows")
            return
        name = self.desk.name
        self._open(chosen)
        if name in (chosen.sender, chosen.recipient):
            to = chosen.to_group if chosen.sender == name and chosen.to_group else self._other(chosen)
            self._write(Draft("answer", to, reply_to=chosen.id))
        else:
            # It is between others: who was not asked does not answer. [THREAD-2]
            self._write(Draft("send", chosen.sender))

    def action_send(self) -> None:
        """Write to a peer or a group: by default the one that is highlighted on the left."""
        self._write(Draft("send", self._peer_in_hand()))

    def action_ask(self) -> None:
        """Ask a peer."""
        self._write(Draft("ask", self._peer_in_hand()))

    def action_broadcast(self) -> None:
        """Write to everybody who is online."""
        self._write(Draft("broadcast"))

    def _peer_in_hand(self) -> str:
        peers = self.peer_list
        return peers.chosen if peers.has_focus else ""

    def _write(self, draft: Draft) -> None:
        self.composer.open(draft)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Where one writes, a slash is a slash: Textual would show it as the key of the search."""
        if action == "search" and self.composer.has_focus_within:
            return False
        return super().check_action(action, parameters)

    def on_composer_closed(self) -> None:
        """Back to the messages."""
        self.feed.focus()

    @work(group="send")
    async def on_composer_finished(self, event: Composer.Finished) -> None:
        """Send what was written. If that fails, the draft stays, with the reason below it."""
        draft, desk = event.draft, self.desk
        try:
            if draft.kind == "broadcast":
                await self._be_sure_of_broadcast()
            said = await retry_while_busy(partial(desk.send, draft.kind, draft.to, draft.text, draft.reply_to))
        except AgentbusError as error:
            if not self.composer.failed(draft, str(error)):
                self._say(f"{draft.title}: not sent, the draft is kept: {error}")
            return
        self.composer.sent(draft)
        self._say(said)
        self.feed.is_following = True
        self._guarded(partial(self._look, thoroughly=True))

    async def _be_sure_of_broadcast(self) -> None:
        names = [peer.name for peer in self.desk.peers if peer.name != self.desk.name]
        if not names:
            raise Refused("nobody else is online: there is nobody to send this to")
        to = f"{len(names)} peers" if len(names) > 1 else "1 peer"
        if not await self.push_screen_wait(Question(f"Send this to {to}: {', '.join(names)}?")):
            raise Refused("nothing was sent")

    @work(group="question")
    async def action_pause(self) -> None:
        """Pause the peer that is highlighted, or that the selected message concerns; or let it go on."""
        peers, chosen = self.peer_list, self.feed.selected
        name = peers.chosen if peers.has_focus or chosen is None else self._other(chosen)
        if not name or is_group(name) or name == self.desk.name:
            self._say("no session is chosen: Tab goes to the list of peers. You, and a group, are not paused")
            return
        if name in self.desk.pauses:
            question = f"Resume {name}? It gets the mail that has waited, and can send again."
            await self._brake(question, self.desk.resume, name)
        else:
            await self._brake(f"Pause {name}? {_PAUSING} {name}.", self.desk.pause, name)

    @work(group="question")
    async def action_pause_all(self) -> None:
        """Pause everybody, or let all go on; where some are paused and some are not, ask which."""
        paused = ", ".join(self.desk.pauses)
        running = [peer.name for peer in self.desk.peers if not (peer.is_person or peer.name in self.desk.pauses)]
        pause = f"Pause {', '.join(running)}? {_PAUSING} them."
        resume = f"Resume all that are paused ({paused})?"
        if paused and running:
            options = [("pause", pause), ("resume", resume)]
            chosen = await self.push_screen_wait(Choice("Some are paused, and some run", options))
            if chosen:
                await self._act(partial(self.desk.pause if chosen == "pause" else self.desk.resume, None))
        elif paused:
            await self._brake(resume, self.desk.resume, None)
        elif running:
            await self._brake(pause, self.desk.pause, None)
        else:
            self._say("nobody else is online: there is nobody to pause")

    async def _brake(self, question: str, act: Callable[[str | None], str], name: str | None) -> None:
        if await self.push_screen_wait(Question(question)):
            await self._act(partial(act, name))

    async def _act(self, *acts: Callable[[], str]) -> None:
        for act in acts:
            said = await self._done(act)
            if said:
                self._say(said)
        self._guarded(partial(self._look, thoroughly=True))

    def _other(self, message: Status) -> str:
        return message.recipient if message.sender == self.desk.name else message.sender

    @work(group="question")
    async def action_cancel(self) -> None:
        """Take back the selected message, if it is still pending."""
        pending = {one.recipient: one.id for one in self.feed.copies if one.state is MessageState.PENDING}
        if not pending:
            self._say("only a pending message can be taken back: select one")
            return
        ids, names = ", ".join(f"#{row_id}" for row_id in pending.values()), ", ".join(pending)
        question = f"Take back {ids} to {names}? It is pending, and {names} never gets it."
        if await self.push_screen_wait(Question(question)):
            await self._act(*(partial(self.desk.take_back, row_id) for row_id in pending.values()))

    @work(group="question")
    async def action_doctor(self) -> None:
        """What doctor says about the peer that is highlighted, or to whom the selected message goes."""
        peers, chosen = self.peer_list, self.feed.selected
        name = peers.chosen if peers.has_focus or chosen is None else chosen.recipient
        if not name:
            self._say("no peer is chosen: Tab goes to the list of peers")
            return
        # It tries the peer's wake and its files, which can take a second: not in the loop that takes the keys.
        try:
            findings = await anyio.to_thread.run_sync(doctor.about, name)
        except AgentbusError as error:
            self._say(str(error))
            return
        text = Text(f"Would a message to {name} reach its model?\n\n", "bold")
        for one in findings:
            text.append(doctor.line(one)).append("\n")
            if one.remedy and one.level is not Level.OK:
                text.append(f"       -> {escaped(one.remedy)}\n", "bold")
        await self.push_screen_wait(Reading(text))

    def on_feed_opened(self, event: Feed.Opened) -> None:
        """What is opened is read, if it is to the person."""
        self._open(event.status)

    @work(group="read")
    async def _open(self, message: Status) -> None:
        if message.recipient == self.desk.name and message.state is not MessageState.READ:
            await self._done(partial(self.desk.read, message.id))
            self._guarded(partial(self._look, thoroughly=True))

    @work(group="question")
    async def action_unread(self) -> None:
        """Go to the oldest message to the person that is not opened yet."""
        unread = self._guarded(self.desk.next_unread)
        if unread is None:
            self._say("you have opened all that is for you")
            return
        if not self.feed.has(unread.id):
            self._show_only(Filter(thread=unread.root))
        self.feed.select(unread.id)
        self.feed.focus()

    def action_thread(self) -> None:
        """Show the thread of the selected message alone, all of it."""
        chosen = self.feed.selected
        if chosen is not None:
            self._show_only(Filter(thread=chosen.root))
            self.feed.select(chosen.id)

    @work(group="question")
    async def action_filter(self) -> None:
        """Show some messages only."""
        names = [(f"peer {name}", escaped(name)) for name in self.desk.names()]
        kinds = [("all", "all messages"), ("unread", "unread, to you"), ("unanswered", "questions without an answer")]
        chosen = await self.push_screen_wait(Choice("Show only", [*kinds, *names]))
        if chosen == "unread":
            self._show_only(Filter(is_unread=True))
        elif chosen == "unanswered":
            self._show_only(Filter(is_unanswered=True))
        elif chosen == "all":
            self._show_only(EVERYTHING)
        elif chosen is not None:
            self._show_only(_filter_of(chosen.removeprefix("peer ")))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter on a peer shows its messages alone, and all again."""
        if event.option_list.id == "left" and event.option_id:
            wanted = _filter_of(event.option_id)
            self._show_only(EVERYTHING if wanted == self.desk.shown else wanted)

    def action_everything(self) -> None:
        """From a filter back to everything; else to the messages."""
        if self.desk.shown != EVERYTHING:
            self._show_only(EVERYTHING)
        self.feed.focus()

    @work(group="question")
    async def action_search(self) -> None:
        """Look for words in all messages, and go to what was found."""
        chosen = await self.push_screen_wait(Search(self._find))
        if chosen is not None:
            found = self._guarded(partial(self.desk.bus.store.queries.status, chosen))
            if found is not None:
                self._show_only(Filter(thread=found.root))
                if not self.feed.select(found.id):
                    self._say(f"#{found.id} is far back: agentbus history --thread {found.root} shows it")

    @work(group="search", exclusive=True)
    async def _find(self, window: Search, words: str) -> None:
        """Search in a thread: the first search of a long history takes seconds."""

        def tell(done: int, total: int) -> None:
            anyio.from_thread.run_sync(window.say, f"taking up {total:,} messages: {done:,} done")

        window.say("searching")
        try:
            found = await anyio.to_thread.run_sync(partial(self.desk.search, words, tell), abandon_on_cancel=True)
        except AgentbusError as error:
            window.say(str(error))
            return
        window.say(f"the best of the newest {MOST_RANKED:,} matches" if found.is_cut else f"{len(found.hits)} found")
        window.show([(hit.message.id, look.found_lines(hit)) for hit in found.hits])

    def action_help(self) -> None:
        """All keys."""
        text = Text("Keys\n\n", "bold")
        for keys, what in KEYS:
            text.append(f"  {keys:<12}", "bold")
            text.append(f"{what}\n")
        text.append("\nSigns: ○ pending   ◐ delivered   ● read   ✉ waits   the mouse works too", "dim")
        self.push_screen(Reading(text))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:  # noqa: ARG002 - it is Textual's
        """What the command palette offers."""
        for keys, what in KEYS:
            action = ACTIONS.get(keys)
            if action:
                yield SystemCommand(what, f"key {keys}", partial(self.run_action, action))


KEYS = (
    ("up, down", "select a message"),
    ("Enter", "open the message: whole, and read if it is for you"),
    ("End, Home", "to the newest, and follow; to the oldest loaded"),
    ("Tab", "peers, messages, details; Enter on a peer shows its messages alone"),
    ("u", "next message for you"),
    ("t", "the whole thread alone"),
    ("f", "filter: peer, group, unread, unanswered"),
    ("/", "search all messages"),
    ("Esc", "back to all messages"),
    ("r", "answer the message"),
    ("s", "send to a peer or group"),
    ("a", "ask a peer"),
    ("b", "broadcast to all online"),
    ("p", "pause or resume a peer"),
    ("P", "pause or resume all"),
    ("x", "take back a pending message"),
    ("d", "why does it not arrive: doctor"),
    ("Ctrl-P", "all commands"),
    ("q, Ctrl-C", "quit"),
)
ACTIONS = {
    "u": "unread",
    "t": "thread",
    "f": "filter",
    "/": "search",
    "Esc": "everything",
    "r": "reply",
    "s": "send",
    "a": "ask",
    "b": "broadcast",
    "p": "pause",
    "P": "pause_all",
    "x": "cancel",
    "d": "doctor",
    "q, Ctrl-C": "quit",
}


def _filter_of(name: str) -> Filter:
    return Filter(group=name) if is_group(name) else Filter(peer=name)


def open_console(asked: str | None, *, is_quiet: bool, is_shown: bool) -> None:
    """Open the console, and return when it was closed. Raises what opening the bus raises."""
    # A database that is locked must not hold up the keys: it is waited for in the event loop. [STORE-4]
    with common.bus_and_settings(busy_ms=0) as (bus, settings):
        # Who reads the person's mail and answers as the person is believed as the person is. [CONSOLE-1]
        name = common.person_here(bus, settings, "open the console")
        desk = Desk(bus, settings, name if asked is None else address(asked))
        app = Console(desk, is_quiet=is_quiet, is_shown=is_shown)
        # What Textual has loaded stays: to look through it for garbage, again and again, holds up a key by 0.1 s.
        gc.collect()
        gc.freeze()
        eventloop.run(_run, app)
    if app.failure is not None:
        raise app.failure


async def _run(app: Console) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(common.when_signalled, lambda _number: app.exit())
        try:
            await app.run_async()
        except Exception as error:  # noqa: BLE001 - `open_console` raises it: the group of tasks would wrap it
            app.failure = error
        tasks.cancel_scope.cancel()
