"""`agentbus search` and `agentbus prune`, in this process: what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from agentbus.cli import app
from agentbus.cli import search as module
from agentbus.core.bus import now_ms
from agentbus.core.errors import InvalidRequest
from agentbus.core.store import Store

DAY_MS = 86_400_000

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the home of `store`; returns what it has printed to stdout and stderr."""
    monkeypatch.setenv("AGENTBUS_HOME", str(store.path.parent))

    def run(*arguments: str) -> tuple[str, str]:
        app.run(list(arguments))
        return capfd.readouterr()

    return run


@pytest.mark.spec("SEARCH-1", "CLI-7")
def test_search_prints_a_line_for_each_match(store: Store, run: Run) -> None:
    store.send("web", "api", "which port\ndoes it \x1b[2J listen on?", now=now_ms())
    store.send("api", "web", "port 8080", now=now_ms(), reply_to=1)
    out, err = run("search", "port")
    first, second = out.splitlines()
    assert first.endswith("#2     pending    api -> web  port 8080")
    assert second.endswith("#1     read       web -> api  which port\\ndoes it \\x1b[2J listen on?")
    assert err == ""
    assert run("search", "port", "--limit", "1") == (first + "\n", "agentbus: there are more matches: --limit 10\n")
    assert run("search", "port", "--thread", "#2", "--peer", "WEB", "--since", "1h") == (out, "")
    assert run("search", "port", "--since", "2099-01-01") == ("no message matches\n", "")


@pytest.mark.spec("SEARCH-1", "KEEP-1", "GROUP-3", "LEDGER-3")
def test_what_was_sent_to_a_group_is_found_and_pruned_by_the_group(store: Store, run: Run) -> None:
    for name in ("api", "web"):
        store.join_group("@review", name, now=now_ms())
    store.send("api", "web", "which port?", now=now_ms())
    store.send_group("api", "@review", "the port is 8080", now=now_ms())
    store.send_group("ci", "@review", "port 8081 is free", now=now_ms())
    found = [json.loads(line)["id"] for line in run("search", "port", "--peer", "@Review", "--json")[0].splitlines()]
    assert sorted(found) == [2, 3, 4]
    # It is no question, though it has an answer: that of another member.
    store.send("web", "ci", "yes", now=now_ms(), reply_to=4)
    assert json.loads(run("status", "3", "--json")[0])["answered_by"] is None
    assert run("prune", "--peer", "@review", "--pending") == ("removed 3 messages, 2 of them pending\n", "")
    assert [one.text for one in store.queries.newest_first()] == ["yes", "which port?"]


@pytest.mark.spec("SEARCH-1", "CLI-3")
def test_search_prints_json(store: Store, run: Run) -> None:
    store.send("web", "api", "which port does it listen on?", now=now_ms())
    (row,) = [json.loads(line) for line in run("search", "port", "--json")[0].splitlines()]
    assert (row["id"], row["from"], row["text"]) == (1, "web", "which port does it listen on?")
    assert row["snippet"] == row["text"]
    assert row["sender_was"] == []
    assert run("search", "nothing", "--json") == ("", "")


@pytest.mark.spec("SEARCH-2", "ERR-1")
@pytest.mark.parametrize(
    "arguments",
    [
        ("port", "AND"),
        ('"port',),
        ("port", "--thread", "7"),
        ("port", "--thread", "x"),
        ("port", "--limit", "0"),
        ("port", "--since", "soon"),
        ("port", "--peer", "a/b"),
        (),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(store: Store, run: Run, arguments: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest):
        run("search", *arguments)


@pytest.mark.spec("SEARCH-4")
def test_a_long_catch_up_says_how_far_it_is(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        store.send("a", "b", f"word {number}", now=now_ms())
    monkeypatch.setattr(module, "_FEW", 2)
    monkeypatch.setattr(module, "_PROGRESS_S", 0.0)
    monkeypatch.setattr("agentbus.core.search._HOLD_S", 0.0)
    _, err = run("search", "word")
    assert err.splitlines() == [
        "agentbus: indexing 3 messages; the next search only adds what is new",
        "agentbus: indexed 1 of 3",
        "agentbus: indexed 2 of 3",
    ]
    assert run("search", "word")[1] == ""


def some_mail(store: Store) -> dict[str, int]:
    """Messages of three ages between several names; the last one is pending."""
    now = now_ms()
    ids = {}
    for key, sender, to, days in (
        ("ancient", "a", "b", 40),
        ("old", "a", "b", 10),
        ("other", "c", "d", 10),
        ("new", "b", "a", 0),
    ):
        ids[key] = store.send(sender, to, f"word {key}", now=now - days * DAY_MS)[0]
        store.mark_delivered([ids[key]], session="s", carrier="channel", now=now - days * DAY_MS)
    ids["pending"] = store.send("a", "b", "word pending", now=now - 20 * DAY_MS)[0]
    return ids


def left(store: Store) -> set[str]:
    return {one.text.removeprefix("word ") for one in store.queries.newest_first()}


@pytest.mark.spec("KEEP-1", "STATE-4")
@pytest.mark.parametrize(
    ("arguments", "said", "stays"),
    [
        ((), "removed 1 message", {"old", "other", "new", "pending"}),
        (("--before", "3d"), "removed 3 messages", {"new", "pending"}),
        (("--peer", "A"), "removed 3 messages", {"other", "pending"}),
        (("--peer", "a", "--before", "3d"), "removed 2 messages", {"other", "new", "pending"}),
        (("--peer", "a", "--pending"), "removed 4 messages, 1 of them pending", {"other"}),
        (("--before", "15d", "--pending"), "removed 2 messages, 1 of them pending", {"old", "other", "new"}),
        (("--before", "50d"), "no delivered message to remove", {"ancient", "old", "other", "new", "pending"}),
    ],
)
def test_prune_removes_what_it_is_asked_to(
    store: Store, run: Run, arguments: tuple[str, ...], said: str, stays: set[str]
) -> None:
    some_mail(store)
    run("search", "word")
    assert run("prune", *arguments) == (f"{said}\n", "")
    assert left(store) == stays
    assert len(run("search", "word")[0].splitlines()) == len(stays)


@pytest.mark.spec("KEEP-1", "ERR-1")
@pytest.mark.parametrize("arguments", [("--pending",), ("--before", "soon"), ("--peer", "")])
def test_a_prune_that_makes_no_sense_removes_nothing(store: Store, run: Run, arguments: tuple[str, ...]) -> None:
    some_mail(store)
    with pytest.raises(InvalidRequest):
        run("prune", *arguments)
    assert len(left(store)) == 5


@pytest.mark.spec("KEEP-1")
def test_prune_works_in_batches(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentbus.core.bus.PRUNE_ROWS", 2)
    some_mail(store)
    assert run("prune", "--before", "0s", "--pending")[0] == "removed 5 messages, 1 of them pending\n"
    assert left(store) == set()
    assert run("prune") == ("no delivered message to remove that is older than 720 h\n", "")


@pytest.mark.spec("KEEP-1")
def test_a_pruned_bus_works(store: Store, run: Run) -> None:
    ids = some_mail(store)
    store.send("b", "a", "an answer", now=now_ms(), reply_to=ids["old"])
    run("prune", "--before", "3d", "--pending")
    # The message that it answers is gone, and what is left is whole.
    store.mark_delivered([ids["pending"]], session="s", carrier="channel", now=now_ms())
    assert "an answer" in run("history")[0]
    assert "an answer" in run("history", "--a2a")[0]
    assert "an answer" in run("inbox", "a")[0]
    with pytest.raises(InvalidRequest, match=f"there is no message #{ids['old']}: it was never sent, or"):
        run("status", str(ids["old"]))
    new, _ = store.send("a", "b", "word again", now=now_ms())
    assert new > max(ids.values())
    assert left(store) == {"new", "an answer", "again"}


@pytest.mark.spec("KEEP-1")
def test_what_became_pending_since_it_was_looked_up_stays(store: Store) -> None:
    ids = some_mail(store)
    assert store.remove([ids["old"], ids["pending"]], with_pending=False) == [False]
    assert "pending" in left(store)
