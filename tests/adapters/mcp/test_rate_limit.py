from __future__ import annotations

from collections.abc import Callable

import pytest

from agentbus.adapters.mcp.rate_limit import RateLimit
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
