"""The mod delivery: against a stand-in of the module on the real socket, and a transcript in a real file."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentbus.adapters.claude_mcp import door as door_module
from agentbus.adapters.claude_mcp import mod as mod_module
from agentbus.adapters.claude_mcp import plugin
from agentbus.adapters.claude_mcp.door import Door
from agentbus.adapters.claude_mcp.inbox import inbox as claude_inbox
from agentbus.adapters.claude_mcp.mod import NUDGE, ModDelivery, ModFirst
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.inbox import Address, InboxDelivery, PostBudget
from agentbus.core.errors import DeliveryFailed
from agentbus.core.ports import Receipt
from agentbus.core.process import Process, current
from tests.support.fakes import envelope
from tests.support.inbox_stand_in import TOKEN, InboxStandIn
from tests.support.mod_stand_in import ModStandIn
from tests.support.transcript import TranscriptFile

pytestmark = pytest.mark.anyio

SUBMITTED = {"submitted": True}
NOTED = {"noted": True}


class Setting:
    """A session: its socket, its transcript, its inbox, and both deliveries."""

    def __init__(self, folder: Path) -> None:
        home = folder / "bus"
        home.mkdir(mode=0o700)
        self.is_idle = False
        self.why_not = ""
        self.turned: list[tuple[str, str]] = []
        self.record = TranscriptFile(folder / "t.jsonl")
        self.door = Door(home, current())
        self.mod = ModDelivery(self.door, self.record, lambda: self.is_idle)
        self.inbox = InboxStandIn(folder / "in" / "1.sock")
        gate = ReadyGate(settle_s=0)
        gate.initialized()
        gate.listed()
        to = claude_inbox(Address(self.inbox.path, TOKEN), current())
        other = InboxDelivery(to, PostBudget(home, current()), gate, self._report)
        self.first = ModFirst(self.mod, self.door, other, self._turn, "started without", lambda: self.why_not)
        self.modules: list[ModStandIn] = []

    async def _report(self, _trouble: str) -> None:
        pass

    async def _turn(self, carrier: str, reason: str) -> None:
        self.turned.append((carrier, reason))

    async def module(self, answer: dict[str, Any] | None = None, name: str = "m1") -> ModStandIn:
        """A module that asks."""
        await until(lambda: not self.door.gone)
        self.modules.append(ModStandIn(self.door.path, name, answer))
        await self.door.until_asking()
        return self.modules[-1]


async def until(condition: Callable[[], Any]) -> Any:
    with anyio.fail_after(10):
        while not (found := condition()):
            await anyio.sleep(0.002)
    return found


@asynccontextmanager
async def running(watch: bool = True) -> AsyncIterator[Setting]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        made = Setting(Path(folder))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(made.first.watch if watch else made.door.run)
            try:
                yield made
            finally:
                tasks.cancel_scope.cancel()
                for module in made.modules:
                    module.hang_up()
        made.inbox.close()
        for module in made.modules:
            module.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses that a real session needs, shorter."""
    monkeypatch.setattr(door_module, "_SILENCE_S", 0.15)
    monkeypatch.setattr(mod_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(mod_module, "_DOUBT_S", 0.2)
    monkeypatch.setattr(mod_module, "_PROMPT_S", 0.02)
    monkeypatch.setattr(mod_module, "_GRACE_S", 0.05)


# -- what is given -----------------------------------------------------------------------------------------


@pytest.mark.spec("MOD-8")
async def test_an_idle_session_gets_one_text_that_is_taken_when_its_turn_begins() -> None:
    async with running() as session:
        module = await session.module()
        receipts: list[Receipt] = []

        async def deliver() -> None:
            receipts.append(await session.first.deliver([envelope(1, "one"), envelope(2, "two")]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliver)
            (post,) = await until(lambda: module.posts)
            await anyio.sleep(0.02)
            assert receipts == []
            module.say_beside(post["post"], **SUBMITTED)
        head, *elements = post["text"].split("\n")
        assert head == "agentbus, not your user:"
        assert [one.split(">", 1)[1] for one in elements] == ["one</channel>", "two</channel>"]
        (receipt,) = receipts
        assert (receipt.count, receipt.taken(), session.first.carrier) == (2, True, "mod")
        assert session.inbox.texts == []


@pytest.mark.spec("MOD-8")
async def test_nothing_is_given_after_a_prompt_before_that_stands_in_the_transcript(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A note that came before would stand before it in the request."""
    monkeypatch.setattr(mod_module, "_PROMPT_S", 3_600.0)
    async with running() as session:
        module = await session.module(SUBMITTED)
        has_returned = anyio.Event()

        async def deliver() -> None:
            await session.first.deliver([envelope(1)])
            has_returned.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliver)
            (post,) = await until(lambda: module.posts)
            await anyio.sleep(0.05)
            assert not has_returned.is_set()
            session.record.prompt(post["text"])
            with anyio.fail_after(10):
                await has_returned.wait()


@pytest.mark.spec("MOD-9", "PROOF-2")
async def test_a_note_is_taken_when_the_transcript_shows_it_in_a_request() -> None:
    async with running() as session:
        module = await session.module(NOTED)
        receipt = await session.first.deliver([envelope(1), envelope(2)])
        text = module.posts[0]["text"]
        assert module.posts[0]["note"] is True
        assert not receipt.taken()
        session.record.note(held=(text,))
        assert not receipt.taken(), "it waits for a request"
        session.record.note(text)
        assert receipt.taken()
        session.is_idle = True
        await anyio.sleep(0.05)
        assert len(module.posts) == 1, "nothing is left to be made good"


@pytest.mark.spec("MOD-9")
async def test_a_note_that_no_request_has_carried_is_made_good() -> None:
    async with running() as session:
        module = await session.module(NOTED)
        receipt = await session.first.deliver([envelope(1)])
        await anyio.sleep(0.05)
        assert len(module.posts) == 1, "it is busy"
        module.answer = SUBMITTED
        session.is_idle = True
        await until(lambda: len(module.posts) >= 2)
        assert (module.posts[1]["text"], module.posts[1]["note"]) == (NUDGE, False)
        # The turn of that line did not carry it, because /clear has lost it: so the text itself is given.
        await until(lambda: len(module.posts) >= 3)
        assert module.posts[2]["text"] == module.posts[0]["text"]
        await until(receipt.taken)
        await anyio.sleep(0.05)
        assert len(module.posts) == 3, "also if the transcript never shows it"


@pytest.mark.spec("MOD-9", "INBOX-2")
async def test_what_is_only_announced_is_no_note() -> None:
    async with running() as session:
        module = await session.module(SUBMITTED)
        await session.first.deliver([envelope(1, "x" * 1_000_001)])
        assert "too long for here" in module.posts[0]["text"]
        assert module.posts[0]["note"] is False


@pytest.mark.spec("MOD-9")
async def test_without_a_transcript_nothing_becomes_a_note() -> None:
    async with running() as session:
        module = await session.module(SUBMITTED)
        session.record.place = lambda: ""  # type: ignore[method-assign]
        await session.first.deliver([envelope(1)])
        assert module.posts[0]["note"] is False


@pytest.mark.spec("MOD-5")
async def test_what_a_stopped_session_refuses_goes_through_the_inbox() -> None:
    async with running() as session:
        module = await session.module({"dropped": "the session was stopped and nobody has sent input since"})
        receipt = await session.first.deliver([envelope(1, "wake up")])
        assert session.first.carrier == "inbox"
        await until(receipt.taken)
        assert "wake up" in await until(lambda: "".join(session.inbox.texts))
        # So does the line that makes a note good.
        module.answer = NOTED
        await session.first.deliver([envelope(2)])
        module.answer = {"dropped": "stopped"}
        session.is_idle = True
        await until(lambda: NUDGE in session.inbox.texts)


# -- who asks ----------------------------------------------------------------------------------------------


@pytest.mark.spec("MOD-5", "MOD-7")
async def test_the_inbox_is_used_while_nobody_asks_and_peers_say_so() -> None:
    async with running() as session:
        receipt = await session.first.deliver([envelope(1, "early")])
        await until(receipt.taken)
        assert "early" in await until(lambda: "".join(session.inbox.texts))
        await until(lambda: session.turned)
        assert session.turned == [("inbox", "started without; its agentbus module does not ask")]
        module = await session.module(SUBMITTED)
        await until(lambda: len(session.turned) == 2)
        assert session.turned[1] == ("mod", "its agentbus module asks for what comes")
        await session.first.deliver([envelope(2)])
        assert session.first.carrier == "mod"
        session.why_not = "disableAllHooks in there keeps its agentbus module away"
        module.hang_up()
        await until(lambda: len(session.turned) == 3)
        assert session.turned[2] == ("inbox", f"started without; {session.why_not}")
        await until((await session.first.deliver([envelope(3, "late")])).taken)
        assert session.first.carrier == "inbox"


@pytest.mark.spec("MOD-5")
async def test_a_start_waits_for_a_module_that_should_ask_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mod_module, "_GRACE_S", 3_600.0)
    async with running(watch=False) as session:
        session.why_not = "it is not installed"
        with anyio.fail_after(10):
            await session.first.ready()
        session.why_not = ""
        async with anyio.create_task_group() as tasks:
            ready = anyio.Event()

            async def wait() -> None:
                await session.first.ready()
                ready.set()

            tasks.start_soon(wait)
            await anyio.sleep(0.02)
            assert not ready.is_set()
            await session.module(SUBMITTED)
            with anyio.fail_after(10):
                await ready.wait()


@pytest.mark.spec("MOD-10")
async def test_an_answer_that_is_lost_is_decided_by_the_transcript() -> None:
    async with running() as session:
        for number, is_shown in ((1, True), (2, False)):
            module = await session.module(name=f"m{number}")
            outcome: list[Any] = []

            async def deliver(number: int = number, outcome: list[Any] = outcome) -> None:
                try:
                    outcome.append(await session.mod.deliver([envelope(number)]))
                except DeliveryFailed as error:
                    outcome.append(str(error))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(deliver)
                (post,) = await until(lambda: module.posts)  # noqa: B023 - runs in this round
                if is_shown:
                    session.record.prompt(post["text"])
                module.hang_up()
            if is_shown:
                assert outcome[0].taken()
            else:
                assert "gone before it said" in outcome[0]


@pytest.mark.spec("MOD-10")
async def test_a_module_that_has_taken_the_place_of_another_does_not_answer_for_it() -> None:
    async with running() as session:
        before = await session.module()
        async with anyio.create_task_group() as tasks:
            outcome: list[str] = []

            async def give() -> None:
                try:
                    await session.door.give("text", may_be_note=False)
                except door_module.Unanswered:
                    outcome.append("unanswered")

            tasks.start_soon(give)
            await until(lambda: before.posts)
            before.hang_up()
            await session.module(SUBMITTED, "m2")
        assert outcome == ["unanswered"]


# -- the socket --------------------------------------------------------------------------------------------


@pytest.mark.spec("MOD-6")
async def test_the_socket_is_ours_alone_is_there_again_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_LOOK_S", 0.02)
    async with running(watch=False) as session:
        path = session.door.path
        await until(path.exists)
        assert path.name.startswith(f"{os.getpid()}-")
        assert [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent)] == [0o600, 0o700]
        assert door_module.leftovers(path.parent) == [path.name]
        path.unlink()
        path.parent.rmdir()
        await until(path.exists)
        await session.module(SUBMITTED)
        await session.mod.deliver([envelope(1)])
    assert not path.exists()


@pytest.mark.spec("MOD-6")
async def test_what_a_killed_server_left_is_cleared_away() -> None:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        home = Path(folder, "bus")
        (home / "mod").mkdir(mode=0o700, parents=True)
        home.chmod(0o700)
        dead = home / "mod" / "4711-1.sock"
        with door_module.socket.socket(door_module.socket.AF_UNIX) as left:
            left.bind(str(dead))
        (home / "mod" / "notes.txt").write_text("mine")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Door(home, current()).run)
            await until(lambda: not dead.exists())
            tasks.cancel_scope.cancel()
        assert os.listdir(home / "mod") == ["notes.txt"]


@pytest.mark.spec("MOD-6")
async def test_where_no_socket_is_to_be_had_that_is_the_reason() -> None:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        home = Path(folder, "x" * 100)
        home.mkdir(mode=0o700)
        door = Door(home, current())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            await until(lambda: "its module has no socket to ask on (AF_UNIX path too long)" in door.gone)
            tasks.cancel_scope.cancel()


@pytest.mark.spec("MOD-6")
async def test_only_the_agent_process_is_answered() -> None:
    async with running(watch=False) as session:
        await until(lambda: not session.door.gone)
        session.door._host = Process(os.getppid(), "x")
        stranger = ModStandIn(session.door.path)
        session.modules.append(stranger)
        await until(lambda: stranger.refused > 2)
        assert not session.door.is_asking


@pytest.mark.spec("MOD-7")
async def test_of_two_modules_in_one_session_one_is_answered() -> None:
    async with running(watch=False) as session:
        one = await session.module(SUBMITTED)
        other = await session.module(SUBMITTED, "m2")
        await until(lambda: other.refused > 2)
        await session.mod.deliver([envelope(1)])
        assert (len(one.posts), len(other.posts)) == (1, 0)
        one.hang_up()
        await until(lambda: session.door._module == "m2")
        await session.mod.deliver([envelope(2)])
        assert len(other.posts) == 1


@pytest.mark.spec("MOD-7")
async def test_a_request_is_answered_with_nothing_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_POLL_S", 0.02)
    async with running(watch=False) as session:
        module = await session.module(SUBMITTED)
        assert await anyio.to_thread.run_sync(module.request, "next") == {}
        await session.mod.deliver([envelope(1)])
        assert len(module.posts) == 1


async def test_what_is_no_request_of_the_module_is_hung_up_on() -> None:
    async with running(watch=False) as session:
        await until(lambda: not session.door.gone)
        for raw in (b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]", b"\0" * 70_000):
            with door_module.socket.socket(door_module.socket.AF_UNIX) as asking:
                asking.settimeout(10)
                asking.connect(str(session.door.path))

                def talk(asking: Any = asking, raw: bytes = raw) -> bytes:
                    try:
                        asking.sendall(raw)
                        asking.shutdown(door_module.socket.SHUT_WR)
                        return bytes(asking.recv(100))
                    except OSError:
                        return b""

                assert await anyio.to_thread.run_sync(talk) == b""
        await session.module(SUBMITTED)


# -- what keeps it away ------------------------------------------------------------------------------------


@pytest.fixture
def claude_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("CLAUDE_PLUGIN_ROOT", raising=False)
    return tmp_path


@pytest.mark.spec("MOD-5")
def test_what_keeps_a_module_from_being_loaded_is_said(claude_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not installed (agentbus enable claude-mcp)" in plugin.why_not((), "2.1.332", "")
    for name, text in plugin.files().items():
        path = claude_home / "skills" / "agentbus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert plugin.why_not(("claude",), "2.1.287", "") == ""
    assert plugin.why_not(("claude",), "", "") == ""
    assert plugin.why_not((), "2.1.286", "") == "Claude Code 2.1.286 loads no modules, 2.1.287 does"
    for flag in ("--bare", "--safe-mode"):
        assert plugin.why_not(("claude", flag), "2.1.332", "") == f"with {flag}, Claude Code loads no modules"
    settings = claude_home / "settings.json"
    settings.write_text(json.dumps({"disableAllHooks": True}))
    assert plugin.why_not((), "2.1.332", "") == f"disableAllHooks in {settings} keeps its agentbus module away"
    settings.unlink()
    # Loaded from another place, as a plugin that has the server too.
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(claude_home / "elsewhere"))
    monkeypatch.setenv("CLAUDE_PLUGIN_ROOT", str(claude_home / "skills" / "agentbus"))
    assert plugin.why_not((), "2.1.332", "") == ""
