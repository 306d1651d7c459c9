from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentbus.core.drain import TRANSITIONS, Action, Drain, Fact, IllegalFact, Pace, State, Step

PACE = Pace(safety_s=3.0, settle_s=(0.001, 0.05), retry_s=(0.005, 0.5))


def drain_in(path: tuple[Fact, ...]) -> Drain:
    drain = Drain(PACE)
    for fact in path:
        drain.advance(fact, 0.0)
    return drain


def legal_paths(length: int) -> list[tuple[Fact, ...]]:
    """All sequences of `length` facts that a drain accepts."""
    paths: list[tuple[Fact, ...]] = [()]
    for _ in range(length):
        paths = [(*path, fact) for path in paths for fact in Fact if (drain_in(path).state, fact) in TRANSITIONS]
    return paths


def path_to(state: State) -> tuple[Fact, ...]:
    return next(path for length in range(7) for path in legal_paths(length) if drain_in(path).state is state)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("fact", Fact)
def test_every_state_meets_every_fact(state: State, fact: Fact) -> None:
    drain = drain_in(path_to(state))
    expected = TRANSITIONS.get((state, fact))
    if expected is None:
        with pytest.raises(IllegalFact, match=f"{fact.value} while {state.value}"):
            drain.advance(fact, 0.0)
        assert drain.state is state
    else:
        step = drain.advance(fact, 0.0)
        assert (drain.state, step.action) == expected


@pytest.mark.spec("DRAIN-1", "DRAIN-3")
def test_no_sequence_of_facts_reads_early_or_marks_what_was_not_taken() -> None:
    for length in range(7):
        for path in legal_paths(length):
            drain = Drain(PACE)
            actions = [drain.advance(fact, 0.0).action for fact in path]
            if actions:
                assert path[0] in (Fact.READY, Fact.GONE)
            for fact, action in zip(path, actions, strict=True):
                assert (action is Action.MARK) == (fact is Fact.TAKEN)
                assert (action is Action.DELIVER) == (fact is Fact.FOUND)
                assert (action is Action.STOP) == (fact is Fact.GONE)


def test_a_closed_drain_accepts_nothing() -> None:
    assert not [fact for state, fact in TRANSITIONS if state is State.CLOSED]


def test_spec_shows_this_table() -> None:
    spec = Path(__file__).parents[2].joinpath("SPEC.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| ([\w ]+) \|$", spec, re.MULTILINE)
    shown = {
        (State(state), Fact(fact)): (State(after), Action(action))
        for state, fact, after, action in rows
        if state in {state.value for state in State}
    }
    assert shown == TRANSITIONS


@pytest.mark.spec("DRAIN-5")
def test_idle_sleeps_for_the_safety_poll() -> None:
    drain = drain_in((Fact.READY, Fact.EMPTY))
    assert drain.advance(Fact.CLEAR, 100.0) == Step(Action.SLEEP, 103.0)


@pytest.mark.spec("DRAIN-6")
def test_retries_double_and_start_anew_when_something_was_handed_over() -> None:
    drain = drain_in((Fact.READY,))
    pauses = []
    for _ in range(9):
        step = drain.advance(Fact.BUSY, 0.0)
        assert step.action is Action.PAUSE
        pauses.append(step.until)
        drain.advance(Fact.LOOK, 0.0)
    assert pauses == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5])
    drain.advance(Fact.FOUND, 0.0)
    drain.advance(Fact.HANDED, 0.0)
    drain.advance(Fact.TAKEN, 0.0)
    assert drain.advance(Fact.BUSY, 0.0).until == pytest.approx(0.005)


def test_a_slow_reader_is_asked_less_and_less() -> None:
    drain = drain_in((Fact.READY, Fact.FOUND, Fact.HANDED))
    sleeps = []
    for _ in range(8):
        sleeps.append(drain.advance(Fact.UNTAKEN, 0.0).until)
        drain.advance(Fact.LOOK, 0.0)
        drain.advance(Fact.EMPTY, 0.0)
    assert sleeps == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.05, 0.05])
