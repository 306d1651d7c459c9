"""The commands groups, join, leave, pause and resume, and what other commands show of them. Run in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentbus.cli import app, ask, common, wait
from agentbus.core import config, process
from agentbus.core.bus import Bus, now_ms
from agentbus.core.changes import Changes, NameEvent
from agentbus.core.config import prepare_home
from agentbus.core.errors import InvalidRequest, Refused
from agentbus.core.model import Peer
from agentbus.core.store import Store
from agentbus.doctor.peers import check_one, check_peers
from tests.support.fakes import FakeTrigger, arrival

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
Run = Callable[..., str]


@pytest.fixture
def bus(home: Path) -> Iterator[Bus]:
    store = Store(prepare_home(home), busy_ms=1_000)
    yield Bus(store, {"fake": FakeTrigger()}, max_bytes=1_000)
    store.close()


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command as the login `root` would, outside of every session; returns what it prints."""
    for name in ("AGENTBUS_NAME", "CODEX_THREAD_ID", "CODEX_SESSION_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    monkeypatch.setattr(common, "login_name", lambda: "root")

    def run(*words: str) -> str:
        if words[0] == "send":
            common.send(words[1], words[2], sender=None)
        else:
            app.run(list(words))
        return capsys.readouterr().out

    return run


def claim(bus: Bus, name: str, **changes: object) -> Peer:
    claimed = bus.claim(arrival(name, **changes), str, join_crowd=True)
    assert claimed is not None
    return claimed.peer


@pytest.mark.spec("BRAKE-1", "ASK-7")
def test_an_answer_for_a_session_that_is_paused_meanwhile_is_not_printed_in_its_shell(home: Path, bus: Bus) -> None:
    web = claim(bus, "web")
    asks = ask.question("api", 60, now_ms(), "")
    sent = bus.send("web", "api", "which port?", sender_session=web.session, question=asks)
    answer = bus.send("api", "web", "8080", reply_to=sent.id)
    command = ask._Ask(bus, config.load(home=home), "api", "which port?", None, 60, False, False)
    bus.pause("web", by="root")
    assert command._look(sent.id, web.session) is None
    assert command._look(sent.id, None), "a person is not paused"
    bus.resume("web", by="root")
    found = command._look(sent.id, web.session)
    assert found is not None
    assert found.id == answer.id


def rows(said: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.spec("GROUP-2", "GROUP-3", "BRAKE-2")
@pytest.mark.parametrize("section", ["Groups", "The brakes"])
def test_the_groups_and_the_brakes_of_the_readme_are_as_shown(run: Run, bus: Bus, section: str) -> None:
    (block,) = re.findall(rf"## {section}\n.*?```console\n(.*?)```", README, re.DOTALL)
    if section == "The brakes":
        claim(bus, "backend")
    printed = ""
    for line in block.splitlines():
        if line.startswith("$ agentbus "):
            words = re.findall(r'"(.*?)"|(\S+)', line.removeprefix("$ agentbus "))
            printed += f"{line}\n" + run(*(quoted or plain for quoted, plain in words))
    printed = re.sub(r"until [0-9T:.-]+Z", "until 2026-01-31T14:00:00.000Z", printed.replace('"root"', '"you"'))
    assert printed == block


@pytest.mark.spec("GROUP-2", "CLI-3", "ERR-1")
def test_groups_are_shown_and_left(run: Run, bus: Bus) -> None:
    assert run("groups") == "there are no groups; agentbus join @NAME makes one\n"
    assert run("groups", "--json") == ""
    alice = claim(bus, "alice")
    for words in (("@review", "--as", "alice"), ("review",)):
        run("join", *words)
    assert run("join", "Review") == '"root" is in @review already: 2 of it in all\n'
    assert run("groups") == "@review  alice, root (offline)\n"
    assert rows(run("groups", "--json")) == [
        {"group": "@review", "members": [{"name": "alice", "online": True}, {"name": "root", "online": False}]}
    ]
    assert run("leave", "@review") == '"root" has left @review\n'
    with pytest.raises(Refused, match='"root" is not in "@review": agentbus groups shows who is'):
        run("leave", "@review")
    with pytest.raises(InvalidRequest, match='"a/b" is not a name'):
        run("join", "@a/b")
    with pytest.raises(InvalidRequest, match='"@nobody" has no members, nothing was sent'):
        run("send", "@nobody", "x")
    with pytest.raises(InvalidRequest, match="--wait-read waits for one reader, and a group has several"):
        wait.send_until_read("@review", "x", sender=None, seconds=1)
    bus.send("root", "alice", "to her alone")
    run("send", "@review", "x")
    assert "(@review)" in run("history", "--peer", "@review")
    assert [row["to_group"] for row in rows(run("history", "--json"))] == [None, "@review"]
    assert ", to @review" in run("inbox", "alice")
    bus.leave(alice)


@pytest.mark.spec("BRAKE-2", "BRAKE-3", "CLI-3", "DOCTOR-5", "DOCTOR-6")
def test_a_pause_is_shown_everywhere_and_ended(run: Run, bus: Bus, home: Path) -> None:
    alice = claim(bus, "alice")
    bus.join_group("alice", "@review")
    assert run("pause", "alice") == (
        '"alice" is paused by "root" until it is resumed: it sends nothing, and its mail waits\n'
    )
    assert run("send", "alice", "x") == (
        'queued #1 for "alice": it is paused by "root" until it is resumed, and gets its mail then\n'
    )
    shown = run("peers")
    assert 'alice is paused by "root" until it is resumed: agentbus resume alice\n' in shown
    assert re.search(r"GROUPS\n.*@review\n", shown)
    (row,) = rows(run("peers", "--json"))
    assert row["groups"] == ["@review"]
    assert row["paused"] == {"by": "root", "since": row["paused"]["since"], "until": None}  # type: ignore[index]
    settings = common.config.load(home=home)
    said = [(one.code, one.level.value, one.seen) for one in check_peers(settings)]
    assert (
        "paused",
        "note",
        '"alice" is paused by "root" until it is resumed: it sends nothing, and its mail waits',
    ) in said
    assert ("group", "ok", '"@review": 1 member, 1 of them online') in said
    assert ("paused", "wrong") in [(one.code, one.level.value) for one in check_one(settings, "alice")]
    assert run("resume", "alice") == '"alice" is resumed\n'
    assert run("resume", "alice") == '"alice" was not paused; what it sends is counted from now on\n'
    assert run("resume", "--all") == "nobody is paused\n"
    assert run("pause", "--all", "--for", "2h").startswith('"alice" is paused by "root" until 20')
    assert run("resume", "--all") == '"alice" is resumed\n'
    (row,) = rows(run("peers", "--json"))
    assert row["paused"] is None
    bus.leave(alice)


@pytest.mark.spec("BRAKE-2", "ERR-1")
def test_pausing_nobody_or_for_no_time_is_one_sentence(run: Run, bus: Bus) -> None:
    for words in (["pause"], ["resume"], ["pause", "alice", "--all"], ["resume", "alice", "--all"]):
        with pytest.raises(
            InvalidRequest, match=r"agentbus (pause|resume) takes (a name, or --all|not both a name and)"
        ):
            run(*words)
    for span in ("0s", "366d", "soon", "-1s", "2026-01-01"):
        with pytest.raises(InvalidRequest, match=r"--for is .*: use 90s, 10m, 2h or 3d, from 1s to 365d"):
            run("pause", "alice", "--for", span)
    with pytest.raises(Refused, match="nobody is online, and nobody was paused"):
        run("pause", "--all")
    with pytest.raises(Refused, match='no session has or had the name "alice", nobody was paused'):
        run("pause", "alice")
    assert bus.store.queries.pauses(now_ms()) == {}


@pytest.mark.spec("BRAKE-1", "BRAKE-5")
def test_a_shell_of_a_session_sends_nothing_for_it_while_it_is_paused_and_resumes_nobody(
    run: Run, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The agent process is an ancestor of this shell.
    alice = claim(bus, "alice", host=process.parent())
    for words in (["pause", "alice"], ["resume", "alice"], ["resume", "--all"]):
        with pytest.raises(Refused, match='this shell belongs to the session "alice", and only a person can'):
            run(*words)
    assert run("send", "bob", "x").startswith("queued #1")
    bus.pause("alice", by="root")
    for sender in (None, "somebody-else"):
        with pytest.raises(
            Refused, match=r'this shell belongs to the session "alice", which is paused by "root" until'
        ):
            common.send("bob", "x", sender=sender)
        with pytest.raises(Refused, match="so nothing was sent: only your user can change that"):
            common.broadcast("x", sender=sender)
    assert bus.store.queries.newest_id() == 1
    bus.leave(alice)
    # A client that says which conversation a shell belongs to, and no session is that: an agent's shell all the same.
    monkeypatch.setenv("CODEX_THREAD_ID", "unknown")
    with pytest.raises(Refused, match="this shell belongs to an agent, and only a person can resume"):
        run("resume", "alice")


@pytest.mark.spec("WATCH-2", "GROUP-4", "BRAKE-3")
def test_watch_shows_who_joins_leaves_is_paused_and_resumed(bus: Bus) -> None:
    bus.join_group("early", "@review")
    alice = claim(bus, "alice")
    bus.pause("alice", by="root")
    changes = Changes(bus.store)

    def seen(*, thoroughly: bool = True) -> list[tuple[str, str, str]]:
        found = [one for one in changes.look(thoroughly=thoroughly) if isinstance(one, NameEvent)]
        return [(one.what, one.name, one.group) for one in found]

    assert seen() == [("paused", "alice", "")]
    bus.join_group("alice", "@review")
    assert seen() == [("joined", "alice", "@review")]
    bus.rename(alice, "anna")
    assert seen() == []
    bus.leave_group("anna", "@review")
    bus.resume("anna", by="root")
    assert sorted(seen()) == [("left", "anna", "@review"), ("resumed", "anna", "")]
    bus.pause("anna", by="root", for_ms=60_000)
    bus.pause("anna", by="root", for_ms=90_000)
    assert seen() == [("paused", "anna", "")]
    bus.leave(alice)
