"""What the tools are made of: what each knows of its session, its result, its arguments, and texts that several say.

Implements [ARG-1], [TOOL-5], [VOID-1].
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from agentbus.adapters.mcp.hosts import Choice, Mode, Newcomer
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.rate_limit import HourlyLimit, RateLimit
from agentbus.core.errors import AgentbusError, InvalidRequest
from agentbus.core.session import Session
from agentbus.core.text import one_line

__all__ = [
    "ASIDE_CHARS",
    "CALL_META",
    "MAX_COUNTED",
    "MAX_QUOTED_CHARS",
    "ONLY_WAITS",
    "Argument",
    "Tool",
    "ToolContext",
    "ToolResult",
    "braked",
    "count_unread",
    "messages_text",
    "name_note",
    "told",
    "unread_line",
]

# An error quotes this much of a wrong argument; more of it would hide the sentence.
MAX_QUOTED_CHARS = 40
# Unread messages are counted up to here; nobody needs to know how many more there are.
MAX_COUNTED = 1_000
# What a server says that stands aside: by what the other one was started, which can be several, and the way out.
ASIDE_CHARS = 1_000
# A number in a text; a longer one is no id, and Python refuses to convert thousands of digits.
_NUMBER = re.compile(r"#?\s?([0-9]{1,20})", re.ASCII)


async def _unknown(_meta: Mapping[str, Any]) -> None:
    return None


# The `_meta` of the call that this task carries out: what the client says about it beside the arguments.
CALL_META: ContextVar[Mapping[str, Any]] = ContextVar("meta", default=MappingProxyType({}))
# What the tool of this task calls once it has done what no later call may overtake, and only waits. [DESK-4]
ONLY_WAITS: ContextVar[Callable[[], None]] = ContextVar("only waits", default=lambda: None)


@dataclass(slots=True, kw_only=True)
class ToolContext:
    """The session that the tools act for, and how it receives. `session` is None for a health check, which has none.

    The server fills in what is known only later. Until `arrival` is over, it is not known which session this is.
    """

    runtime: str
    server_name: str
    profile: Profile
    choice: Choice
    session: Session | None = None
    name_note: str = ""
    rate_limit: RateLimit = field(default_factory=lambda: RateLimit(0))
    hourly_limit: HourlyLimit = field(default_factory=lambda: HourlyLimit(0))
    # Why nothing can be pushed just now, although it should be; empty if pushing works.
    trouble: Callable[[], str] = str
    # What every tool answers while another server of the same agent process is the peer; empty otherwise. [TWIN-1]
    aside: Callable[[], str] = str
    # The trigger that the list of peers does not mention; the others are slower.
    usual_trigger: str = ""
    # Whether the main agent of the session made the call with this `_meta`; None: that cannot be told. [READ-7]
    is_main_agent: Callable[[Mapping[str, Any]], Awaitable[bool | None]] = _unknown
    # Of a client that says only after the handshake which session this is. [LATE-1]
    arrival: Newcomer | None = None

    @property
    def is_pushed(self) -> bool:
        """Whether messages surely reach the model without a request from it."""
        return self.choice.mode is Mode.PUSHED and not self.trouble()


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The text of a result. Call `settle` once: with True if the client has the result, with False if not."""

    text: str
    is_error: bool = False
    settle: Callable[[bool], Awaitable[None]] | None = None

    def as_result(self) -> dict[str, Any]:
        """The result of `tools/call`."""
        return {"content": [{"type": "text", "text": self.text}], "isError": self.is_error}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a tool: text; a whole number from `low` to what `high` returns, if those are set; or a flag."""

    description: str
    is_required: bool = True
    low: int | None = None
    high: Callable[[Profile], int] | None = None
    is_flag: bool = False

    def schema(self, profile: Profile) -> dict[str, Any]:
        """Its JSON schema."""
        if self.is_flag:
            return {"type": "boolean"}  # its name says it
        if self.low is None or self.high is None:
            return {"type": "string", "description": self.description}
        return {
            "type": "integer",
            "minimum": self.low,
            "maximum": self.high(profile),
            "description": self.description,
        }

    def check(self, name: str, value: Any, profile: Profile) -> Any:
        """`value`, if it fits. Raises InvalidRequest."""
        if self.is_flag:
            if isinstance(value, bool):
                return value
            raise InvalidRequest(f"{name!r} is true or false, not {type(value).__name__} ({_shown(value)})")
        given = value
        if self.low is not None and isinstance(value, str):
            # Models write ids as they see them: "1", "#1". [ARG-1]
            number = _NUMBER.fullmatch(value.strip())
            value = int(number[1]) if number is not None else value
        if self.low is None or self.high is None:
            if not isinstance(value, str):
                raise InvalidRequest(f"{name!r} is text, not {type(value).__name__} ({_shown(given)})")
            return value
        # JSON has only one kind of number: 3.0 counts as 3.
        is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
        if isinstance(value, bool) or not is_whole:
            raise InvalidRequest(f"{name!r} is a whole number, not {type(value).__name__} ({_shown(given)})")
        high = self.high(profile)
        if not self.low <= value <= high:
            raise InvalidRequest(f"{name!r} is {_shown(given)}", hint=f"use {self.low} to {high}")
        return int(value)


def _shown(value: object) -> str:
    return one_line(str(value), MAX_QUOTED_CHARS)


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool."""

    name: str
    description: str
    run: Callable[[ToolContext, Session, Mapping[str, Any]], Awaitable[str | ToolResult]]
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    # The same without waiting. If it has to wait for something, it does nothing and raises Busy.
    run_now: Callable[[ToolContext, Session, Mapping[str, Any]], str] | None = None
    # Whether a call changes nothing anywhere. [TOOL-5]
    only_reads: bool = False
    # Whether it is needed to answer a message. A client that can shows no more than the names of the others. [TOOL-6]
    is_loaded: bool = False

    def input_schema(self, profile: Profile) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        return {
            "type": "object",
            "properties": {name: argument.schema(profile) for name, argument in self.arguments.items()},
            "required": [name for name, argument in self.arguments.items() if argument.is_required],
            "additionalProperties": False,
        }

    def listed(self, profile: Profile) -> dict[str, Any]:
        """The entry of this tool in the result of `tools/list`."""
        found = {
            "name": self.name,
            "description": self.description,
            "inputSchema": self.input_schema(profile),
            # Nothing is ever overwritten or removed, and nothing leaves this machine. [TOOL-5]
            "annotations": {"readOnlyHint": self.only_reads, "destructiveHint": False, "openWorldHint": False},
        }
        return {**found, "_meta": {profile.load_key: self.is_loaded}} if profile.load_key else found


def braked(context: ToolContext, session: Session, to: str | None) -> AbstractContextManager[None]:
    """Count the message that the block sends to a name, a group or (None) everybody. [BURST-1], [BRAKE-4]

    Raises TryAgain or Refused, here or when it is entered, if that message is one too many.
    """
    called = to or "everybody"
    context.hourly_limit.check(called, lambda: session.peer.name, lambda: session.bus.sent_lately(session.peer, to))
    return context.rate_limit.one(called)


def messages_text(count: int) -> str:
    return "1 unread message" if count == 1 else f"{count:,} unread messages"


def unread_line(session: Session) -> str:
    """The end of every result where messages are not surely pushed. [VOID-1]"""
    count = count_unread(session)
    return f"\n{messages_text(count)}: call check_messages" if count else ""


def count_unread(session: Session) -> int:
    try:
        return session.count_unread(MAX_COUNTED)
    except AgentbusError:
        # The call is done: an error here would be taken for its failure, and the call would be made again. [SEND-6]
        return 0


def told(context: ToolContext, text: str, most: int) -> str:
    """`text`, in which others have a part, for a model: on one line of at most `most` characters, without a tag."""
    frames = context.profile.frames
    # Twice, because a cut can bring the parts of a tag together.
    return frames.defused(one_line(frames.defused(text), most))


def name_note(session: Session) -> str:
    if session.claim_note:
        return f" ({session.claim_note})"
    holder = session.wished_holder
    if holder is None or session.peer.name == holder.name:
        return ""
    return f' ("{holder.name}" is taken by the session in {one_line(holder.cwd)}; set_name changes yours)'
