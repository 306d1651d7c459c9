"""The tool ask: a question whose answer is the result of the call. Implements [ASK-1] to [ASK-4], [READ-1]."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agentbus.adapters.mcp.reading import fitting, goes_on
from agentbus.adapters.mcp.toolkit import ONLY_WAITS, ToolContext, ToolResult, braked
from agentbus.core.asking import CARRIER, DEFAULT_S
from agentbus.core.errors import AgentbusError
from agentbus.core.model import Unread
from agentbus.core.session import Session
from agentbus.core.stderr import say

__all__ = ["ask", "status_line"]


async def ask(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> ToolResult:
    """The answer, which is read once the client has it, or why there is none."""
    wait_s = min(arguments.get("wait_s", DEFAULT_S), context.profile.max_wait_s)
    # A group is refused by `ask`, which says better why.
    with braked(context, session, session.bus.recipient(arguments["to"])):
        sent = await session.ask(arguments["to"], arguments["text"], wait_s)
    ONLY_WAITS.get()()
    asked = await session.answer(sent, wait_s)
    if asked.answer is None:
        return ToolResult(f"{asked}\nGo on without it; an answer that comes later {_later(context, session)}")
    shown, ids, partly = fitting(context, session, [Unread(asked.answer, was_pushed=False)])

    async def settle(reached: bool) -> None:
        try:
            await session.checked(ids, reached=reached, partly=partly, carrier=CARRIER)
        except AgentbusError as error:
            # The client has the answer, but it is not marked as read: it will get it once more.
            say(f"the answer to #{sent.id} could not be marked as read: {error}")

    return ToolResult("\n".join([f"the answer to #{sent.id}:", *shown, *goes_on(partly)]), settle=settle)


def _later(context: ToolContext, session: Session) -> str:
    """What becomes of an answer that is not waited for any longer."""
    with suppress(AgentbusError):  # the question is sent [SEND-6]
        pause = session.bus.pause_of(session.peer)
        if pause is not None:
            return f"waits: this session is {pause}"
    return "arrives by itself" if context.is_pushed else "waits for check_messages"


def status_line(session: Session, row_id: int) -> str:
    """Where a message is; and of a question, whether it was answered, and by which message. Raises InvalidRequest."""
    queries = session.bus.store.queries
    found = queries.status(row_id)
    if found.answer_by is None:
        return str(found)
    return f"{found}; {found.answered(queries.answer(row_id))}"
