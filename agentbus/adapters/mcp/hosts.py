"""Finds the agent process above this one, and describes what an adapter has chosen for its session.

Only reads processes. Knows no client: an adapter says what its client looks like. Implements [VOID-1].
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from agentbus.adapters.mcp.element import CHANNEL, Frames
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.core import process
from agentbus.core.config import Settings
from agentbus.core.ports import Delivery, Record
from agentbus.core.process import Process
from agentbus.core.session import Session
from agentbus.core.text import word

__all__ = ["Choice", "Host", "Link", "Mode", "Newcomer", "Wire", "find_host"]

# Programs that only start another one, and stay between the agent process and us.
_WRAPPER = re.compile(r"-?((ba|da|z|k|fi)?sh|uvx?|pipx|env|nice|timeout|npx|npm|mise|direnv)")


class Mode(Enum):
    """How surely the model of a session gets its messages without asking. [VOID-1]"""

    PUSHED = "pushed"
    UNSURE = "unsure"  # pushed, and also offered by check_messages: it is unknown what the client does with an event
    PULL = "pull"  # kept until check_messages asks
    HEALTH_CHECK = "none"  # not a session at all


@dataclass(frozen=True, slots=True)
class Host:
    """The agent process. `arguments` is empty if they cannot be read. `is_client`: it is the adapter's client."""

    process: Process
    arguments: tuple[str, ...] = ()
    is_client: bool = False
    is_known: bool = True

    @property
    def unknown(self) -> str:
        """Why agentbus does not know what this agent process does with an event, in a few words."""
        if not self.is_known:
            return "the host cannot be told"
        if not self.arguments:
            return "the arguments of the host cannot be read"
        return f"agentbus does not know whether {word(os.path.basename(self.arguments[0]))} shows channel events"


def find_host(
    is_client: Callable[[Sequence[str]], bool],
    *,
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Host:
    """The nearest process above this one that is the adapter's client, or is not just a wrapper.

    `chain` holds the processes above, nearest first. `arguments` reads the arguments of a process; empty if it cannot.
    """
    above = list(process.ancestors() if chain is None else chain)
    for one in above:
        words = tuple(arguments(one))
        if is_client(words):
            return Host(one, words, is_client=True)
        if not words or not _WRAPPER.fullmatch(os.path.basename(words[0])):
            return Host(one, words)
    return Host(above[-1] if above else process.parent(), is_known=False)


class Wire(Protocol):
    """The stream to the client. Positions count bytes since it was opened."""

    async def write(self, data: bytes) -> int:
        """Write all of `data`. Returns the position after it. Raises DeliveryClosed."""

    def read_by_client(self) -> int:
        """The position up to which the client has surely read. If the system cannot tell: up to which was written."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a delivery can be made from: the stream to the client, its gate, the home of the bus,
    the tags that a text must not bring with it.

    A delivery calls `report` with the reason when it has been unable to push for long, and with "" when it can again.
    It calls `turned` with a carrier and the reason when another one than before brings the messages. What it gives to
    `beside` runs for as long as the session does.
    """

    wire: Wire
    gate: ReadyGate
    home: Path
    report: Callable[[str], Awaitable[None]]
    turned: Callable[[str, str], Awaitable[None]]
    beside: Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
    frames: Frames = CHANNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The adapter's decision how a session receives, and the reason in a few words.

    `peers` shows `delivery`. `make` makes the delivery; if it is None, nothing is pushed. `held` says why messages have
    to be held back just now, or nothing; if it is None, they never have to. `twin` is set where one agent process can
    have only one peer of the same wish: it says what else can have started the other server, and what removes that.
    `end` is called when the server ends: for a delivery that listens. `record` is what the client records of what its
    model was given; None if it keeps no record. [PROOF-2]
    `settings` are those of this very session, where they are not those of this process. `conversation` is what the
    client calls the conversation. `guest_of` is the conversation whose subagent this server serves: then it is no peer
    itself, and its tools act for that one. [LATE-2]
    """

    host: Process
    mode: Mode
    delivery: str
    reason: str
    make: Callable[[Link], Delivery] | None = None
    held: Callable[[], str] | None = None
    twin: Callable[[], str] | None = None
    end: Callable[[], None] | None = None
    record: Record | None = None
    settings: Settings | None = None
    conversation: str = ""
    guest_of: str = ""


class Newcomer(Protocol):
    """What finds out which session a server belongs to, where the client shows that only after the handshake. [LATE-1]

    `over` is set by the server once the session is a peer, or is known to be none.
    """

    over: anyio.Event

    def greeted(self, params: Mapping[str, Any]) -> None:
        """The client has sent `initialize`, with these parameters."""

    def called(self, meta: Mapping[str, Any]) -> None:
        """The client has called a tool, with this `_meta`. The call is carried out when `over` is set."""

    async def arrive(self, tasks: TaskGroup) -> Choice:
        """How the session receives, once that is known. What it starts in `tasks` runs as long as the server.

        Raises AgentbusError.
        """

    async def attend(self, session: Session) -> str:
        """Stay beside the session until it has ended although its server goes on. Returns why, without a full stop."""
