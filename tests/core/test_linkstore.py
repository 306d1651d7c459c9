from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentbus.core.bus import Bus
from agentbus.core.config import prepare_home
from agentbus.core.errors import InvalidRequest, MailboxFull, Refused
from agentbus.core.linkstore import ARRIVED, DELIVERED, READ, REFUSED, UNKNOWN, Incoming, LinkStore, Report, digest
from agentbus.core.machines import FarPeer, Machine
from agentbus.core.model import MessageState
from agentbus.core.names import LINK_NAME
from agentbus.core.store import Store
from tests.support.fakes import arrival

BUS = "0123456789abcdef"


@pytest.fixture
def store(home: Path) -> Iterator[LinkStore]:
    store = LinkStore(prepare_home(home), busy_ms=0)
    store.begin("alpha")
    yield store
    store.close()


@pytest.fixture
def bus(store: LinkStore) -> Bus:
    return Bus(store, {}, max_bytes=65_536, clock=lambda: 1_000_000)


def machine(name: str = "beta", **changes: Any) -> Machine:
    fields: dict[str, Any] = {
        "name": name,
        "bus": BUS,
        "version": 1,
        "seen_at": 990_000,
        "gone_at": None,
        "skew_ms": 0,
        "peers": (FarPeer("backend", "claude", "channel"),),
        **changes,
    }
    return Machine(**fields)


def incoming(number: int = 7, text: str = "hello", **changes: Any) -> Incoming:
    fields: dict[str, Any] = {
        "machine": "beta",
        "bus": BUS,
        "id": number,
        "sender": "backend",
        "to": "frontend",
        "text": text,
        "sent_at": 5,
        "answers": None,
        "digest": digest("backend", "frontend@alpha", text, 5),
        **changes,
    }
    return Incoming(**fields)


def report(store: LinkStore, row_id: int, state: int, note: str = "channel", **changes: Any) -> Report:
    one = store.queries.status(row_id)
    known = digest(one.sender, one.recipient, one.text, one.sent_at)
    return replace(Report(store.identity(), row_id, state, known, note), **changes)


@pytest.mark.spec("ADDR-1")
def test_an_address_has_one_form_and_the_own_machine_none(bus: Bus) -> None:
    assert bus.address(" Back End@Beta ") == "back-end@beta"
    assert bus.address("back@alpha") == "back"
    assert bus.address("back") == "back"
    for bad in ("a@b@c", "back@", "@beta", "back@b.c", "back@über", "all@beta", "*@beta", f"x@{'b' * 33}"):
        with pytest.raises(InvalidRequest):
            bus.address(bad)


@pytest.mark.spec("ADDR-1")
def test_without_a_link_an_at_sign_stands_in_no_name(bus: Bus, store: LinkStore) -> None:
    store.leave_mesh()
    with pytest.raises(InvalidRequest, match='"back@beta" is not a name'):
        bus.send("ci", "back@beta", "x")


@pytest.mark.spec("ADDR-2")
def test_a_send_says_what_is_known_there(bus: Bus, store: LinkStore) -> None:
    def said(to: str) -> str:
        return str(bus.send("ci", to, "x")).split(": ", 1)[-1]

    assert said("backend@beta") == "the link is not running: agentbus link run"
    where = store.machines.whereabouts

    def far(to: str) -> tuple[bool, str]:
        return where(to, is_linked=True, now=1_000_000)

    # Without a connection it cannot be told whether there is such a machine.
    assert far("x@beta") == (False, "this machine is not connected (yet)")
    store.connected({"server": "nats.example.net", "since": "1"})
    assert far("x@beta") == (False, "no machine of that name was ever heard of")
    store.disconnected("")
    store.note_machines([machine()])
    assert far("x@beat")[1] == 'no machine of that name was ever heard of. Did you mean "beta"?'
    assert far("backend@beta") == (False, "this machine is not connected (yet)")
    store.connected({"server": "nats.example.net", "since": "1"})
    assert far("backend@beta") == (True, "online there")
    assert far("backnd@beta")[1] == 'beta is there, and says of no peer of that name. Did you mean "backend@beta"?'
    store.note_machines([machine(gone_at=990_000)])
    assert far("backend@beta")[1] == "beta was last heard of 10 s ago; it is delivered when that machine is back"
    store.note_machines([machine(version=2)])
    assert "has a newer agentbus" in far("backend@beta")[1]
    store.note_machines([machine(peers=())])
    assert far("backend@beta")[1] == "beta is there, and says of no peer of that name"
    store.disconnected("the server is down")
    assert "the server is down" in far("backend@beta")[1]


@pytest.mark.spec("ADDR-2")
def test_a_name_that_only_one_machine_has_is_named_with_it(bus: Bus, store: LinkStore) -> None:
    store.claim(arrival(LINK_NAME), now=1, endpoint=str, join_crowd=True)
    store.note_machines([machine()])
    assert str(bus.send("ci", "backend", "x")).endswith('no such peer here. Did you mean "backend@beta" (online)?')
    store.note_machines([machine("gamma")])
    assert "Did you mean" not in str(bus.send("ci", "backend", "x"))


@pytest.mark.spec("ADDR-4", "SEND-3")
def test_a_mailbox_on_another_machine_is_full_here(home: Path) -> None:
    path = prepare_home(home)
    link = LinkStore(path, busy_ms=0)
    link.begin("alpha")
    link.close()
    store = Store(path, busy_ms=0, max_pending=2)
    for _ in range(2):
        store.send("ci", "x@beta", "x", now=0)
    with pytest.raises(MailboxFull):
        store.send("ci", "x@beta", "x", now=0)
    store.close()


@pytest.mark.spec("ADDR-5")
def test_what_has_left_is_not_taken_back_and_each_step_has_its_instant(bus: Bus, store: LinkStore) -> None:
    store.note_machines([machine()])
    first, second = bus.send("ci", "x@beta", "one").id, bus.send("ci", "x@beta", "two").id
    assert bus.cancel(second).text == "two"
    store.mark_relayed([first], sequence=3, now=2_000_000)
    assert store.machines.facts()["sequence"] == "3"
    with pytest.raises(Refused, match="has left this machine"):
        bus.cancel(first)
    store.confirm("beta", [report(store, first, ARRIVED)], now=3_000_000)
    said = str(store.queries.status(first))
    assert "on the way since 1970-01-01T00:33:20.000Z, arrived at beta 1970-01-01T00:50:00.000Z" in said
    store.confirm("beta", [report(store, first, READ)], now=4_000_000)
    status = store.queries.status(first)
    assert (status.state, status.carrier, status.read_by) == (MessageState.READ, "channel@beta", "receipt")
    # A receipt that comes late takes nothing back.
    store.confirm("beta", [report(store, first, DELIVERED), report(store, first, ARRIVED)], now=5_000_000)
    assert store.queries.status(first) == status


@pytest.mark.spec("LINK-2")
def test_only_what_is_for_a_machine_that_was_heard_of_leaves(bus: Bus, store: LinkStore) -> None:
    bus.send("ci", "here", "x")
    sent = bus.send("ci", "x@beta", "y" * 5_000)
    assert store.outbound(9) == []
    store.note_machines([machine()])
    (found,) = store.outbound(9)
    assert (found.id, found.text, found.bus) == (sent.id, "y" * 5_000, store.identity())
    store.refuse(sent.id, "by the server: too long")
    assert store.outbound(9) == []
    assert str(store.queries.status(sent.id)) == f'#{sent.id} from "ci" to "x@beta" is refused by the server: too long'


@pytest.mark.spec("LINK-3", "LINK-5")
def test_a_copy_is_known_and_another_message_under_its_name_too(store: LinkStore) -> None:
    _, reports = store.take_in([incoming(), incoming(), incoming(text="other")], now=9)
    assert [one.text for one in store.queries.inbox("frontend", 9)] == ["hello"]
    assert [(to, one.state) for to, one in reports] == [("beta", UNKNOWN)]
    ((row_id, to, one),) = store.unreported(9)
    assert (to, one.state, one.id) == ("beta", ARRIVED, 7)
    store.mark_reported([(row_id, ARRIVED)])
    assert store.unreported(9) == []
    store.take_in([incoming()], now=10)  # its receipt was lost: it is said again
    assert len(store.unreported(9)) == 1
    store.mark_read([row_id], session="s", now=11)
    assert [one.state for _, _, one in store.unreported(9)] == [READ]


@pytest.mark.spec("LINK-3")
def test_ids_of_another_machine_cannot_be_used_up(store: LinkStore) -> None:
    """Its name has the proven machine in it: nobody can take a name for another one's mail."""
    store.take_in([incoming(machine="gamma", text="mine is first")], now=9)
    store.take_in([incoming()], now=9)
    assert [one.text for one in store.queries.inbox("frontend", 9)] == ["mine is first", "hello"]


@pytest.mark.spec("LINK-3")
def test_a_copy_of_what_was_pruned_is_still_known(store: LinkStore) -> None:
    store.take_in([incoming()], now=9)
    store.discard("frontend", 100)
    _, reports = store.take_in([incoming()], now=10)
    assert [(one.state, one.id) for _, one in reports] == [(ARRIVED, 7)]
    assert store.queries.inbox("frontend", 9) == []
    assert store.forget_imports(40 * 86_400_000) == 1


@pytest.mark.spec("LINK-3", "RCPT-2")
def test_what_is_not_read_yet_is_remembered_until_it_is(store: LinkStore) -> None:
    store.take_in([incoming()], now=9)
    assert store.forget_imports(40 * 86_400_000) == 0
    ((row_id, _, _),) = store.unreported(9)
    store.mark_read([row_id], session="s", now=10)
    store.mark_reported([(row_id, READ)])
    assert store.forget_imports(40 * 86_400_000) == 1


@pytest.mark.spec("LINK-3")
def test_what_comes_from_the_future_was_sent_now(store: LinkStore) -> None:
    store.take_in([incoming(sent_at=10**12)], now=9)
    assert store.queries.inbox("frontend", 1)[0].sent_at == 9


@pytest.mark.spec("ADDR-3")
def test_an_answer_is_translated_on_both_sides(bus: Bus, store: LinkStore) -> None:
    store.note_machines([machine()])
    asked = bus.send("frontend", "backend@beta", "which port?").id
    store.mark_relayed([asked], sequence=1, now=1)
    store.take_in([incoming(answers=(store.identity(), asked))], now=9)
    answer = store.queries.inbox("frontend", 1)[0]
    assert answer.reply_to == asked
    bus.send("frontend", "backend@beta", "thanks", reply_to=answer.id)
    assert [one.answers for one in store.outbound(9)] == [f"{BUS}.7"]
    assert store.queries.status(answer.id).state is MessageState.READ
    # What a machine says it answers was not for it, or never was: it answers nothing here.
    store.take_in([incoming(8, machine="gamma", answers=(store.identity(), asked))], now=9)
    assert store.queries.inbox("frontend", 9)[-1].reply_to is None


@pytest.mark.spec("ADDR-1", "NAME-6")
def test_an_alias_is_resolved_where_the_mailbox_is(store: LinkStore) -> None:
    claimed = store.claim(arrival("old"), now=1, endpoint=str, join_crowd=True)
    assert claimed is not None
    store.rename(claimed[0].session, claimed[0].process.pid, "new")
    wake, _ = store.take_in([incoming(to="old")], now=9)
    assert [one.text for one in store.queries.inbox("new", 9)] == ["hello"]
    assert [peer.name for peer in wake] == ["new"]


@pytest.mark.spec("ADDR-6")
def test_a_broadcast_from_elsewhere_is_for_all_who_are_present(store: LinkStore, bus: Bus) -> None:
    for name in ("a", "b"):
        store.claim(arrival(name), now=1, endpoint=str, join_crowd=True)
    wake, reports = store.take_in([incoming(to="*")], now=9)
    assert sorted(peer.name for peer in wake) == ["a", "b"]
    assert [(one.state, one.note) for _, one in reports] == [(DELIVERED, "2 peers")]
    assert store.unreported(9) == []
    store.take_in([incoming(to="*")], now=9)
    assert len(store.queries.inbox("a", 9)) == 1
    # And from here: one row a machine, in one transaction.
    store.claim(arrival(LINK_NAME), now=1, endpoint=str, join_crowd=True)
    store.note_machines([machine(), machine("gamma", gone_at=3)])
    sent = bus.broadcast("a", "x", everywhere=True)
    assert [one.recipient for one in sent] == ["b", "*@beta"]
    assert [one.recipient for one in bus.broadcast("a", "x")] == ["b"]


@pytest.mark.spec("RCPT-1", "LSEC-3")
def test_receipts_count_only_for_messages_to_the_machine_that_sends_them(bus: Bus, store: LinkStore) -> None:
    store.note_machines([machine(), machine("gamma")])
    sent = bus.send("ci", "x@beta", "x").id
    store.mark_relayed([sent], sequence=1, now=1)
    before = store.queries.status(sent)
    for state in (UNKNOWN, ARRIVED, DELIVERED, READ, REFUSED):
        assert store.confirm("gamma", [report(store, sent, state)], now=9) == 0
    local = bus.send("ci", "x", "x").id
    store.confirm("beta", [report(store, local, READ)], now=9)
    assert store.queries.status(sent) == before
    assert store.queries.status(local).state is MessageState.PENDING


@pytest.mark.spec("LINK-5")
def test_a_receipt_for_a_lost_message_counts_for_no_new_one(bus: Bus, store: LinkStore) -> None:
    """A home was put back from a backup. What it sent before, and does not know any more, is being read there."""
    store.note_machines([machine()])
    sent = bus.send("ci", "x@beta", "the new one").id
    lost = digest("ci", "x@beta", "the lost one", 17)
    for state in (UNKNOWN, ARRIVED, READ, REFUSED):
        store.confirm("beta", [report(store, sent, state, digest=lost)], now=9)
    assert store.queries.status(sent).state is MessageState.PENDING
    assert [one.id for one in store.outbound(9)] == [sent]
    assert store.confirm("beta", [report(store, sent, UNKNOWN)], now=9) == 1
    (again,) = store.outbound(9)
    assert again.bus != store.identity()
    later = bus.send("ci", "x@beta", "later").id
    assert {one.bus for one in store.outbound(9) if one.id == later} == {again.bus}


@pytest.mark.spec("LINK-4")
def test_what_is_not_confirmed_leaves_again(bus: Bus, store: LinkStore) -> None:
    store.note_machines([machine(), machine("gamma")])
    ids = [bus.send("ci", f"x@{name}", "x").id for name in ("beta", "gamma", "beta")]
    store.mark_relayed(ids, sequence=1, now=50)
    store.confirm("beta", [report(store, ids[0], ARRIVED)], now=60)
    assert store.unconfirmed("beta", 51) == 1
    assert store.unconfirmed("beta", 50) == 0
    assert store.relay_anew("beta", 51) == 1
    assert [one.id for one in store.outbound(9)] == [ids[2]]
    assert store.relay_anew(None, 10**9) == 1
    assert [one.id for one in store.outbound(9)] == ids[1:]


@pytest.mark.spec("ADDR-7")
def test_what_was_refused_is_taken_later_if_it_is_taken_after_all(bus: Bus, store: LinkStore) -> None:
    store.note_machines([machine()])
    sent = bus.send("ci", "x@beta", "x").id
    store.confirm("beta", [report(store, sent, REFUSED, "it takes no mail from alpha")], now=9)
    assert "is refused by beta: it takes no mail from alpha" in str(store.queries.status(sent))
    store.confirm("beta", [report(store, sent, ARRIVED)], now=10)
    assert store.queries.status(sent).refused is None


@pytest.mark.spec("LINK-1")
def test_the_link_is_no_peer_for_others_and_nobody_can_send_to_it(bus: Bus, store: LinkStore) -> None:
    store.claim(arrival("*link"), now=1, endpoint=str, join_crowd=True)
    store.claim(arrival("a"), now=1, endpoint=str, join_crowd=True)
    assert [peer.name for peer in bus.peers()] == ["a"]
    assert [one.recipient for one in bus.broadcast("ci", "x")] == ["a"]
    for name in ("*link", "*link@beta"):
        with pytest.raises(InvalidRequest):
            bus.send("ci", name, "x")
    sent = bus.send("ci", "x@beta", "x")
    assert "the link is not running" not in str(sent)
