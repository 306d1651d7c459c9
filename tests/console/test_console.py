"""The console: every key, on a real bus with real peers. The screen is Textual's own, without a terminal."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList, Static, TextArea

import agentbus
from agentbus import registry
from agentbus.console import app as module
from agentbus.console import desk as desk_module
from agentbus.console import feed as feed_module
from agentbus.console.app import ACTIONS, KEYS, Console
from agentbus.console.desk import PAGE, Desk
from agentbus.console.feed import Feed
from agentbus.console.panes import PeerList
from agentbus.core import config
from agentbus.core.errors import Busy, Refused
from agentbus.core.model import MessageState
from agentbus.core.search import Found
from agentbus.core.store import Store
from agentbus.core.watchers import Watchers
from tests.support.command import PATIENCE_S

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]


@dataclass
class Window:
    """A console that is open, and the hands on it."""

    app: Console
    pilot: Pilot[None]
    watchers: Watchers

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.pilot.press(key)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        await self.press(*("space" if one == " " else one for one in text))

    async def write(self, key: str, to: str, text: str) -> None:
        """Begin with this key, and write a name and a text; not sent yet."""
        await self.press(key)
        await self.type(to)
        await self.press("enter")
        await self.type(text)

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        with anyio.move_on_after(PATIENCE_S):
            while not condition():
                await self.pilot.pause(0.02)
            return
        raise AssertionError(f"{what or 'it'} did not happen; the screen:\n{self.screen}\n{self.said}")

    async def shows(self, text: str) -> None:
        await self.until(lambda: text in self.screen, repr(text))

    @property
    def screen(self) -> str:
        """What is on the screen, as text."""
        return "\n".join(strip.text for strip in self.app.screen._compositor.render_strips())

    @property
    def said(self) -> str:
        """All sentences that the console has said."""
        return "\n".join(one.message for one in self.app._notifications)

    @property
    def selected(self) -> str:
        found = self.app.feed.selected
        return "" if found is None else found.text

    async def go_to(self, name: str) -> None:
        """Put the highlight of the list on the left on `name`."""
        peers = self.app.peer_list
        await self.until(lambda: name in {peers.get_option_at_index(one).id for one in range(peers.option_count)}, name)
        peers.focus()
        peers.highlighted = peers.get_option_index(name)
        await self.pilot.pause()


@asynccontextmanager
async def console(
    home: Path, name: str = "ann", size: tuple[int, int] = (100, 30), *, is_quiet: bool = False, is_shown: bool = False
) -> AsyncIterator[Window]:
    """A console on the bus of `home`, that has joined it or was told why it could not."""
    settings = config.load(home=home, is_person=True)
    bus, triggers = registry.open_bus(settings, busy_ms=0)
    watchers = registry.watchers(settings)
    try:
        app = Console(Desk(bus, settings, name), is_quiet=is_quiet, is_shown=is_shown)
        async with app.run_test(size=size, notifications=True) as pilot:
            window = Window(app, pilot, watchers)
            await window.until(lambda: app.desk.session or window.said, "joining")
            yield window
    finally:
        watchers.close()
        bus.store.close()
        triggers.close()


@pytest.mark.spec("CONSOLE-1", "CONSOLE-2")
async def test_the_person_is_a_peer_and_what_is_for_them_is_unread_until_it_is_opened(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells: list[object] = []
    monkeypatch.setattr(Console, "bell", lambda self: bells.append(self))
    async with console(home) as window, agentbus.join("backend", home=home) as backend:
        person = {peer.name: peer for peer in await backend.peers()}["ann"]
        assert (person.runtime, person.delivery) == ("person", "console")
        sent = await backend.send("ann", "may I delete the branch?")
        assert sent.is_online
        await window.shows("may I delete the branch?")
        await window.shows("1 unread for you")
        assert len(bells) == 1
        status = window.app.desk.bus.store.queries.status
        await window.until(lambda: status(sent.id).state is MessageState.DELIVERED)
        assert status(sent.id).carrier == "console"
        await window.press("enter")
        await window.until(lambda: status(sent.id).state is MessageState.READ)
        assert status(sent.id).read_by == "person"
        await window.until(lambda: "unread for you" not in window.screen)
        assert len(bells) == 1


@pytest.mark.spec("CONSOLE-2")
async def test_quietly_no_bell_rings_and_u_goes_from_one_unread_message_to_the_next(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "bell", lambda _self: pytest.fail("it rang"))
    first, _ = store.send("backend", "ann", "the first", now=1)
    for number in range(3 * PAGE):
        store.send("a", "b", f"noise {number}", now=2)
    async with console(home, is_quiet=True) as window:
        await window.shows("1 unread for you")
        await window.press("u")
        await window.until(lambda: window.selected == "the first")
        await window.press("enter")
        await window.until(lambda: store.queries.status(first).state is MessageState.READ)
        await window.press("u")
        await window.until(lambda: "opened all" in window.said)
        store.send("backend", "ann", "the second", now=3)
        window.app.desk.bus.peers()
        await window.press("escape")
        await window.shows("the second")


@pytest.mark.spec("CONSOLE-3")
async def test_an_answer_and_a_message_go_out_and_a_draft_survives_errors_and_switching(home: Path) -> None:
    async with console(home) as window, agentbus.join("backend", home=home) as backend:
        asked = await backend.send("ann", "which port?")
        await window.shows("which port?")
        await window.press("r")
        assert "/ Search" not in window.screen
        await window.type("8080")
        await window.press("ctrl+j")
        await window.type("or 80")
        # Something else in between: the answer is still there.
        await window.press("escape", "s")
        await window.type("back")
        await window.press("right", "enter")
        await window.type("hello")
        await window.press("escape", "r", "enter")
        answer = await receive(backend)
        assert (answer.text, answer.reply_to) == ("8080\nor 80", asked.id)
        await window.until(lambda: not window.app.composer.is_open)
        await window.press("s")
        assert window.app.composer.query_one("#to", Input).value == "backend"
        await window.press("enter", "enter")
        assert (await receive(backend)).text == "hello"
        # A bad name and an empty text: a line, and the draft stays.
        await window.press("s")
        await window.type("a b/c")
        await window.press("enter")
        problem = window.app.composer.query_one("#problem", Static)
        await window.until(lambda: problem.display)
        assert window.app.composer.query_one("#to", Input).value == "a b/c"
        await window.press("escape")


async def receive(member: agentbus.Member) -> agentbus.Envelope:
    with anyio.fail_after(PATIENCE_S):
        return await member.receive()


@pytest.mark.spec("CONSOLE-3")
async def test_a_broadcast_says_to_how_many_first_and_a_no_sends_nothing(home: Path) -> None:
    async with AsyncExitStack() as stack:
        window = await stack.enter_async_context(console(home))
        one, _two = [await stack.enter_async_context(agentbus.join(name, home=home)) for name in ("one", "two")]
        await window.until(lambda: len(window.app.desk.peers) == 3)
        await window.press("b")
        await window.type("stop")
        await window.press("enter")
        await window.shows("Send this to 2 peers: one, two?")
        await window.press("n", "enter")
        await window.shows("Send this to 2 peers")
        await window.press("y")
        assert (await receive(one)).text == "stop"
        await window.until(lambda: "sent to 2: one, two" in window.said)
        assert window.app.desk.bus.store.queries.newest_id() == 2


@pytest.mark.spec("CONSOLE-4")
async def test_pause_resume_and_take_back_say_first_what_they_do(home: Path, store: Store) -> None:
    async with console(home) as window, agentbus.join("backend", home=home) as backend:
        await window.go_to("backend")
        await window.press("p")
        await window.shows("Pause backend? Whoever is paused sends nothing")
        await window.press("y")
        await window.shows("paused")
        row_id = send_and_tell(window, store, "wait with this", to="backend")
        await window.press("P")
        await window.shows("Resume all that are paused (backend)?")
        await window.press("n", "tab")
        await window.until(lambda: window.selected == "wait with this")
        window.app.feed.focus()
        await window.press("x")
        await window.shows(f"Take back #{row_id} to backend?")
        await window.press("y")
        await window.until(lambda: "wait with this" not in window.screen)
        await window.go_to("backend")
        await window.press("p")
        await window.shows("Resume backend?")
        await window.press("y")
        await window.until(lambda: not window.app.desk.pauses)
        send_and_tell(window, store, "go on", to="backend")
        assert (await receive(backend)).text == "go on"


@pytest.mark.spec("CONSOLE-4")
async def test_d_says_why_a_message_does_not_arrive(home: Path, store: Store) -> None:
    async with console(home) as window:
        send_and_tell(window, store, "hello?", to="nobody-here")
        await window.shows("hello?")
        await window.press("d")
        await window.shows('"nobody-here" is not running')
        await window.press("escape")
        await window.until(lambda: isinstance(window.app.focused, Feed))


@pytest.mark.spec("CONSOLE-5")
async def test_it_follows_until_one_scrolls_up_and_older_messages_page_in(home: Path, store: Store) -> None:
    for number in range(5 * PAGE):
        store.send("a", "b", f"message number {number}", now=number + 1)
    async with console(home, size=(80, 24)) as window:
        await window.shows(f"message number {5 * PAGE - 1}")
        await window.press("up")
        at = window.selected
        send_and_tell(window, store, "one more")
        await window.until(lambda: any("one more" in one.text for t in window.app.desk.threads for one in t.messages))
        assert window.selected == at
        await window.press("end")
        await window.shows("one more")
        send_and_tell(window, store, "and another")
        await window.shows("and another")
        for _page in range(8):
            await window.press("home")
            await window.until(lambda: not window.app._is_loading)
        await window.until(lambda: window.app.feed.has(1))
        await window.press("home")
        await window.shows("message number 0 ")


def send_and_tell(window: Window, store: Store, text: str, to: str = "b") -> int:
    """Send as another process does: the watchers are nudged after it."""
    row_id, _ = store.send("a", to, text, now=window.app.desk.bus.clock())
    window.watchers.tell()
    return row_id


@pytest.mark.spec("CONSOLE-5")
async def test_a_burst_leaves_the_screen_usable_and_nothing_is_missing_behind_it(home: Path, store: Store) -> None:
    async with console(home, size=(80, 24)) as window:
        for number in range(1_000):
            send_and_tell(window, store, f"burst {number}")
            if number % 100 == 0:
                await window.press("down")
        await window.shows("burst 999")
        window.app.desk.open()
        seen: set[str] = set()
        while window.app.desk.has_more:
            window.app.desk.more()
        for thread in window.app.desk.threads:
            seen |= {one.text for one in thread.messages}
        assert seen >= {f"burst {number}" for number in range(1_000)}


@pytest.mark.spec("CONSOLE-5")
async def test_filters_show_one_peer_what_is_unread_or_one_thread(home: Path, store: Store) -> None:
    root, _ = store.send("a", "b", "the question", now=1)
    store.send("c", "d", "other people", now=2)
    store.send("b", "a", "the answer", now=3, reply_to=root)
    store.send("c", "ann", "to you", now=4)
    async with console(home) as window:
        await window.shows("other people")
        await window.go_to("a")
        await window.press("enter")
        await window.until(lambda: "other people" not in window.screen and "the question" in window.screen)
        await window.press("escape")
        await window.shows("other people")
        await window.press("f", "down", "enter")
        await window.until(lambda: "to you" in window.screen and "other people" not in window.screen)
        await window.press("escape")
        await window.shows("the answer")
        window.app.feed.select(root)
        await window.press("t")
        await window.shows(f"showing thread #{root}")
        assert "the answer" in window.screen
        assert "other people" not in window.screen


@pytest.mark.spec("CONSOLE-5")
async def test_a_search_leads_to_the_thread_and_says_what_it_cannot_understand(home: Path, store: Store) -> None:
    root, _ = store.send("a", "b", "where is the zebra?", now=1)
    store.send("b", "a", "in the barn", now=2, reply_to=root)
    store.send("c", "d", "other people", now=3)
    async with console(home) as window:
        await window.shows("other people")
        await window.press("slash")
        await window.type('"zeb')
        await window.press("enter")
        await window.shows("is not closed")
        await window.press(*["backspace"] * 4)
        await window.type("zebr*")
        await window.press("enter")
        await window.shows("1 found")
        await window.press("enter")
        await window.shows(f"showing thread #{root}")
        assert "in the barn" in window.screen
        assert "other people" not in window.screen
        assert window.selected == "where is the zebra?"


@pytest.mark.spec("CONSOLE-3", "CONSOLE-5")
async def test_a_question_stands_out_until_it_is_answered(home: Path) -> None:
    async with console(home) as window, agentbus.join("backend", home=home) as backend:
        await window.write("a", "backend", "which port?")
        await window.press("enter")
        asked = await receive(backend)
        assert asked.answer_by is not None
        await window.shows("? unanswered")
        await window.press("f", "down", "down", "enter")
        await window.shows("showing questions without an answer")
        await window.shows("which port?")
        await window.press("escape")
        await backend.send("ann", "8080", reply_to=asked.id)
        await window.shows("✓ answered")
        await window.press("f", "down", "down", "enter")
        await window.until(lambda: "which port?" not in window.screen)
        # One asks one peer.
        await window.write("a", "@all-of-them", "well?")
        await window.press("enter")
        await window.shows("a question goes to one peer")


@pytest.mark.spec("CONSOLE-5")
async def test_a_message_to_a_group_is_one_with_the_states_of_its_copies(home: Path) -> None:
    async with AsyncExitStack() as stack:
        window = await stack.enter_async_context(console(home))
        one, two = [await stack.enter_async_context(agentbus.join(name, home=home)) for name in ("one", "two")]
        for member in (one, two):
            await member.join_group("review")
        await window.press("s")
        await window.type("@rev")
        await window.press("right", "enter")
        await window.type("look at this")
        await window.press("enter")
        first = await receive(one)
        await window.shows("@review (2)")
        assert window.screen.count("look at this") == 1 + (window.app.size.width >= 150)
        await one.send("ann", "done", reply_to=first.id)
        await receive(two)
        await window.shows("done")
        # Both are in one thread.
        assert len(window.app.desk.threads) == 1
        await window.press("f")
        await window.shows("@review")


@pytest.mark.spec("CONSOLE-6")
async def test_the_list_shows_who_does_what_and_who_is_paused(home: Path) -> None:
    async with console(home, size=(120, 30)) as window, agentbus.join("backend", home=home) as backend:
        await backend.set_status("mends the build")
        await window.shows("mends the build")
        window.app.desk.bus.pause("backend", by="ann")
        await backend.set_status("still at it")
        await window.shows("‖ backend")
        await window.shows('paused by "ann"')


@pytest.mark.spec("CONSOLE-6")
@pytest.mark.parametrize("size", [(80, 24), (40, 12), (200, 60)])
async def test_no_text_steers_the_terminal_or_breaks_the_layout(
    home: Path, store: Store, size: tuple[int, int]
) -> None:
    nasty = (
        "a\x1b[2Jb\rc\x07d\u202eevil\u202c \u200b\u2066 漢字" * 3
        + "עברית e\u0301\u0301\u0301 \U0001f469\u200d\U0001f4bb"
    )
    store.send("a", "b", nasty, now=1)
    store.send("a", "b", "漢" * 500 + "\n" * 50 + "end", now=2)
    async with console(home, size=size) as window:
        await window.shows("漢")
        for width, height in (size, (size[0] + 7, size[1] - 3), size):
            await window.pilot.resize_terminal(width, height)
            await window.pilot.pause()
            for strip in window.app.screen._compositor.render_strips():
                assert strip.cell_length == width
                assert all(one.isprintable() for one in strip.text), ascii(strip.text)
        if size[0] == 200:
            assert "delivered" in window.screen or "sent" in window.screen


@pytest.mark.spec("CONSOLE-7")
async def test_two_consoles_are_told_and_both_work(home: Path) -> None:
    async with console(home) as one, console(home) as two:
        await two.until(lambda: "another window is open" in two.said)
        assert "another" not in one.said
        async with agentbus.join("backend", home=home) as backend:
            sent = await backend.send("ann", "to whoever sits there")
            await one.shows("to whoever sits there")
            await two.shows("to whoever sits there")
            await two.press("enter", "r")
            await two.type("here")
            await two.press("enter")
            assert (await receive(backend)).reply_to == sent.id
            await one.shows("here")
            await one.until(lambda: "unread for you" not in one.screen)


@pytest.mark.spec("CONSOLE-8")
async def test_help_and_the_palette_name_every_key(home: Path) -> None:
    async with console(home, size=(100, 40)) as window:
        await window.press("question_mark")
        for _keys, what in KEYS:
            await window.shows(what)
        await window.press("escape")
        shown = " ".join(keys for keys, _ in KEYS)
        for binding in Console.BINDINGS:
            for key in binding.key.split(","):
                name = {"slash": "/", "escape": "Esc", "tab": "Tab", "ctrl+c": "Ctrl-C"}.get(key, key)
                assert key == "question_mark" or name in shown.replace(",", " ").split(), key
        commands = {one.title for one in window.app.get_system_commands(window.app.screen)}
        assert commands == {what for keys, what in KEYS if keys in ACTIONS}
        for action in ACTIONS.values():
            assert hasattr(Console, f"action_{action}"), action


@pytest.mark.spec("CONSOLE-2")
async def test_the_desktop_is_told_by_a_program_that_gets_the_text_as_text(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    program = tmp_path / "notify-send"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}.new && mv {told}.new {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    async with console(home, is_shown=True) as window, agentbus.join("backend", home=home) as backend:
        await backend.send("ann", "<b>$(reboot)</b> & `x`")
        await window.until(told.exists)
        assert told.read_text().splitlines() == [
            "--app-name=agentbus",
            "--",
            "backend",
            "&lt;b&gt;$(reboot)&lt;/b&gt; &amp; `x`",
        ]


@pytest.mark.spec("CONSOLE-2")
async def test_where_nothing_shows_notifications_that_is_said_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    async with console(home, is_shown=True) as window, agentbus.join("backend", home=home) as backend:
        await backend.send("ann", "one")
        await window.until(lambda: "nothing here shows notifications" in window.said)


# -- what goes wrong, and what happens in between -------------------------------------------------------------


@pytest.mark.spec("CONSOLE-3", "STORE-4")
async def test_while_the_database_is_busy_a_message_waits_and_a_second_enter_does_not_send_it_twice(
    home: Path, store: Store
) -> None:
    async with console(home) as window:
        with store._writing():
            await window.write("s", "backend", "once")
            await window.press("enter", "enter")
            await window.shows("wait: the message before is being sent")
        await window.until(lambda: not window.app.composer.is_open)
        assert store.queries.waiting() == {"backend": 1}


@pytest.mark.spec("CONSOLE-3")
async def test_what_fails_after_the_composer_was_closed_is_said_and_the_draft_is_kept(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with console(home) as window:
        with store._writing():
            await window.write("s", "backend", "x")
            await window.press("enter", "escape")
            monkeypatch.setattr(window.app.desk.bus, "send", raising(Refused("no room")))
        await window.until(lambda: "not sent, the draft is kept: no room" in window.said)
        await window.press("s")
        assert window.app.composer.query_one("#text", TextArea).text == "x"


def raising(error: Exception) -> Callable[..., object]:
    def call(*_arguments: object, **_named: object) -> object:
        raise error

    return call


@pytest.mark.spec("CONSOLE-5")
async def test_what_a_look_could_not_read_is_read_by_the_next_and_the_reason_is_said_once(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with console(home) as window:
        queries = type(store.queries)
        with monkeypatch.context() as patch:
            for method in ("groups", "newest_of", "unopened"):
                patch.setattr(queries, method, raising(Busy("it is held")))
            send_and_tell(window, store, "to you", to="ann")
            await window.until(lambda: "it is held" in window.said)
            send_and_tell(window, store, "more")
            window.app._tick()
            await window.pilot.pause(0.1)
            assert window.said.count("it is held") == 1
        window.watchers.tell()
        await window.shows("to you")
        await window.shows("1 unread for you")


@pytest.mark.spec("CONSOLE-5")
async def test_a_database_that_was_replaced_is_shown_from_its_newest_message(home: Path, tmp_path: Path) -> None:
    other = Store(config.prepare_home(tmp_path / "other"), busy_ms=1_000)
    other.send("a", "b", "elsewhere", now=1)
    other.close()
    async with console(home) as window:
        for suffix in ("-wal", "-shm"):
            (home / f"bus.db{suffix}").unlink(missing_ok=True)
        (tmp_path / "other" / "bus.db").replace(home / "bus.db")
        window.watchers.tell()
        await window.shows("elsewhere")
        assert "deleted or replaced" in window.said


@pytest.mark.spec("CONSOLE-1", "CONSOLE-7")
async def test_under_the_name_of_a_session_its_mail_stays_its_own(home: Path, store: Store) -> None:
    async with agentbus.join("backend", home=home) as backend, console(home, "backend") as window:
        await window.until(lambda: "its mail is not yours to open" in window.said)
        row_id = send_and_tell(window, store, "for it", to="backend")
        await window.shows("for it")
        assert "unread for you" not in window.screen
        await window.press("enter")
        await window.until(lambda: f"#{row_id} is for that one to read" in window.said)
        assert store.queries.status(row_id).read_at is None
        assert (await receive(backend)).id == row_id


@pytest.mark.spec("CONSOLE-4", "BRAKE-2")
async def test_the_person_is_never_paused_and_where_some_are_the_rest_can_be(home: Path) -> None:
    async with AsyncExitStack() as stack:
        window = await stack.enter_async_context(console(home))
        for name in ("one", "two"):
            await stack.enter_async_context(agentbus.join(name, home=home))
        desk = window.app.desk
        await window.until(lambda: len(desk.peers) == 3)
        await window.go_to("ann")
        await window.press("p")
        await window.until(lambda: "You, and a group, are not paused" in window.said)
        await window.go_to("one")
        await window.press("p", "y")
        await window.until(lambda: list(desk.pauses) == ["one"])
        await window.press("P")
        await window.shows("Pause two?")
        await window.press("enter")
        await window.until(lambda: list(desk.pauses) == ["one", "two"])
        await window.press("P", "y")
        await window.until(lambda: not desk.pauses)


@pytest.mark.spec("CONSOLE-3", "CONSOLE-4")
async def test_one_goes_on_in_a_group_and_takes_back_what_is_pending_of_its_message(home: Path, store: Store) -> None:
    async with console(home) as window, agentbus.join("alpha", home=home) as alpha:
        for name in ("alpha", "beta", "gamma"):
            store.join_group("@review", name, now=1)
        window.app.desk.bus.send_group("ann", "@review", "look at this")
        await receive(alpha)
        window.watchers.tell()
        await window.shows("2 pending")
        await window.press("r")
        await window.shows("to @review")
        await window.press("escape", "x")
        await window.shows("Take back #2, #3 to beta, gamma?")
        await window.press("y")
        await window.until(lambda: store.queries.waiting() == {})


@pytest.mark.spec("CONSOLE-6")
async def test_a_terminal_that_grows_while_a_window_is_open_shows_more(home: Path, store: Store) -> None:
    store.send("a", "b", "the first", now=1)
    store.send("a", "b", "the second", now=2)
    async with console(home, size=(80, 24)) as window:
        await window.shows("the second")
        await window.press("question_mark")
        await window.pilot.resize_terminal(180, 50)
        await window.press("escape")
        await window.until(lambda: window.app.details.display)
        # The details of what was selected while there was no room for them.
        await window.until(lambda: window.screen.count("the second") == 2)
        await window.pilot.resize_terminal(80, 24)
        await window.until(lambda: not window.app.details.display)
        await window.press("up")
        await window.pilot.resize_terminal(180, 50)
        await window.until(lambda: (window.screen.count("the first"), window.screen.count("the second")) == (2, 1))


@pytest.mark.spec("CONSOLE-9")
async def test_ctrl_c_ends_it_where_one_writes_and_in_a_window(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    async with console(home) as window:
        monkeypatch.setattr(window.app, "exit", lambda *_: ended.append(None))
        for keys in (["s", "ctrl+c", "escape"], ["question_mark", "ctrl+c", "escape"], ["slash", "ctrl+c", "escape"]):
            await window.press(*keys)
        assert len(ended) == 3
        monkeypatch.undo()


@pytest.mark.spec("CONSOLE-5")
async def test_a_search_goes_on_behind_a_window_that_was_closed_and_disturbs_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def search(words: str, tell: Callable[[int, int], None]) -> Found:
        began.set()
        go_on.wait(PATIENCE_S)
        tell(1, 2)
        return Found([], is_cut=False)

    async with console(home) as window:
        monkeypatch.setattr(window.app.desk, "search", search)
        await window.press("slash", "x", "enter")
        await window.until(began.is_set)
        await window.press("escape")
        go_on.set()
        await window.until(lambda: not [one for one in window.app.workers if one.group == "search"])
        await window.press("s")
        assert window.app.composer.is_open


@pytest.mark.spec("CONSOLE-6")
async def test_the_list_of_peers_stays_where_it_is_scrolled_to(home: Path, store: Store) -> None:
    for number in range(30):
        store.send("a", f"absent-{number:02}", "x", now=1)
    async with console(home, size=(80, 24)) as window:
        await window.shows("absent-01")
        peers = window.app.peer_list
        peers.scroll_end(animate=False, immediate=True)
        at = peers.scroll_offset.y
        assert at > 0
        send_and_tell(window, store, "y", to="absent-29")
        await window.shows("✉ 2")
        assert peers.scroll_offset.y == at


@pytest.mark.spec("CONSOLE-5")
async def test_a_list_that_is_followed_stays_short_and_what_it_forgot_pages_in_again(home: Path, store: Store) -> None:
    async with console(home, size=(80, 24)) as window:
        desk = window.app.desk
        for number in range(7 * PAGE):
            store.send("a", "b", f"message number {number}", now=1)
            if number % (PAGE // 2) == 0:
                desk.look()
                desk.forget()
        window.app._look()
        assert len(desk.threads) <= 5 * PAGE
        while desk.has_more:
            desk.more()
        assert [one.root for one in desk.threads] == list(range(1, 7 * PAGE + 1))


@pytest.mark.spec("CONSOLE-5")
async def test_a_thread_that_is_shown_alone_is_followed_and_its_newest_part_suffices(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "MOST_OF_THREAD", 5)
    monkeypatch.setattr(feed_module, "MOST_OF_THREAD", 5)
    root, _ = store.send("a", "b", "zebra", now=1)
    for number in range(8):
        store.send("b", "a", f"reply {number}", now=2, reply_to=root)
    async with console(home) as window:
        await window.shows("reply 7")
        await window.press("t")
        await window.shows(f"earlier messages: agentbus history --thread {root}")
        store.send("b", "a", "one more reply", now=3, reply_to=root)
        store.send("x", "y", "another thread", now=3)
        window.watchers.tell()
        await window.shows("one more reply")
        assert "another thread" not in window.screen
        await window.press("escape", "slash")
        await window.type("zebra")
        await window.press("enter")
        await window.shows("1 found")
        await window.press("enter")
        await window.until(lambda: f"#{root} is far back: agentbus history --thread {root}" in window.said)


def test_the_names_of_the_parts_are_those_that_the_module_exports() -> None:
    assert module.__all__ == ["Console", "open_console"]
    assert issubclass(PeerList, OptionList)
