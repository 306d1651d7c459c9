from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from agentbus.core import peers as peers_module
from agentbus.core import process
from agentbus.core import store as store_module
from agentbus.core.bus import Bus
from agentbus.core.config import prepare_home
from agentbus.core.database import SCHEMA
from agentbus.core.errors import BrokenSetup, InvalidRequest, MailboxFull, Refused
from agentbus.core.model import Peer, Renamed
from agentbus.core.peers import SESSIONS_KEPT_MS
from agentbus.core.presence import BEAT, Held
from agentbus.core.process import Life, Process, current, parent
from agentbus.core.queries import ELSEWHERE
from agentbus.core.store import Store
from tests.support.fakes import FakeTrigger, arrival

DEAD = Process(2**22 + 1, "0")
HOST_2 = Process(1, "another host")


class Bench:
    """A store on a real file; `dead` says which processes do not live."""

    def __init__(self, path: Path) -> None:
        # Hosts that have ended. Whether a peer lives its real lock says.
        self.dead: set[Process] = set()
        self.held: dict[str, Held] = {}
        self.store = Store(
            path,
            busy_ms=1_000,
            host_life=lambda host, _domain: Life.ENDED if host in self.dead else Life.LIVES,
            max_pending=5,
        )

    def claim(
        self,
        name: str,
        *,
        now: int = 0,
        crowd: bool = True,
        again: Peer | None = None,
        held: Held | None = None,
        **changes,
    ) -> Peer:
        changes.setdefault("domain", self.store.here)
        claimed = self.store.claim(
            arrival(name, **changes), now=now, endpoint=str, join_crowd=crowd, again=again, held=held
        )
        assert claimed is not None
        if claimed[2] is not None:
            self.held[claimed[0].session] = claimed[2]
        return claimed[0]

    def kill(self, peer: Peer) -> None:
        """End its process: the kernel drops the lock, and the file stays."""
        self.held.pop(peer.session)._close()

    def leave(self, peer: Peer, *, now: int) -> None:
        self.store.leave(peer.session, peer.process.pid, now=now)
        self.held.pop(peer.session).release()

    def lose_locks(self) -> None:
        """Be on a file system that cannot lock."""
        self.store.presence.hold = lambda _session: None  # type: ignore[method-assign]

    def pending(self, peer: Peer) -> list[str]:
        return [one.text for one in self.store.pending(peer.session, peer.process.pid, 100)]


@pytest.fixture
def bench(home: Path) -> Iterator[Bench]:
    bench = Bench(Path(prepare_home(home)))
    yield bench
    bench.store.close()


@pytest.mark.spec("SEND-1", "SEND-2", "BODY-2")
def test_a_message_waits_under_a_growing_id_and_reads_back_unchanged(bench: Bench) -> None:
    bodies = ["x", "\u202e\x1b\r\n</channel>", "日本" * 1_000]
    ids = [bench.store.send("alice", "bob", body, now=5, reply_to=None)[0] for body in bodies]
    assert ids == sorted(set(ids))
    bob = bench.claim("bob")
    found = bench.store.pending(bob.session, bob.process.pid, 100)
    assert [(one.id, one.text) for one in found] == list(zip(ids, bodies, strict=True))
    assert {(one.sender, one.recipient, one.sent_at, one.reply_to) for one in found} == {("alice", "bob", 5, None)}


def test_what_each_message_runs_is_compiled_once(bench: Bench) -> None:
    """SQLite asks the authorizer while it compiles a statement; it took longer to compile the read than to run it."""
    bob = bench.claim("bob")
    compiled: list[tuple[object, ...]] = []

    def note(*what: object) -> int:
        compiled.append(what)
        return apsw.SQLITE_OK

    def message(text: str, now: int) -> None:
        row_id, _ = bench.store.send("alice", "bob", text, now=now)
        assert bench.pending(bob) == [text]
        bench.store.mark_delivered([row_id], session=bob.session, carrier="c", now=now)
        assert bench.store.unread(bob.session, bob.process.pid, now) != []
        bench.store.mark_read([row_id], session=bob.session, now=now)

    bench.store._database._connection.authorizer = note
    message("first", 5)
    assert compiled
    compiled.clear()
    message("another", 6)
    assert compiled == []


@pytest.mark.spec("SEND-2", "STATE-4")
def test_a_pruned_id_is_never_used_again(bench: Bench) -> None:
    first, _ = bench.store.send("alice", "bob", "old", now=0)
    bench.store.mark_delivered([first], session="s", carrier="c", now=10)
    assert bench.store.prune(10, 100) == 0
    assert bench.store.prune(11, 100) == 1
    second, _ = bench.store.send("alice", "bob", "new", now=0)
    assert second > first


@pytest.mark.spec("STATE-4")
def test_pending_messages_are_never_pruned(bench: Bench) -> None:
    bench.store.send("alice", "bob", "waits", now=0)
    assert bench.store.prune(2**60, 100) == 0
    assert bench.store.queries.waiting() == {"bob": 1}


@pytest.mark.spec("STATE-1", "STATE-2")
def test_a_mark_changes_only_pending_messages(bench: Bench) -> None:
    row_id, _ = bench.store.send("alice", "bob", "x", now=0)
    bench.store.mark_delivered([row_id], session="first", carrier="channel", now=10)
    bench.store.mark_delivered([row_id, 999], session="second", carrier="pull", now=20)
    rows = bench.store._read("SELECT delivered_at, carrier, delivered_to, read_at FROM messages")
    assert rows == [(10, "channel", "first", None)]


@pytest.mark.spec("SEND-3")
def test_a_full_mailbox_refuses_one_more_and_takes_again_when_drained(bench: Bench) -> None:
    ids = [bench.store.send("alice", "bob", "x", now=0)[0] for _ in range(5)]
    with pytest.raises(MailboxFull, match='mailbox "bob" is full, 5 messages are pending'):
        bench.store.send("alice", "bob", "x", now=0)
    assert bench.store.queries.waiting() == {"bob": 5}
    bench.store.mark_delivered(ids[:1], session="s", carrier="c", now=0)
    bench.store.send("alice", "bob", "x", now=0)


@pytest.mark.spec("SEND-4")
def test_a_broadcast_reaches_all_or_nobody(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        bench.claim(name)
    assert [to.mailbox for _, to in bench.store.broadcast("a", "x", now=0)] == ["b", "c"]
    for _ in range(4):
        bench.store.send("a", "c", "x", now=0)
    with pytest.raises(MailboxFull):
        bench.store.broadcast("a", "x", now=0)
    assert bench.store.queries.waiting() == {"b": 1, "c": 5}


@pytest.mark.spec("NAME-4")
def test_a_name_in_use_gets_a_number_and_its_holder_is_told_of(bench: Bench) -> None:
    first = bench.claim("web")
    claimed = bench.store.claim(arrival("web"), now=0, endpoint=str, join_crowd=True)
    assert claimed is not None
    assert (claimed[0].name, claimed[1]) == ("web-2", first)
    assert bench.claim("web").name == "web-3"
    assert len({peer.session for peer in bench.store.present()}) == 3


@pytest.mark.spec("NAME-7")
def test_the_same_host_and_launch_name_is_the_same_session(bench: Bench) -> None:
    old = bench.claim("web")
    bench.store.rename(old.session, old.process.pid, "shop")
    bench.leave(old, now=5)
    new = bench.claim("web", process=Process(7, "later"))
    assert (new.session, new.name, new.endpoint) == (old.session, "shop", old.endpoint)
    row_id, address = bench.store.send("alice", "web", "to the alias", now=0)
    assert row_id
    assert address.mailbox == "shop"


@pytest.mark.spec("NAME-7")
def test_a_predecessor_that_runs_is_not_taken_over(bench: Bench) -> None:
    old = bench.claim("web", host=HOST_2)
    later = {"host": HOST_2, "process": Process(7, "later")}
    assert bench.store.claim(arrival("web", **later), now=0, endpoint=str, join_crowd=False) is None
    assert bench.store.present() == [old]
    bench.kill(old)
    assert bench.claim("web", crowd=False, **later).session == old.session


@pytest.mark.spec("NAME-7")
def test_another_host_or_launch_name_is_another_session(bench: Bench) -> None:
    old = bench.claim("web")
    bench.leave(old, now=5)
    assert bench.claim("web", host=HOST_2).session != old.session
    assert bench.claim("api").session != old.session


@pytest.mark.spec("NAME-5")
def test_a_rename_moves_what_is_pending_and_leaves_an_alias(bench: Bench) -> None:
    web = bench.claim("web")
    bench.store.send("alice", "web", "before", now=0)
    bench.store.send("alice", "shop", "was waiting there", now=0)
    assert bench.store.rename(web.session, web.process.pid, "shop") == Renamed("shop", "web", kept=1)
    bench.store.send("alice", "web", "to the old name", now=0)
    bench.store.send("alice", "shop", "to the new name", now=0)
    assert bench.pending(web) == ["before", "to the old name", "to the new name"]


@pytest.mark.spec("NAME-5")
def test_a_rename_to_a_name_in_use_is_refused_and_changes_nothing(bench: Bench) -> None:
    web = bench.claim("web")
    bench.claim("api", cwd="/src/api")
    with pytest.raises(Refused, match=r'the name "api" is held by the session in /src/api \(process \d+\)'):
        bench.store.rename(web.session, web.process.pid, "api")
    assert [peer.name for peer in bench.store.present()] == ["api", "web"]


@pytest.mark.spec("NAME-6")
def test_whoever_claims_a_name_ends_the_alias(bench: Bench) -> None:
    web = bench.claim("web")
    bench.store.rename(web.session, web.process.pid, "shop")
    newcomer = bench.claim("web", host=HOST_2)
    assert newcomer.name == "web"
    bench.store.send("alice", "web", "for the newcomer", now=0)
    assert (bench.pending(newcomer), bench.pending(web)) == (["for the newcomer"], [])
    bench.leave(newcomer, now=1)
    assert bench.store.send("alice", "web", "the newcomer's, gone or not", now=0)[1].mailbox == "web"


@pytest.mark.spec("NAME-6")
def test_renaming_back_and_forth_leaves_no_loop(bench: Bench) -> None:
    web = bench.claim("web")
    for name in ("shop", "web", "shop", "web"):
        bench.store.rename(web.session, web.process.pid, name)
    bench.store.send("alice", "shop", "1", now=0)
    bench.store.send("alice", "web", "2", now=0)
    assert bench.pending(web) == ["1", "2"]


@pytest.mark.spec("NAME-6")
def test_an_alias_lives_while_the_host_does(bench: Bench) -> None:
    web = bench.claim("web", host=HOST_2)
    bench.store.rename(web.session, web.process.pid, "shop")
    bench.leave(web, now=5)
    assert bench.store.send("alice", "web", "x", now=0)[1].mailbox == "shop"
    bench.dead.add(HOST_2)
    assert bench.store.send("alice", "web", "x", now=0)[1].mailbox == "web"
    bench.store.reap(now=10)
    assert bench.store._read("SELECT count(*) FROM aliases") == [(0,)]


@pytest.mark.spec("PRES-2")
def test_the_dead_are_reaped_and_keep_their_mail(bench: Bench) -> None:
    web = bench.claim("web")
    bench.claim("api")
    bench.store.send("alice", "web", "x", now=0)
    assert bench.store.reap(now=1) == []
    bench.kill(web)
    assert [peer.name for peer in bench.store.live()] == ["api"]
    assert [peer.name for peer in bench.store.reap(now=1)] == ["web"]
    assert [peer.name for peer in bench.store.present()] == ["api"]
    assert bench.store.queries.waiting() == {"web": 1}
    assert bench.pending(web) == []
    assert not (bench.store.presence.folder / web.session).exists()


@pytest.mark.spec("PRES-1", "PRES-2")
def test_no_clock_ends_a_peer_that_holds_its_lock(bench: Bench) -> None:
    bench.claim("web")
    assert bench.store.reap(now=10**15) == []
    assert bench.store.reap(now=-(10**15)) == []
    newcomer = bench.claim("web", host=HOST_2, now=10**15)
    assert newcomer.name == "web-2"


@pytest.mark.spec("PRES-3", "DRAIN-1")
def test_the_silent_are_reaped_drain_nothing_and_come_back(bench: Bench) -> None:
    bench.lose_locks()
    web = bench.claim("web")
    assert web.presence == BEAT
    assert bench.store.reap(now=10**15) == [], "who looks once ends nobody"
    assert [peer.name for peer in bench.store.reap(now=1, silent={web.session})] == ["web"]
    bench.store.send("alice", "web", "x", now=0)
    assert bench.pending(web) == []
    assert not bench.store.is_present(web.session, web.process.pid)
    back = bench.claim("web", now=60_000, again=web)
    assert (back.session, back.name) == (web.session, "web")
    assert bench.pending(back) == ["x"]


@pytest.mark.spec("PRES-3")
def test_who_comes_back_to_a_taken_name_gets_a_number(bench: Bench) -> None:
    bench.lose_locks()
    web = bench.claim("web")
    bench.store.reap(now=1, silent={web.session})
    newcomer = bench.claim("web", host=HOST_2, now=2)
    back = bench.claim("web", now=3, again=web)
    assert (newcomer.name, back.name, back.session) == ("web", "web-2", web.session)


@pytest.mark.spec("PRES-3", "STORE-7")
def test_two_live_processes_of_one_session_do_not_evict_each_other(bench: Bench) -> None:
    bench.lose_locks()
    other = parent()  # any other that lives
    first = bench.claim("web", process=current())
    bench.store.reap(now=1, silent={first.session})
    second = bench.claim("web", crowd=False, process=other)
    assert second.session == first.session
    back = bench.claim("web", again=first, process=current())
    assert back.session != second.session
    assert bench.store.is_present(second.session, other.pid)
    assert {peer.name for peer in bench.store.present()} == {"web", "web-2"}
    again = bench.claim("web", again=second, process=other)
    assert (again.session, again.name) == (second.session, "web")


@pytest.mark.spec("STORE-7", "NAME-4")
def test_a_row_of_the_sessions_own_is_its_own(bench: Bench) -> None:
    """As in a backup that is put back: it holds the very row of the session that joins it."""
    web = bench.claim("web")
    assert bench.claim("web", again=web, held=bench.held[web.session]).name == "web"
    bench.store._database._connection.execute("UPDATE peers SET pid = 99999, left_at = NULL")
    assert bench.claim("web", again=web, held=bench.held[web.session]).name == "web"


@pytest.mark.spec("NAME-7")
def test_an_agent_process_that_cannot_be_seen_has_no_predecessor(bench: Bench) -> None:
    """In a container started with `docker run -i`, the parent's pid is 0, for every server there."""
    nobody = Process(0, "")
    first = bench.claim("web", host=nobody, crowd=False)
    second = bench.claim("web", host=nobody, crowd=False)
    assert (first.name, second.name) == ("web", "web-2")
    bench.leave(first, now=1)
    assert bench.claim("web", host=nobody, crowd=False).session != first.session


@pytest.mark.spec("PRES-1", "NAME-7")
def test_pids_of_another_domain_mean_nothing_here(bench: Bench) -> None:
    old = bench.claim("web", host=HOST_2, domain="there")
    bench.leave(old, now=1)
    assert bench.claim("web", host=HOST_2, domain="here", crowd=False).session != old.session
    assert bench.claim("web", host=HOST_2, domain="there", crowd=False).session == old.session


@pytest.mark.spec("LEDGER-3")
def test_a_session_that_has_left_is_remembered_for_thirty_days(bench: Bench) -> None:
    web = bench.claim("web", cwd="/src/web")
    bench.leave(web, now=1_000)
    bench.store.reap(now=SESSIONS_KEPT_MS)
    assert bench.store.queries.session(web.session) == ("web", "test", "/src/web")
    bench.store.reap(now=1_001 + SESSIONS_KEPT_MS)
    assert bench.store.queries.session(web.session) is None


def test_coming_back_takes_nobody_elses_session(bench: Bench) -> None:
    first = bench.claim("web")
    second = bench.claim("web", process=Process(8, "x"))
    bench.leave(second, now=1)
    bench.leave(first, now=1)
    assert bench.claim("web", again=second).session == second.session
    unseen = replace(second, session="unseen", name="kept")
    back = bench.claim("web", again=unseen)
    assert (back.session, back.name) == ("unseen", "kept")


def test_a_session_of_the_nearest_ancestor(bench: Bench) -> None:
    bench.claim("web", host=HOST_2)
    bench.claim("api", host=current())
    bus = Bus(bench.store, {}, max_bytes=100)
    names = [bus.sender_among(hosts) for hosts in ([DEAD, HOST_2, current()], [current(), HOST_2])]
    assert [peer and peer.name for peer in names] == ["web", "api"]
    assert bus.sender_among([DEAD]) is None
    bench.claim("third", host=HOST_2)
    assert bus.sender_among([HOST_2, current()]) is None, "who of two runs the command is not known"


def test_two_connections_see_the_same_bus(bench: Bench) -> None:
    other = Store(bench.store.path, busy_ms=1_000)
    try:
        bob = bench.claim("bob")
        other.send("alice", "bob", "x", now=0)
        assert bench.pending(bob) == ["x"]
    finally:
        other.close()


@pytest.mark.spec("DRAIN-1", "READ-1", "NAME-5", "PRES-3")
def test_a_session_is_touched_by_its_own_process_alone(bench: Bench) -> None:
    """Its predecessor, in another process, may still be about to leave, to rename, to read."""
    web = bench.claim("web")
    row_id, _ = bench.store.send("alice", "web", "x", now=0)
    other = web.process.pid + 1
    assert bench.store.pending(web.session, other, 10) == []
    assert bench.store.unread(web.session, other, 10) == []
    assert bench.store.count_unread(web.session, other, 10) == 0
    assert not bench.store.is_present(web.session, other)
    with pytest.raises(Refused):
        bench.store.rename(web.session, other, "shop")
    bench.store.beat(web.session, other, now=5)
    bench.store.leave(web.session, other, now=5)
    assert bench.store.present() == [web]
    assert [one.id for one in bench.store.pending(web.session, web.process.pid, 10)] == [row_id]
    bench.store.leave(web.session, web.process.pid, now=5)
    assert bench.store.pending(web.session, web.process.pid, 10) == [], "who has left drains nothing"
    assert bench.store.unread(web.session, web.process.pid, 10) == []


@pytest.mark.spec("PRES-1", "PRES-2")
def test_where_nothing_can_be_locked_a_socket_that_refuses_is_a_dead_peer(bench: Bench) -> None:
    bench.lose_locks()
    web = bench.claim("web", domain="elsewhere", trigger="fake")
    trigger = FakeTrigger()
    bus = Bus(bench.store, {"fake": trigger}, max_bytes=100)
    assert bench.store.life(web) is Life.UNKNOWN
    assert [peer.name for peer in bus.peers()] == ["web"]
    trigger.dead.add(web.endpoint)
    assert bench.store.life(web) is Life.ENDED
    assert bus.peers() == []
    assert [peer.name for peer in bus.reap()] == ["web"]
    assert trigger.dead == set(), "and what it left is removed"


@pytest.mark.spec("PRES-1")
def test_a_socket_that_refuses_ends_nobody_that_holds_its_lock(bench: Bench) -> None:
    web = bench.claim("web", trigger="fake")
    trigger = FakeTrigger()
    bus = Bus(bench.store, {"fake": trigger}, max_bytes=100)
    trigger.dead.add(web.endpoint)
    assert bus.send("alice", "web", "x").is_online
    assert bus.reap() == []
    assert trigger.dead == {web.endpoint}, "what a lock holder owns is removed by nobody"


@pytest.mark.spec("NAME-8")
def test_two_conversations_that_end_and_come_back_in_the_other_order_keep_name_and_mail(bench: Bench) -> None:
    one, two = (bench.claim("web", host=Process(n, "x"), conversation=c) for n, c in ((3, "one"), (4, "two")))
    assert (one.name, two.name) == ("web", "web-2")
    for peer in (one, two):
        bench.leave(peer, now=1)
        bench.store.send("ci", peer.name, f"for {peer.name}", now=2)
    back = [bench.claim("web", host=Process(n, "x"), conversation=c) for n, c in ((5, "two"), (6, "one"))]
    assert [peer.name for peer in back] == ["web-2", "web"]
    assert [bench.pending(peer) for peer in back] == [["for web-2"], ["for web"]]


@pytest.mark.spec("NAME-8")
def test_a_name_given_by_a_rename_outlives_a_restart_unless_another_is_asked_for(bench: Bench) -> None:
    web = bench.claim("web", host=Process(3, "x"), conversation="one")
    bench.store.rename(web.session, web.process.pid, "shop")
    bench.leave(web, now=1)
    bench.store.send("ci", "shop", "waits", now=2)
    back = bench.claim("web", host=Process(4, "x"), conversation="one")
    assert (back.name, bench.pending(back)) == ("shop", ["waits"])
    bench.leave(back, now=3)
    claimed = bench.store.claim(
        arrival("api", host=Process(5, "x"), conversation="one"), now=4, endpoint=str, join_crowd=True
    )
    assert claimed is not None
    assert (claimed[0].name, claimed[3]) == (
        "api",
        'this conversation was "shop" before; set_name takes that name back',
    )


@pytest.mark.spec("NAME-8")
def test_a_conversation_that_is_open_twice_is_two_sessions_and_the_second_is_told(bench: Bench) -> None:
    bench.claim("web", host=Process(2, "x"))
    first = bench.claim("web", host=Process(3, "x"), conversation="one", cwd="/src/web")
    second = bench.store.claim(
        arrival("web", host=Process(4, "x"), conversation="one"), now=1, endpoint=str, join_crowd=True
    )
    assert second is not None
    assert (first.name, second[0].name, second[1]) == ("web-2", "web-3", first)
    assert second[0].session != first.session
    assert second[3] == 'this conversation was "web-2" before, as the session in /src/web is now'


@pytest.mark.spec("NAME-8")
def test_a_process_that_turns_to_another_conversation_keeps_its_name_for_both(bench: Bench) -> None:
    web = bench.claim("web", host=Process(3, "x"), conversation="one")
    bench.store.rename(web.session, web.process.pid, "shop")
    bench.store.turn_to(web.session, web.process.pid, "cleared", now=1)
    bench.leave(web, now=2)
    other = bench.claim("api", host=Process(5, "x"), conversation="two")
    bench.store.turn_to(other.session, other.process.pid, "one", now=2)
    bench.leave(other, now=2)
    for conversation in ("cleared", "one"):
        back = bench.claim("web", host=Process(4, conversation), conversation=conversation)
        assert back.name == "shop"
        bench.leave(back, now=3)


@pytest.mark.spec("NAME-8")
def test_a_conversation_is_forgotten_when_it_was_away_for_long_and_not_before(bench: Bench) -> None:
    web = bench.claim("web", host=Process(3, "x"), conversation="one")
    bench.store.rename(web.session, web.process.pid, "shop")
    bench.store.forget_conversations(1_000)
    bench.leave(web, now=1_000)
    bench.store.forget_conversations(1_000)
    again = bench.claim("web", host=Process(4, "x"), conversation="one", now=1_000)
    assert again.name == "shop"
    bench.kill(again)
    bench.store.reap(now=2_000)
    bench.store.forget_conversations(2_001)
    assert bench.claim("web", host=Process(5, "x"), conversation="one").name == "web"


@pytest.mark.spec("NAME-9")
def test_a_default_name_is_not_taken_with_the_mail_of_another_folder(bench: Bench) -> None:
    there = {"cwd": "/a/web", "is_asked": False}
    bench.leave(bench.claim("web", host=Process(3, "x"), **there), now=1)
    assert bench.claim("web", host=Process(8, "x"), cwd="/c/web", is_asked=False).name == "web", "no mail waits"
    bench.leave(bench.store.present()[0], now=2)
    bench.leave(bench.claim("web", host=Process(4, "x"), **there), now=3)
    bench.store.send("ci", "web", "for /a/web", now=4)
    claimed = bench.store.claim(
        arrival("web", host=Process(5, "x"), cwd="/b", folder="/b/web", is_asked=False),
        now=5,
        endpoint=str,
        join_crowd=True,
    )
    assert claimed is not None
    assert (claimed[0].name, claimed[1]) == ("web-2", None)
    assert claimed[3].startswith('mail waits under "web" for a session of /a/web; a start with AGENTBUS_NAME=web takes')
    assert bench.pending(bench.claim("web", host=Process(6, "x"), **there)) == ["for /a/web"]


@pytest.mark.spec("NAME-9")
def test_a_name_that_was_asked_for_is_taken_with_its_mail(bench: Bench) -> None:
    bench.leave(bench.claim("web", host=Process(3, "x"), cwd="/a/web"), now=1)
    bench.store.send("ci", "web", "waits", now=2)
    assert bench.pending(bench.claim("web", host=Process(4, "x"), cwd="/b/web")) == ["waits"]


@pytest.mark.spec("BODY-2", "STORE-10")
def test_a_long_text_is_written_once_and_not_with_every_mark(home: Path) -> None:
    pages: list[int] = []
    store = Store(prepare_home(home), busy_ms=0, on_wal=pages.append)
    texts = ["x" * 3_000, "é" * 1_501, "y" * 1_000_000, ELSEWHERE]
    ids = [store.send("alice", "bob", text, now=1)[0] for text in texts]
    before = pages[-1]
    store.mark_delivered(ids, session="s", carrier="c", now=2)
    store.mark_read(ids, session="s", now=3)
    assert pages[-1] - before < 20, "the long one alone has 245 pages"
    assert [one.text for one in store.queries.newest_first()] == texts[::-1]
    assert store.discard("bob", 2**60) == []
    again, _ = store.send("alice", "bob", "z" * 5_000, now=4)
    assert [one.text for one in store.discard("bob", 2**60)] == ["z" * 5_000]
    assert store.prune(10, 100) == 4
    assert store._read("SELECT count(*) FROM bodies") == [(0,)], f"nor is the text of #{again} left"
    store.close()


@pytest.mark.spec("VOID-1", "READ-1")
def test_counting_and_taking_unread_mail_is_bounded_work(bench: Bench) -> None:
    """Counts the steps of SQLite's virtual machine, not the time."""
    bob = bench.claim("bob")

    def steps(count: int) -> list[int]:
        with bench.store._writing() as execute:
            execute("DELETE FROM messages")
            execute(
                "WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
                " INSERT INTO messages (sender, recipient, body, sent_at, delivered_at, carrier, delivered_to)"
                " SELECT 'a', 'bob', 'x', 1, 1, 'c', ? FROM n",
                (count, bob.session),
            )
        taken = []
        for look in (
            lambda: bench.store.count_unread(bob.session, bob.process.pid, 100),
            lambda: len(bench.store.unread(bob.session, bob.process.pid, 100)),
            lambda: len(bench.store.unread(bob.session, bob.process.pid, 100, held=50)),
        ):
            seen = [0]

            def step(seen: list[int] = seen) -> bool:
                seen[0] += 1
                return False

            bench.store._database._connection.set_progress_handler(step, 10)
            assert look() == 100
            bench.store._database._connection.set_progress_handler(None)
            taken.append(seen[0])
        return taken

    few = steps(200)
    assert all(many < 2 * before for many, before in zip(steps(20_000), few, strict=True))


@pytest.mark.spec("PRES-1")
def test_where_only_ps_tells_it_is_run_once_for_all_and_outside_of_any_transaction(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the code for systems without /proc on this system."""
    bench.lose_locks()
    bench.store._host_life = bench.store._judge_host
    for number in range(5):
        bench.claim(f"peer-{number}")
    left = bench.claim("old")
    bench.store.rename(left.session, left.process.pid, "new")
    bench.store.leave(left.session, left.process.pid, now=1)
    ran: list[bool] = []
    ps = process._ps

    def counted(*arguments: str) -> str:
        ran.append(bench.store._database._connection.in_transaction)
        return ps(*arguments)

    monkeypatch.setattr(process, "_ps", counted)
    monkeypatch.setattr(process, "_HAS_PROC", False)
    for module in (store_module, peers_module):
        monkeypatch.setattr(module, "IS_SLOW", True)
    me = bench.store.here
    for deed in (
        lambda: bench.store.live(),
        lambda: bench.store.send("ci", "old", "x", now=2),
        lambda: bench.store.broadcast("ci", "x", now=3),
        lambda: bench.store.reap(now=4),
        lambda: bench.store.claim(arrival("api", domain=me), now=5, endpoint=str, join_crowd=True),
    ):
        ran.clear()
        deed()
        assert ran == [False]


@pytest.mark.spec("THREAD-1")
def test_every_message_belongs_to_a_thread_that_outlives_its_first_message(bench: Bench) -> None:
    send = bench.store.send
    first, _ = send("alice", "bob", "which port?", now=1)
    second, _ = send("bob", "alice", "which service?", now=2, reply_to=first)
    other, _ = send("bob", "alice", "by the way", now=3)
    threads = {one.id: one.root for one in bench.store.queries.newest_first()}
    assert threads == {first: first, second: first, other: other}
    with bench.store._writing() as execute:
        execute("DELETE FROM messages WHERE id = ?", (first,))
    third, _ = send("alice", "bob", "the api", now=4, reply_to=second)
    assert [one.id for one in bench.store.queries.thread(first)] == [third, second]
    assert bench.store.queries.status(third).thread == first


@pytest.mark.spec("THREAD-1")
def test_the_thread_of_a_reply_from_before_is_found_by_its_chain(bench: Bench) -> None:
    ids = [bench.store.send("alice", "bob", f"{number}", now=1)[0] for number in range(4)]
    with bench.store._writing() as execute:
        for before, after in itertools.pairwise(ids):
            execute("UPDATE messages SET reply_to = ? WHERE id = ?", (before, after))
        execute("UPDATE messages SET reply_to = ? WHERE id = ?", (ids[3], ids[0]))  # a circle ends the chain
    new, _ = bench.store.send("bob", "alice", "new", now=2, reply_to=ids[2])
    assert {one.root for one in bench.store.queries.newest_first()} == {ids[0]}
    assert [one.id for one in bench.store.queries.thread(ids[0])] == [new, *reversed(ids)]


@pytest.mark.spec("THREAD-2")
def test_a_reply_to_what_its_sender_neither_sent_nor_received_is_refused(bench: Bench) -> None:
    alice, bob = bench.claim("alice"), bench.claim("bob")
    send = bench.store.send
    row_id, _ = send("alice", "bob", "hi", now=1, sender_session=alice.session)
    for sender, answered, named in (
        ("carol", row_id, f'"carol" neither sent nor received #{row_id}'),
        ("bob", row_id + 1, f"there is no message #{row_id + 1} to answer, it was never sent, or it has been pruned"),
    ):
        with pytest.raises(InvalidRequest, match=named):
            send(sender, "alice", "no", now=2, reply_to=answered)
    assert bench.store.queries.newest_id() == row_id, "nothing was sent"
    # By the name, by the session that had another name then, by another session of the conversation.
    bench.store.mark_delivered([row_id], session=bob.session, carrier="fake", now=3)
    assert send("bob", "alice", "yes", now=4, reply_to=row_id)
    assert send("alice", "bob", "and", now=4, reply_to=row_id)
    bench.store.rename(bob.session, bob.process.pid, "robert")
    assert send("robert", "alice", "yes", now=5, reply_to=row_id, sender_session=bob.session)
    again = bench.claim("bob-2")
    with pytest.raises(InvalidRequest):
        send("bob-2", "alice", "no", now=6, reply_to=row_id, sender_session=again.session)
    with bench.store._writing() as execute:
        execute("UPDATE peers SET conversation = 'one' WHERE session IN (?, ?)", (bob.session, again.session))
    assert send("bob-2", "alice", "yes", now=7, reply_to=row_id, sender_session=again.session)


@pytest.mark.spec("STORE-9")
def test_mail_that_waits_is_not_handed_out_by_the_rules_of_an_older_program(bench: Bench) -> None:
    web = bench.claim("web")
    bench.store.send("alice", "web", "x", now=1)
    newer = apsw.Connection(str(bench.store.path))
    newer.execute(f"PRAGMA user_version = {SCHEMA + 1}; UPDATE bus SET oldest = {SCHEMA}")
    assert bench.pending(web) == ["x"], "the newer program says that this one can go on"
    newer.execute(f"UPDATE bus SET oldest = {SCHEMA + 1}")
    newer.close()
    for read in (
        lambda: bench.pending(web),
        lambda: bench.store.due(web.session, web.process.pid, 10, 0, now=0),
    ):
        with pytest.raises(BrokenSetup, match="was upgraded while this session ran"):
            read()


@pytest.mark.spec("PRES-6", "STATE-6")
def test_what_ended_before_a_restart_of_the_machine_keeps_nobody_reading(bench: Bench) -> None:
    assert not bench.store.waits_for_an_end()
    for number, (domain, waits) in enumerate((("boot-before pid:[1]", False), ("", False), (bench.store.here, True))):
        ended = bench.claim(f"ended{number}", domain=domain, host=Process(40 + number, "x"))
        bench.store.set_proof(ended.session, "a record")
        bench.store.leave(ended.session, ended.process.pid, now=1)
        assert bench.store.waits_for_an_end() is waits, domain
