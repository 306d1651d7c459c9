"""What a rename takes along, what it leaves, and what a database of before such names becomes."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import pytest

from agentbus.core import database, names
from agentbus.core.config import prepare_home
from agentbus.core.model import Peer, Renamed
from agentbus.core.process import Process
from agentbus.core.store import Store
from tests.core.test_store import Bench, bench

__all__ = ["bench"]  # the fixture


def rename(bench: Bench, peer: Peer, name: str) -> Renamed:
    return bench.store.rename(peer.session, peer.process.pid, name)


def unread(bench: Bench, peer: Peer) -> list[str]:
    return [one.envelope.text for one in bench.store.unread(peer.session, peer.process.pid, 100)]


def host(number: int) -> Process:
    return Process(number, "x")


@pytest.mark.spec("NAME-12")
def test_a_rename_leaves_the_mail_that_waited_for_another(bench: Bench) -> None:
    carol = bench.claim("carol", host=host(2))
    bench.leave(carol, now=1)
    first, _ = bench.store.send("ci", "carol", "for carol", now=2)
    eve = bench.claim("eve", host=host(3))
    bench.store.send("ci", "eve", "for eve", now=2)
    renamed = rename(bench, eve, "carol")
    assert renamed == Renamed("carol", "eve", kept=1)
    assert renamed.kept_note.startswith('1 message that waited under "carol" before was not for this session')
    bench.store.send("ci", "carol", "since then", now=3)
    assert bench.pending(eve) == unread(bench, eve) == ["for eve", "since then"]
    assert bench.store.count_unread(eve.session, eve.process.pid, 9) == 2
    # Its answer does not mark what it was not given as read.
    bench.store.send("carol", "ci", "re", now=3, reply_to=first, sender_session=eve.session)
    assert bench.store.queries.status(first).read_at is None
    # It goes on under a third name without it, and back.
    assert rename(bench, eve, "dave").kept == 0
    assert bench.pending(eve) == ["for eve", "since then"]
    assert rename(bench, eve, "carol").kept == 1
    # Its restart changes nothing either; who asks for the name at a start gets the mail.
    bench.leave(eve, now=4)
    eve = bench.claim("eve", host=host(3), now=5)
    assert (eve.name, bench.pending(eve)) == ("carol", ["for eve", "since then"])
    bench.leave(eve, now=6)
    assert bench.pending(bench.claim("carol", host=host(4), now=7)) == ["for carol", "for eve", "since then"]


@pytest.mark.spec("NAME-12", "STATE-7")
def test_what_an_earlier_session_of_the_name_took_is_not_offered_after_a_rename(bench: Bench) -> None:
    carol = bench.claim("carol", host=host(2))
    row_id, _ = bench.store.send("ci", "carol", "taken, not read", now=1)
    bench.store.mark_delivered([row_id], session=carol.session, carrier="channel", now=1)
    bench.store.set_proof(carol.session, "")
    bench.leave(carol, now=2)
    bench.dead.add(host(2))
    eve = bench.claim("eve", host=host(3))
    rename(bench, eve, "carol")
    assert unread(bench, eve) == []
    assert bench.store.count_earlier(eve.session, eve.process.pid) == 0
    bench.leave(eve, now=3)
    again = bench.claim("carol", host=host(4), now=4)
    assert unread(bench, again) == ["taken, not read"]


@pytest.mark.spec("NAME-12", "STATE-6")
def test_what_is_returned_after_a_rename_is_not_for_who_has_the_name(bench: Bench) -> None:
    carol = bench.claim("carol", host=host(2))
    row_id, _ = bench.store.send("ci", "carol", "taken, not read", now=1)
    bench.store.mark_delivered([row_id], session=carol.session, carrier="channel", now=1)
    bench.store.set_proof(carol.session, "/a/record")
    bench.leave(carol, now=2)
    bench.dead.add(host(2))
    eve = bench.claim("eve", host=host(3))
    rename(bench, eve, "carol")
    (ended,) = bench.store.unsettled()
    assert bench.store.settle(ended, [], is_whole=True, now=3) == ("carol", [row_id])
    assert bench.store.queries.status(row_id).returned_at == 3
    assert bench.pending(eve) == []


@pytest.mark.spec("NAME-12", "NAME-8")
def test_a_conversation_that_takes_its_name_back_takes_its_mail_and_no_other(bench: Bench) -> None:
    one = bench.claim("web", host=host(2), conversation="one")
    bench.leave(one, now=1)
    bench.store.send("ci", "web", "for it", now=2)
    one = bench.claim("api", host=host(3), conversation="one")
    assert rename(bench, one, "web").kept == 0
    assert bench.pending(one) == ["for it"]
    bench.leave(one, now=3)
    # Another conversation that took the name, and is resumed as another session, is still kept from it.
    eve = bench.claim("eve", host=host(4), conversation="two")
    assert rename(bench, eve, "web").kept == 1
    bench.leave(eve, now=4)
    eve = bench.claim("eve", host=host(5), conversation="two", now=5)
    assert (eve.name, bench.pending(eve)) == ("web", [])


@pytest.mark.spec("NAME-9", "NAME-12")
def test_a_rename_does_not_drive_the_folder_of_the_name_away(bench: Bench) -> None:
    shop = {"cwd": "/src/shop", "is_asked": False}
    bench.leave(bench.claim("shop", host=host(2), **shop), now=1)
    bench.store.send("ci", "shop", "for the shop", now=2)
    eve = bench.claim("eve", host=host(3), cwd="/elsewhere")
    rename(bench, eve, "shop")
    bench.leave(eve, now=3)
    back = bench.claim("shop", host=host(4), now=4, **shop)
    assert (back.name, bench.pending(back)) == ("shop", ["for the shop"])


@pytest.mark.spec("NAME-11")
def test_a_name_that_is_kept_now_is_not_taken_back(bench: Bench) -> None:
    web = bench.claim("web", host=host(2), conversation="one")
    rename(bench, web, "user")  # as it could be once
    bench.leave(web, now=1)
    assert bench.claim("web", host=host(2), conversation="one", now=2).name == "web"
    bench.leave(bench.store.present()[0], now=3)
    assert bench.claim("api", host=host(3), conversation="one", now=4).name == "api"


@pytest.mark.spec("NAME-11", "NAME-4")
def test_no_number_makes_a_name_that_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "login_name", lambda: "web-2")
    assert [bench.claim("web", host=host(n)).name for n in (2, 3)] == ["web", "web-3"]


@pytest.mark.spec("NAME-13")
def test_a_message_tells_what_its_sender_was_called_before(bench: Bench) -> None:
    web = bench.claim("web", host=host(2))

    def send() -> int:
        name = next(one.name for one in bench.store.present() if one.session == web.session)
        return bench.store.send(name, "ci", "x", now=1, sender_session=web.session)[0]

    ids = [send()]
    for name in ("shop", "carol", "carol", "web"):
        rename(bench, web, name)
        ids.append(send())
    queries = bench.store.queries
    assert queries.earlier_names([queries.status(one) for one in ids]) == {
        ids[1]: ["web"],
        ids[2]: ["web", "shop"],
        ids[3]: ["web", "shop"],
        ids[4]: ["shop", "carol"],
    }
    assert queries.earlier_names([queries.status(bench.store.send("a", "b", "x", now=1)[0])]) == {}


@pytest.mark.spec("NAME-5", "NAME-12")
@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_renamed_each_message_is_for_one_session(bench: Bench, seed: int) -> None:
    """Random sessions, renames and sends: nobody sees what was sent to a name before it had that name by a rename."""
    chance = random.Random(seed)
    free = ["a", "b", "c", "d", "e", "f"]
    bench.store._max_pending = 1_000
    live = [bench.claim(free[n], host=host(n + 2)) for n in range(3)]
    called = {peer.session: free[n] for n, peer in enumerate(live)}
    meant: dict[str, str] = {}  # the message, and the session that has its name or alias when it is sent; "" for none
    for step in range(60):
        peer = chance.choice(live)
        if chance.random() < 0.3:
            name = chance.choice(free)
            if name not in called.values():
                rename(bench, peer, name)
                called[peer.session] = name
        else:
            _, address = bench.store.send("ci", chance.choice(free), f"{step}", now=step)
            meant[f"{step}"] = address.peer.session if address.peer is not None else ""
    for peer in live:
        assert bench.pending(peer) == [text for text, session in meant.items() if session == peer.session]


# -- schema 5 ----------------------------------------------------------------------------------------------


def old_database(path: Path, *peers: tuple[str, str, str, str, int | None], mail: dict[str, str]) -> None:
    """A database of schema 5. Peers: session, name, launch name, folder, left_at; mail: text by recipient."""
    connection = apsw.Connection(str(path))
    for number, sql in database.migrations():
        if number <= 5:
            connection.execute(sql)
            connection.execute(f"PRAGMA user_version = {number}")
    for session, name, launch_name, folder, left_at in peers:
        connection.execute(
            "INSERT INTO peers (session, name, host_pid, host_started, launch_name, pid, pid_started, runtime, cwd,"
            " delivery, trigger, endpoint, started_at, last_seen, left_at, conversation, presence)"
            " VALUES (?, ?, 2, 'x', ?, 3, 'x', 'test', ?, 'pull', 'poll', '', 0, 0, ?, ?, 'lock')",
            (session, name, launch_name, folder, left_at, f"c-{session}"),
        )
        connection.execute(
            "INSERT INTO conversations (conversation, name, launch_name, seen_at) VALUES (?, ?, ?, 0)",
            (f"c-{session}", name, launch_name),
        )
    for recipient, text in mail.items():
        connection.execute(
            "INSERT INTO messages (sender, recipient, body, sent_at) VALUES ('ci', ?, ?, 1)", (recipient, text)
        )
    connection.close()


@pytest.mark.spec("NAME-14", "STORE-1")
def test_a_database_with_folded_names_is_brought_forward(home: Path) -> None:
    path = Path(prepare_home(home))
    old_database(
        path,
        ("s1", "m-ller", "m-ller", "/src/Möller", 1),
        ("s2", "m-ller", "m-ller", "/src/Müller", 2),
        ("s3", "agent", "agent", "/src/日本", None),
        ("s4", "agent-2", "agent", "/src/中国", 3),
        ("s5", "shop", "caf-", "/src/shop", 4),
        ("s6", "chosen", "agent", "/src/한국", 5),
        ("s7", "web", "web", "/src/web", 6),
        ("s8", "my-site", "my-site", "/src/my.site", 7),
        mail={name: f"for {name}" for name in ("m-ller", "agent", "agent-2", "shop", "chosen", "web", "my-site", "x")},
    )
    store = Store(path, busy_ms=0)
    # s3 is present, its lock file is missing: it counts as alive.
    assert store.queries.waiting() == dict.fromkeys(
        ("müller", "日本", "中国-2", "shop", "chosen", "web", "my-site", "x"), 1
    )
    assert [(peer.name, peer.launch_name) for peer in store.present()] == [("日本", "日本")]
    _, address = store.send("ci", "agent", "to the old name", now=9)
    assert (address.mailbox, address.peer is not None) == ("日本", True)
    rows = store._read("SELECT conversation, name, launch_name FROM conversations ORDER BY conversation")
    assert rows[:2] == [("c-s1", "möller", "möller"), ("c-s2", "müller", "müller")]
    assert rows[5] == ("c-s6", "chosen", "한국")
    assert store.queries.inbox("müller", 9)[0].text == "for m-ller"
    store.close()


@pytest.mark.spec("NAME-14")
@pytest.mark.parametrize("seed", range(20))
def test_no_old_database_is_left_behind_and_no_mail_is_lost(home: Path, seed: int) -> None:
    chance = random.Random(seed)
    folders = ["Möller", "Müller", "Mu\u0308ller", "日本", "🎉", "ｂａｃｋ", "web", "agent", "проект-b", "user", "..."]
    path = Path(prepare_home(home))
    taken: set[str] = set()
    peers: list[tuple[str, str, str, str, int | None]] = []
    from agentbus.core.upgrade import _folder_name_5

    for number in range(chance.randint(1, 12)):
        folder = f"/{chance.choice('ab')}/{chance.choice(folders)}"
        launch = chance.choice([_folder_name_5(folder), "asked"])
        name = names.numbered_name(launch, chance.randint(2, 4)) if chance.random() < 0.5 else launch
        left = None if name not in taken and chance.random() < 0.4 else number
        if left is None:
            taken.add(name)
        peers.append((f"s{number}", name, launch, folder, left))
    mail = {name: name for name in {one[1] for one in peers}}
    old_database(path, *peers, mail=mail)
    store = Store(path, busy_ms=0)
    assert sorted(one.text for one in store.queries.after(0, 99)) == sorted(mail)
    for found in (*store.queries.waiting(), *(peer.name for peer in store.present())):
        assert names.normalise_name(found) == found
    assert len(store.present()) == len(taken)
    store.close()
