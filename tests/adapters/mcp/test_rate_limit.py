from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.mcp.rate_limit import RateLimit
from agentbus.core import config
from agentbus.core.errors import TryAgain
from tests.support.client import RawClient


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def send(guard: RateLimit, name: str, error: Exception | None = None) -> None:
    with guard.one(name):
        if error:
            raise error


@pytest.mark.spec("BURST-1")
def test_so_many_to_one_name_and_then_a_pause() -> None:
    clock = Clock()
    guard = RateLimit(3, clock)
    for _ in range(3):
        send(guard, "bob")
        clock.now += 1
    with pytest.raises(TryAgain) as caught:
        send(guard, "bob")
    assert str(caught.value) == 'too many messages to "bob" just now: put what remains into one message or wait 7s'
    send(guard, "carol")
    clock.now += 7
    send(guard, "bob")
    with pytest.raises(TryAgain, match="wait 1s"):
        send(guard, "bob")


@pytest.mark.spec("BURST-1")
def test_what_was_not_sent_does_not_count() -> None:
    guard = RateLimit(1, Clock())
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            send(guard, "bob", ZeroDivisionError())
    send(guard, "bob")


@pytest.mark.spec("BURST-1")
def test_zero_is_no_limit() -> None:
    guard = RateLimit(0, Clock())
    for _ in range(1_000):
        send(guard, "bob")


@pytest.mark.spec("BURST-1")
@pytest.mark.timeout(90)
def test_a_session_is_held_back_whatever_it_calls_the_name(start: Callable[..., RawClient]) -> None:
    alice = start("alice", AGENTBUS_BURST="5")
    alice.handshake()
    for name in ("Bob", "bob", " BOB ", "bOb", "bob"):
        alice.call("send_message", to=name, text="x")
    refusal = alice.refuse("send_message", to="bob", text="x")
    assert refusal.startswith('too many messages to "bob" just now: put what remains into one message or wait ')
    alice.call("send_message", to="carol", text="x")


@pytest.mark.spec("BRAKE-1", "BRAKE-2", "BRAKE-4")
@pytest.mark.timeout(90)
def test_a_restart_of_its_server_frees_no_session_and_its_user_does(
    home: Path, start: Callable[..., RawClient]
) -> None:
    alice, bob = start("alice", AGENTBUS_HOURLY="3"), start("bob")
    for client in (alice, bob):
        client.handshake()
    for _ in range(3):
        alice.call("send_message", to="bob", text="thanks")
    assert alice.refuse("send_message", to="bob", text="thanks").startswith('you sent 3 messages to "bob" since ')
    alice.end()
    again = start("alice", AGENTBUS_HOURLY="3")
    again.handshake()
    assert "the limit is 3 in an hour: ask your user, or agentbus resume alice" in again.refuse(
        "send_message", to="bob", text="thanks"
    )
    bus, triggers = registry.open_bus(config.load(home=home), busy_ms=10_000)
    assert bus.resume("alice", by="root") == (["alice"], [])
    again.call("send_message", to="bob", text="thanks")
    bob.wait_events(4)

    bus.pause("bob", by="root")
    again.call("send_message", to="bob", text="later")
    assert bob.call("check_messages") == (
        'this session is paused by "root" until it is resumed: 5 unread messages for it, to be had then'
    )
    bob.end()
    bob = start("bob")
    bob.handshake()
    assert "paused" in bob.refuse("send_message", to="alice", text="x")
    assert bob.texts() == []
    bus.resume("bob", by="root")
    assert [event["content"] for event in bob.wait_events(1)] == ["later"]
    bob.call("send_message", to="alice", text="x")
    bus.store.close()
    triggers.close()
