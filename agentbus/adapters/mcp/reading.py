"""The tool check_messages: what fits into one answer, and when it counts as read.

Implements [READ-1] to [READ-4], [BRAKE-1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentbus.adapters.mcp.element import client_chars, parts
from agentbus.adapters.mcp.toolkit import (
    CALL_META,
    MAX_COUNTED,
    ToolContext,
    ToolResult,
    count_unread,
    messages_text,
)
from agentbus.core.errors import AgentbusError
from agentbus.core.model import Unread
from agentbus.core.session import Session
from agentbus.core.stderr import say

__all__ = ["check_messages", "fitting", "goes_on"]

# Of an answer of check_messages, this much is for what stands around the texts: the first and the last line, a notice,
# and of each message its attributes and its note.
_FRAME_CHARS = 1_000
_ELEMENT_CHARS = 300


async def check_messages(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> ToolResult:
    """The unread messages that fit into one answer. They are marked once the client has it."""
    is_main = await context.is_main_agent(CALL_META.get())
    if is_main is False:
        return ToolResult(
            "the messages of this session are for its main agent, and you are a subagent of it: nothing was taken, "
            f"{messages_text(session.count_unread(MAX_COUNTED))} left for it to read itself",
            settle=_nothing_to_settle,
        )
    if (paused := _paused(session)) is not None:
        return paused
    unread = await session.check(arguments.get("wait_s", 0), context.profile.max_checked)
    shown, ids, partly = fitting(context, session, unread)
    not_shown = [one.envelope.id for one in unread[len(shown) :]]
    if not_shown:
        await session.checked(not_shown, reached=False)
    if not shown:
        return _paused(session) or ToolResult("no unread messages")  # paused while it waited
    again = sum(one.shown_at is not None for one in unread[: len(shown)])
    new = len(shown) - again
    left = count_unread(session) - new
    head = messages_text(new) if new else "no unread messages"
    lines = [f"{head}, and {again:,} shown before and not answered, for the last time:" if again else f"{head}:"]
    lines += shown
    lines += goes_on(partly)
    if left > 0:
        lines.append(f"{left} more: call check_messages again")
    is_certain = is_main is True

    async def settle(reached: bool) -> None:
        try:
            await session.checked(ids, reached=reached, partly=partly, is_certain=is_certain)
        except AgentbusError as error:
            # The client has the messages, but they are not marked as read: it will get them once more.
            say(f"messages could not be marked as read: {error}")

    return ToolResult("\n".join(lines), settle=settle)


def _paused(session: Session) -> ToolResult | None:
    """What is said to a session that a person has paused; None if that is not so. [BRAKE-1]"""
    pause = session.bus.pause_of(session.peer)
    if pause is None:
        return None
    waiting = messages_text(session.bus.count_unread(session.peer, MAX_COUNTED))
    return ToolResult(f"this session is {pause}: {waiting} for it, to be had then", settle=_nothing_to_settle)


async def _nothing_to_settle(_reached: bool) -> None:
    """Nothing was taken."""


def goes_on(partly: Sequence[int]) -> list[str]:
    """The line that says of which message there is more; none if there is no such message. [READ-4]"""
    return [f"#{one} is long, and goes on: call check_messages again for its next part" for one in partly]


def fitting(context: ToolContext, session: Session, unread: Sequence[Unread]) -> tuple[list[str], list[int], list[int]]:
    """What fits into one answer: the text of each message, at least of the first, their ids, and whose end is missing.

    A message that is too long for one answer comes in parts, one an answer. [READ-4]
    """
    room = context.profile.max_checked_chars - _FRAME_CHARS
    longest = room - _ELEMENT_CHARS  # the same in every answer, so that the parts stay the same
    shown: list[str] = []
    ids: list[int] = []
    for one in unread:
        row_id = one.envelope.id
        pieces = parts(one.envelope, context.profile.frames, longest)
        number = min(session.parts_read(row_id), len(pieces) - 1)
        text = _before_note(session, one) + pieces[number]
        if shown and client_chars(text) > room:
            break
        room -= client_chars(text) + 1
        shown.append(text)
        ids.append(row_id)
        if number + 1 < len(pieces):
            return shown, ids, [row_id]
    return shown, ids, []


def _before_note(session: Session, one: Unread) -> str:
    """A line that says how this session may know the message already."""
    if one.shown_at is not None:
        return f"(shown before, {(session.bus.clock() - one.shown_at) // 60_000:,} min ago)\n"
    if one.was_earlier:
        return "(pushed to an earlier session, which ended)\n"
    return "(pushed to this session before)\n" if one.was_pushed else ""
