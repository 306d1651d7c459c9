"""The drain machine: it decides what a pump does next, and does none of it.

Facts go in, actions come out; no I/O, no clock, no await. The table below is the truth: SPEC.md repeats it, and a
test compares the two. To drain is to take what is pending from a mailbox and deliver it, oldest first. An
envelope is marked delivered only after the far end has taken it. Waiting for that does not hold up later
envelopes. Implements [DRAIN-1] to [DRAIN-7].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["TRANSITIONS", "Action", "Drain", "Fact", "IllegalFact", "Pace", "State", "Step"]


class State(Enum):
    """Where the drain of one mailbox is."""

    GATED = "gated"  # the far end cannot take messages yet
    READING = "reading"  # the mailbox is being read
    PUSHING = "pushing"  # envelopes are being handed over
    SETTLING = "settling"  # has the far end taken what was handed over?
    MARKING = "marking"  # what was taken is being marked delivered
    HOLDING = "holding"  # something that was handed over is not taken yet, or not marked yet
    RETRYING = "retrying"  # the database is busy, or the delivery failed for now
    IDLE = "idle"  # everything is delivered and marked
    CLOSED = "closed"  # the far end is gone

    # That of Enum hashes the name, in Python, and each step looks into the table.
    __hash__ = object.__hash__


class Fact(Enum):
    """What the last action has shown."""

    READY = "ready"  # the far end can take messages
    FOUND = "found"  # the mailbox has envelopes that were not handed over yet
    EMPTY = "empty"  # it has none
    HANDED = "handed"  # the delivery has handed over at least one
    TAKEN = "taken"  # the far end has taken some that are not marked yet
    MORE = "more"  # nothing is due, and the mailbox may have more than was handed over
    RECENT = "recent"  # the far end has taken some, so recently that others can soon be marked with them
    STREAMING = "streaming"  # messages keep coming: the next ones can be handed over together
    UNTAKEN = "untaken"  # the far end has taken none of the envelopes that are out
    CLEAR = "clear"  # no envelope is out
    MARKED = "marked"  # the marks are committed
    LOOK = "look"  # a wake arrived, or it is time to look again
    DUE = "due"  # no wake arrived, but it is time to ask the far end again
    BUSY = "busy"  # another process holds the database
    FAILED = "failed"  # the delivery handed nothing over
    WAITED = "waited"  # neither, but it can now; what is pending can have changed while it waited
    GONE = "gone"  # the far end is closed for good

    __hash__ = object.__hash__


class Action(Enum):
    """What to do next."""

    AWAIT_READY = "await ready"
    READ = "read"
    DELIVER = "deliver"
    CHECK = "check"
    MARK = "mark"
    SLEEP = "sleep"  # until a wake or the instant
    PAUSE = "pause"  # until the instant, even if wakes come: they do not free the database or thin a stream
    STOP = "stop"


TRANSITIONS: dict[tuple[State, Fact], tuple[State, Action]] = {
    (State.GATED, Fact.READY): (State.READING, Action.READ),
    (State.GATED, Fact.GONE): (State.CLOSED, Action.STOP),
    (State.READING, Fact.FOUND): (State.PUSHING, Action.DELIVER),
    (State.READING, Fact.EMPTY): (State.SETTLING, Action.CHECK),
    (State.READING, Fact.BUSY): (State.RETRYING, Action.PAUSE),
    (State.PUSHING, Fact.HANDED): (State.SETTLING, Action.CHECK),
    (State.PUSHING, Fact.FAILED): (State.RETRYING, Action.PAUSE),
    (State.PUSHING, Fact.WAITED): (State.READING, Action.READ),
    (State.PUSHING, Fact.GONE): (State.CLOSED, Action.STOP),
    (State.SETTLING, Fact.TAKEN): (State.MARKING, Action.MARK),
    (State.SETTLING, Fact.MORE): (State.READING, Action.READ),
    (State.SETTLING, Fact.RECENT): (State.HOLDING, Action.SLEEP),
    (State.SETTLING, Fact.STREAMING): (State.HOLDING, Action.PAUSE),
    (State.SETTLING, Fact.UNTAKEN): (State.HOLDING, Action.SLEEP),
    (State.SETTLING, Fact.CLEAR): (State.IDLE, Action.SLEEP),
    # Nothing says that there is more: a read for each mark would be half of what a message costs the receiver.
    (State.MARKING, Fact.MARKED): (State.SETTLING, Action.CHECK),
    # Reading needs no lock: new messages do not wait until the earlier ones are marked.
    (State.MARKING, Fact.BUSY): (State.HOLDING, Action.SLEEP),
    (State.HOLDING, Fact.LOOK): (State.READING, Action.READ),
    (State.HOLDING, Fact.DUE): (State.SETTLING, Action.CHECK),
    (State.RETRYING, Fact.LOOK): (State.READING, Action.READ),
    (State.IDLE, Fact.LOOK): (State.READING, Action.READ),
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the machine sleeps, in seconds. The first of a pair doubles up to the second."""

    # The slow poll under every trigger: the price of a lost wake. [DRAIN-5]
    safety_s: float = 3.0
    # A client that listens has read within a millisecond; a client that is stuck is asked 20 times a second.
    settle_s: tuple[float, float] = (0.001, 0.05)
    # How long marks wait for others. Of messages a millisecond apart, the mark of one would meet the next on its way:
    # that costs the next a fifth of its time. The messages that a crash doubles grow by as much.
    mark_s: float = 0.003
    # How often a mark that waits is thought of, and a stream is read. The marks of a stream are some 300 transactions a
    # second, with which its sender has to compete; a single message costs no extra one.
    stream_s: float = 0.001
    # A writer is done in 0.1 ms; a full disk or a stopped writer can take much longer.
    retry_s: tuple[float, float] = (0.000_5, 0.5)


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next. `until` is an instant of the caller's clock in seconds, set for SLEEP and PAUSE."""

    action: Action
    until: float | None = None


class IllegalFact(Exception):
    """A fact that the state does not know: a mistake of the caller. The machine has not moved."""


class Drain:
    """The drain of one mailbox. Starts GATED; the first action is AWAIT_READY."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._state = State.GATED
        self._settle_s = self._pace.settle_s[0]
        self._retry_s = self._pace.retry_s[0]

    @property
    def state(self) -> State:
        """Where the drain is."""
        return self._state

    def advance(self, fact: Fact, now: float) -> Step:
        """Take `fact`, known at `now` (seconds, any clock that never goes back), and say what to do next.

        Raises IllegalFact when the state has no place for `fact`.
        """
        try:
            state, action = TRANSITIONS[self._state, fact]
        except KeyError:
            raise IllegalFact(f"{fact.value} while {self._state.value}") from None
        self._state = state
        if fact in (Fact.HANDED, Fact.MARKED):
            # Things move again: start again with the shortest pauses.
            self._settle_s = self._pace.settle_s[0]
            self._retry_s = self._pace.retry_s[0]
        return Step(action, now + self._sleep_s(fact) if action in (Action.SLEEP, Action.PAUSE) else None)

    def _sleep_s(self, fact: Fact) -> float:
        if fact in (Fact.RECENT, Fact.STREAMING):
            sleep_s = self._pace.stream_s
        elif self._state is State.HOLDING and fact is not Fact.BUSY:
            sleep_s = self._settle_s
            self._settle_s = min(2 * sleep_s, self._pace.settle_s[1])
        elif self._state in (State.HOLDING, State.RETRYING):
            sleep_s = self._retry_s
            self._retry_s = min(2 * sleep_s, self._pace.retry_s[1])
        else:
            sleep_s = self._pace.safety_s
        return sleep_s
