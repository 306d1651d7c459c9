"""Groups: who is in one, what a message to one does, and what follows a rename."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agentbus.adapters.mcp.channel import channel_event
from agentbus.adapters.mcp.element import element
from agentbus.core import config, groups
from agentbus.core.a2a import from_a2a, to_a2a
from agentbus.core.bus import Bus
from agentbus.core.config import MEMBER_DAYS, prepare_home
from agentbus.core.errors import InvalidRequest, MailboxFull, Refused
from agentbus.core.model import Peer
from agentbus.core.names import address, group_name
from agentbus.core.presence import Held
from agentbus.core.store import Store
from agentbus.core.text import MAX_FOLDER_CHARS
from agentbus.member import join
from tests.core.test_session import World, until
from tests.support.fakes import FakeClock, FakeTrigger, arrival, envelope

DAY_MS = 86_400_000


class Town:
    """A bus on a real file whose peers hold real locks in this process."""

    def __init__(self, path: Path, max_pending: int = 100) -> None:
        self.clock = FakeClock()
        self.trigger = FakeTrigger()
        self.store = Store(path, busy_ms=1_000, max_pending=max_pending)
        self.bus = Bus(self.store, {"fake": self.trigger}, max_bytes=1_000, clock=self.clock)
        self.held: dict[str, Held] = {}

    def claim(self, name: str, runtime: str = "test") -> Peer:
        claimed = self.bus.claim(replace(arrival(name), runtime=runtime), str, join_crowd=True)
        assert claimed is not None
        assert claimed.held is not None
        self.held[claimed.peer.session] = claimed.held
        return claimed.peer

    def kill(self, peer: Peer) -> None:
        """End its process: the kernel drops the lock, and the file stays."""
        self.held.pop(peer.session)._close()

    def members(self, group: str) -> list[str]:
        return self.store.queries.groups().get(group, [])

    def count(self) -> int:
        return self.store.queries.newest_id()


@pytest.fixture
def town(home: Path) -> Iterator[Town]:
    town = Town(prepare_home(home))
    yield town
    town.store.close()


@pytest.mark.spec("GROUP-1")
def test_a_group_is_a_name_with_an_at_before_it(town: Town) -> None:
    for raw in ("@Review", " @review ", "review", "@ review"):
        assert group_name(raw) == "@review"
    assert group_name("@Code Review") == "@code-review"
    assert (town.bus.recipient("@Review"), town.bus.recipient("Review")) == ("@review", "review")


@pytest.mark.spec("GROUP-1", "ERR-1")
@pytest.mark.parametrize(
    "raw", ["@", "@@", "", "@a@b", "@a,b", "@" + "x" * 33, "@all", "@everyone", "@\u0430bc", 7, None]
)
def test_a_bad_name_of_a_group_is_refused_in_a_sentence(town: Town, raw: object) -> None:
    town.claim("alice")
    for call in (town.bus.join_group, town.bus.leave_group):
        with pytest.raises(InvalidRequest) as caught:
            call("alice", raw)
        assert str(caught.value).count("\n") == 0
        assert len(str(caught.value)) < 300
    assert town.store.queries.groups() == {}


@pytest.mark.spec("GROUP-1", "NAME-2")
def test_where_one_peer_is_meant_a_group_is_refused(town: Town) -> None:
    with pytest.raises(InvalidRequest, match='"@review" is not a name: did you mean "review"\\? This takes one peer'):
        address("@review")
    with pytest.raises(InvalidRequest, match="broadcast sends to all"):
        town.bus.recipient("@all")


@pytest.mark.spec("GROUP-2")
def test_a_group_is_there_for_as_long_as_it_has_members(town: Town) -> None:
    town.claim("alice")
    assert town.bus.join_group("alice", "review") == ("@review", ["alice"], True)
    assert town.bus.join_group("Bob", "@Review") == ("@review", ["alice", "bob"], True)
    assert town.bus.join_group("bob", "@review")[2] is False
    assert town.bus.leave_group("bob", "@review") == "@review"
    with pytest.raises(Refused, match='"bob" is not in "@review": agentbus groups shows who is'):
        town.bus.leave_group("bob", "@review")
    town.bus.leave_group("alice", "@review")
    assert town.store.queries.groups() == {}


@pytest.mark.spec("GROUP-2")
def test_an_old_name_joins_for_the_session_that_has_another_now(town: Town) -> None:
    peer = town.claim("alice")
    town.bus.rename(peer, "anna")
    town.bus.join_group("alice", "@review")
    assert town.members("@review") == ["anna"]
    town.bus.leave_group("alice", "@review")
    assert town.members("@review") == []


@pytest.mark.spec("GROUP-2", "ERR-1")
def test_the_257th_member_is_refused_and_nothing_has_changed(town: Town) -> None:
    for number in range(groups.MAX_MEMBERS):
        town.store.join_group("@big", f"m{number}", now=0)
    with pytest.raises(Refused, match='"@big" has 256 members, which is the limit: "late" did not join'):
        town.bus.join_group("late", "@big")
    assert town.bus.join_group("m0", "@big")[2] is False
    assert len(town.members("@big")) == 256
    town.bus.leave_group("m0", "@big")
    assert town.bus.join_group("late", "@big")[2] is True


@pytest.mark.spec("GROUP-3")
def test_a_message_to_a_group_is_one_for_each_other_member_there_or_not(town: Town) -> None:
    alice, bob = town.claim("alice"), town.claim("bob")
    for name in ("alice", "bob", "carol"):
        town.bus.join_group(name, "@review")
    sent = town.bus.send_group("alice", "@Review", "look at #7", sender_session=alice.session)
    assert str(sent) == "sent to @review: bob (#1), carol (#2, offline)"
    for row_id, name in ((1, "bob"), (2, "carol")):
        found = town.store.queries.status(row_id)
        assert (found.recipient, found.to_group, found.text) == (name, "@review", "look at #7")
        assert str(found).startswith(f'#{row_id} from "alice" to "{name}" (by @review) is pending: ')
    assert [one.to_group for one in town.bus.pending(bob, 10)] == ["@review"]
    # Who is no member can send there too, and an answer can go to the sender or to the group.
    assert [one.recipient for one in town.bus.send_group("dave", "@review", "hi").sent] == ["alice", "bob", "carol"]
    town.bus.send_group("bob", "@review", "done", reply_to=1, sender_session=bob.session)
    assert town.store.queries.status(1).read_by == "reply"
    assert [one.id for one in town.store.queries.newest_first(peer="@review")] == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.anyio
@pytest.mark.spec("GROUP-3")
async def test_each_member_that_is_there_is_woken(home: Path) -> None:
    town = World(prepare_home(home))
    async with town.running("bob") as (_, bob), town.running("carol") as (_, carol):
        for name in ("bob", "carol"):
            town.bus.join_group(name, "@review")
        town.bus.send_group("alice", "@review", "hello")
        # The safety poll is 600 s away.
        await until(lambda: [len(bob.handed), len(carol.handed)] == [1, 1])
    town.store.close()


@pytest.mark.spec("GROUP-3", "ERR-1")
def test_a_group_of_nobody_else_is_refused_and_nothing_is_sent(town: Town) -> None:
    with pytest.raises(InvalidRequest) as caught:
        town.bus.send_group("alice", "@bob", "hello")
    assert str(caught.value) == (
        '"@bob" has no members, nothing was sent: join_group, or agentbus join, makes one; to send to a peer, write '
        '"bob"'
    )
    town.bus.join_group("alice", "@bob")
    with pytest.raises(InvalidRequest, match='"@bob" has no member but you, nothing was sent: others have to join it'):
        town.bus.send_group("alice", "@bob", "hello")
    assert town.count() == 0


@pytest.mark.spec("GROUP-3", "SEND-3")
@pytest.mark.parametrize("text", ["x", "x" * 900, "y" * 4_000])
def test_a_full_mailbox_of_one_member_does_not_fail_the_others(home: Path, text: str) -> None:
    town = Town(prepare_home(home), max_pending=5)
    town.bus._max_bytes = 5_000
    for name in ("bob", "carol", "dave"):
        town.bus.join_group(name, "@review")
    for _ in range(5):
        town.bus.send("alice", "carol", "x")
    sent = town.bus.send_group("alice", "@review", text)
    assert str(sent).endswith("; not to carol: the mailbox is full")
    assert (town.store.queries.waiting(), sent.full) == ({"bob": 1, "carol": 5, "dave": 1}, ("carol",))
    assert {one.text for one in town.store.queries.inbox("dave", 9)} == {text}
    assert len(town.store._read("SELECT 1 FROM bodies")) == (2 if len(text) > 3_000 else 0)
    for name in ("bob", "dave"):
        for _ in range(4):
            town.bus.send("alice", name, "x")
    before = town.store.queries.waiting()
    with pytest.raises(MailboxFull, match=r'each other member of "@review" is full \(bob, carol, dave\), nothing was'):
        town.bus.send_group("alice", "@review", text)
    assert town.store.queries.waiting() == before
    town.store.close()


@pytest.mark.spec("GROUP-4")
def test_a_membership_follows_a_rename_and_outlives_the_session(town: Town) -> None:
    alice = town.claim("alice")
    town.bus.join_group("alice", "@review")
    town.bus.join_group("alice", "@backend")
    town.bus.join_group("anna", "@review")
    town.bus.rename(alice, "anna")
    assert town.store.queries.groups_of() == {"anna": ["@backend", "@review"]}
    town.bus.leave(alice)
    assert town.members("@review") == ["anna"]
    assert [one.recipient for one in town.bus.send_group("bob", "@review", "x").sent] == ["anna"]


@pytest.mark.spec("GROUP-5")
def test_a_member_that_nobody_was_for_thirty_days_drops_out(town: Town) -> None:
    alice = town.claim("alice")
    town.claim("here")
    for name in ("alice", "here", "never"):
        town.bus.join_group(name, "@review")
    town.clock.now += 20 * DAY_MS
    town.bus.leave(alice)
    town.clock.now += 10 * DAY_MS
    assert town.bus.drop_absent() == []
    town.clock.now += 1
    assert town.bus.drop_absent() == ['"never" dropped out of "@review": it was not there for 30 days']
    town.clock.now += 20 * DAY_MS
    assert town.bus.drop_absent() == ['"alice" dropped out of "@review": it was not there for 30 days']
    town.clock.now += 900 * DAY_MS
    assert town.bus.drop_absent() == []
    assert town.members("@review") == ["here"]


@pytest.mark.spec("GROUP-5")
def test_who_died_unseen_was_there_until_that_was_noticed(town: Town) -> None:
    alice = town.claim("alice")
    town.bus.join_group("alice", "@review")
    town.clock.now += 40 * DAY_MS
    town.kill(alice)
    assert [peer.session for peer in town.bus.reap()] == [alice.session]
    assert town.bus.drop_absent() == []


@pytest.mark.anyio
@pytest.mark.spec("GROUP-5", "CONF-5")
async def test_a_heartbeat_drops_who_is_away_and_says_so(home: Path) -> None:
    world = World(prepare_home(home))
    world.bus.join_group("gone", "@review")
    world.store.set_setting(MEMBER_DAYS, 3, may_lower=True)
    world.clock.now += 3 * DAY_MS + 1
    async with world.running("web"):
        await until(lambda: world.said == ['"gone" dropped out of "@review": it was not there for 3 days'])
    world.store.close()


@pytest.mark.anyio
@pytest.mark.spec("GROUP-6", "CONF-5")
async def test_a_session_joins_its_groups_at_its_start_and_starts_all_the_same_where_one_is_full(home: Path) -> None:
    world = World(prepare_home(home))
    for number in range(groups.MAX_MEMBERS):
        world.store.join_group("@big", f"m{number}", now=0)
    async with world.running("web", groups=("@review", "@big", "@api"), member_days=90):
        assert world.store.queries.groups_of()["web"] == ["@api", "@review"]
        assert world.said[:2] == [
            "AGENTBUS_MEMBER_DAYS: member-days is 90 from now on, for everybody on this bus",
            '"@big" has 256 members, which is the limit: "web" did not join: join another group, or let a member leave '
            "first",
        ]
    assert world.store.queries.groups_of()["web"] == ["@api", "@review"]
    world.store.close()


@pytest.mark.spec("GROUP-6", "CONF-1")
def test_the_variable_lists_groups_with_or_without_their_at() -> None:
    assert config.load({"AGENTBUS_GROUPS": "Review, @backend,,review"}).groups == ("@review", "@backend")
    assert config.load({"AGENTBUS_GROUPS": " "}).groups == ()
    for bad in ("a b,@", "review;backend", "@" + "x" * 33):
        with pytest.raises(InvalidRequest, match=r"AGENTBUS_GROUPS is .*: set it to names with a comma between them"):
            config.load({"AGENTBUS_GROUPS": bad})
    with pytest.raises(InvalidRequest, match="AGENTBUS_MEMBER_DAYS is '0': set it to a whole number from 1 to 3,650"):
        config.load({"AGENTBUS_MEMBER_DAYS": "0"})


@pytest.mark.spec("GROUP-3", "CHAN-2", "INBOX-7", "ENV-1", "ENV-2")
def test_the_group_stands_in_the_element_in_the_event_and_in_the_a2a_message() -> None:
    one = envelope(7, to_group="@review")
    assert ' to_group="@review"' in element(one)
    assert b'"to_group": "@review"' in channel_event(one)
    assert "to_group" not in element(envelope(7))
    assert from_a2a(to_a2a(one), max_bytes=1_000) == one
    message = to_a2a(one)
    message["metadata"]["agentbus/1"]["toGroup"] = "review"
    with pytest.raises(InvalidRequest, match="'toGroup' is 'review'"):
        from_a2a(message, max_bytes=1_000)


@pytest.mark.anyio
@pytest.mark.spec("LIB-3", "GROUP-3")
async def test_a_program_joins_sends_and_leaves(home: Path) -> None:
    async with join("alice", home=home) as alice, join("bob", home=home) as bob:
        assert await alice.join_group("review") == ["alice"]
        assert await bob.join_group("@review") == ["alice", "bob"]
        sent = await alice.send_group("@review", "hello")
        assert [one.recipient for one in sent.sent] == ["bob"]
        assert (await bob.receive()).to_group == "@review"
        await bob.leave_group("@review")
        with pytest.raises(InvalidRequest, match="has no member but you"):
            await alice.send_group("review", "hello")
        with pytest.raises(InvalidRequest, match="is not a name"):
            await alice.send("@review", "hello")


@pytest.mark.spec("TRUST-5")
def test_a_peer_of_very_many_groups_is_one_short_line_still(town: Town) -> None:
    from agentbus.adapters.mcp.tools import _line

    peer = town.claim("alice")
    line = _line(peer, peer, "fake", [f"@group-{number}" for number in range(1_000)], ())
    assert len(line) < 2 * MAX_FOLDER_CHARS + 100
