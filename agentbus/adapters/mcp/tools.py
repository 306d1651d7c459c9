"""The tools, as plain data and one function each. Arguments are checked here, and every failure is one sentence.

Knows the session, but not the MCP SDK: fast_path.py runs the tools, and sdk.py does so for the calls that it leaves.
Implements [TOOL-1] to [TOOL-5], [ARG-1], [BURST-1], [GROUP-2], [BRAKE-4], [WAKE-5].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentbus.adapters.mcp.asking import ask, status_line
from agentbus.adapters.mcp.hosts import Mode
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.reading import check_messages
from agentbus.adapters.mcp.toolkit import (
    ASIDE_CHARS,
    CALL_META,
    MAX_QUOTED_CHARS,
    Argument,
    Tool,
    ToolContext,
    ToolResult,
    braked,
    name_note,
    told,
    unread_line,
)
from agentbus.core.asking import DEFAULT_S
from agentbus.core.bus import Sent, retry_while_busy
from agentbus.core.errors import AgentbusError, Busy, InvalidRequest, Refused
from agentbus.core.model import MAX_STATUS_CHARS, Pause, Peer, Renamed, check_status
from agentbus.core.session import Session
from agentbus.core.stderr import say
from agentbus.core.text import MAX_REASON_CHARS, age, one_line, word

__all__ = ["TOOLS", "call", "call_now", "listing"]

# The list of peers names so many on other machines. There can be thousands.
_MAX_FAR_NAMES = 50


async def _send_message(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with braked(context, session, session.bus.recipient(arguments["to"])):
        return str(await session.send(arguments["to"], arguments["text"], reply_to=arguments.get("reply_to")))


def _send_message_now(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with braked(context, session, session.bus.recipient(arguments["to"])):
        return str(session.send_now(arguments["to"], arguments["text"], reply_to=arguments.get("reply_to")))


async def _broadcast(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with braked(context, session, None):
        sent = await session.broadcast(arguments["text"], everywhere=arguments.get("everywhere", False))
        return _sent_line(sent)


def _broadcast_now(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with braked(context, session, None):
        return _sent_line(session.broadcast_now(arguments["text"], everywhere=arguments.get("everywhere", False)))


def _sent_line(sent: Sequence[Sent]) -> str:
    if not sent:
        return "nobody else is online; nothing was sent"
    return f"sent to {len(sent)}: " + ", ".join(one.brief for one in sent)


def _line(peer: Peer, own: Peer, usual_trigger: str, groups: Sequence[str], more: Sequence[str]) -> str:
    you = " (you)" if peer.session == own.session else ""
    how = "" if peer.trigger == usual_trigger else f", woken by {word(peer.trigger)}"
    where = f", in {one_line(' '.join(groups))}" if groups else ""
    doing = "".join(f"; {one}" for one in more if one)
    return f"{peer.name}{you}: {word(peer.runtime)} in {one_line(peer.cwd)}{how}{where}{doing}"


def _more(session: Session, peer: Peer, pause: Pause | None, now: int) -> tuple[str, ...]:
    return "" if pause is None else str(pause), session.bus.activity(peer), peer.doing(now)


async def _list_peers(context: ToolContext, session: Session, _arguments: Mapping[str, Any]) -> str:
    own = session.peer
    peers = await session.peers()
    queries, now = session.bus.store.queries, session.bus.clock()
    groups, pauses = queries.groups_of(), queries.pauses(now)
    lines = [
        _line(
            peer,
            own,
            context.usual_trigger,
            groups.get(peer.name, ()),
            _more(session, peer, pauses.get(peer.name), now),
        )
        for peer in peers
    ]
    others = [f"{one.name}: {word(one.runtime)} in {one_line(one.cwd)}, not joined" for one in session.bus.reachable()]
    lines += others
    if not others and all(peer.session == own.session for peer in peers):
        lines.append("nobody else is online; a message to any name waits until a session of that name starts")
    return "\n".join([*lines, *_far_lines(session)])


def _far_lines(session: Session) -> list[str]:
    """The other machines, one a line. [MACH-2]"""
    room, lines, now = _MAX_FAR_NAMES, [], session.bus.clock()
    for machine in session.bus.machines():
        if not machine.is_there:
            lines.append(f"machine {machine.name}: last heard of {age(machine.seen_at, now)} ago")
            continue
        names = [f"{peer.name}@{machine.name}" for peer in machine.peers]
        shown = names[:room]
        room -= len(shown)
        more = [f"{len(names) - len(shown)} more"] if len(names) > len(shown) else []
        lines.append(f"machine {machine.name}: {', '.join([*shown, *more]) or 'nobody, as far as it says'}")
    return lines


async def _whoami(context: ToolContext, session: Session, _arguments: Mapping[str, Any]) -> str:
    peer = session.peer
    pause = session.bus.pause_of(peer)
    waits = context.choice.mode is Mode.PULL or context.trouble()
    how = "messages wait for check_messages" if waits else "messages are pushed into this session"
    return (
        f'you are "{peer.name}", woken by {word(peer.trigger)}, in {one_line(peer.cwd)}{name_note(session)}; '
        f"{how} ({peer.receives})" + ("" if pause is None else f"; {pause}: nothing comes or goes before that")
    )


def _not_for_a_guest(session: Session, what: str) -> None:
    if session.is_guest:
        raise Refused(
            f"{what} to the main agent of this session, and you are a subagent of it", hint="leave it as it is"
        )


async def _set_name(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    _not_for_a_guest(session, "the name belongs")
    if "status" in arguments:
        check_status(arguments["status"])  # before anything is changed
    before = session.peer.name
    said = _named(before, await session.rename(arguments["name"]))
    return f"{said}; {await _say_status(session, arguments['status'])}" if "status" in arguments else said


def _named(before: str, renamed: Renamed) -> str:
    after = renamed.name
    if after == before:
        return f'you are "{after}" already'
    said = f'you are "{after}" now; messages to "{before}" still reach you while this session lives'
    return f"{said}; {renamed.kept_note}" if renamed.kept else said


async def _join_group(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    _not_for_a_guest(session, "its groups belong")
    name = session.peer.name
    group, members, is_new = await retry_while_busy(lambda: session.bus.join_group(name, arguments["group"]))
    others = one_line(", ".join(one for one in members if one != name)) or "nobody else yet"
    return f"you are in {group} {'now' if is_new else 'already'}, with {others}"


async def _leave_group(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    _not_for_a_guest(session, "its groups belong")
    left = await retry_while_busy(lambda: session.bus.leave_group(session.peer.name, arguments["group"]))
    return f"you have left {left}"


async def _set_status(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    _not_for_a_guest(session, "the status belongs")
    return await _say_status(session, arguments["text"])


async def _say_status(session: Session, text: str) -> str:
    status = await session.set_status(text)
    return f"others see the status: {one_line(status, 2 * MAX_STATUS_CHARS)}" if status else "the status is cleared"


async def _message_status(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    return status_line(session, arguments["id"])


_TEXT = Argument("Up to 64 KiB; for more, send the path of a file.")

_GROUP = Argument("Its name, as @review.")


def _highest_id(_profile: Profile) -> int:
    return 2**53 - 1  # the largest whole number that every JSON parser keeps


TOOLS: tuple[Tool, ...] = (
    Tool(
        "send_message",
        "Send a message to a peer: another agent session, not a subagent of yours. If it is offline, it waits.",
        _send_message,
        {
            "to": Argument("The peer's name, or @group."),
            "text": _TEXT,
            "reply_to": Argument("The msg_id that this answers.", False, 1, _highest_id),
        },
        _send_message_now,
        is_loaded=True,
    ),
    Tool(
        "ask",
        "Ask a peer and wait for its answer, which is the result. If none comes, the result says why.",
        ask,
        {
            "to": Argument("The peer's name."),
            "text": _TEXT,
            "wait_s": Argument(
                f"Seconds to wait, by default {DEFAULT_S}.", False, 1, lambda profile: profile.max_wait_s
            ),
        },
    ),
    Tool(
        "broadcast",
        "Send to all online peers.",
        _broadcast,
        {"text": _TEXT, "everywhere": Argument("", False, is_flag=True)},
        _broadcast_now,
    ),
    Tool(
        "list_peers",
        "The peers that are online: name, kind, folder, groups and doing of each.",
        _list_peers,
        only_reads=True,
    ),
    Tool(
        "whoami",
        "Your name on agentbus, and how messages reach you.",
        _whoami,
        only_reads=True,
    ),
    Tool(
        "set_name",
        "Change your name. Pending messages come along, and the old name still reaches you.",
        _set_name,
        {
            "name": Argument("1 to 32 letters and digits, with _ - . between them."),
            "status": Argument("As for set_status.", False),
        },
    ),
    Tool(
        "set_status",
        "Tell peers what you are doing.",
        _set_status,
        {"text": Argument("0 to 120 characters; empty clears it.")},
    ),
    Tool("join_group", "Get what is sent to a group.", _join_group, {"group": _GROUP}),
    Tool("leave_group", "Leave a group.", _leave_group, {"group": _GROUP}),
    Tool(
        "check_messages",
        "Your unread messages, oldest first, each once. A subagent leaves them to the main agent.",
        check_messages,
        {
            "wait_s": Argument(
                "Seconds to wait for one.",
                False,
                0,
                lambda profile: profile.max_wait_s,
            )
        },
        is_loaded=True,
    ),
    Tool(
        "message_status",
        "Whether a message is pending, delivered or read.",
        _message_status,
        {"id": Argument("The number after # that send_message gave.", True, 1, _highest_id)},
        only_reads=True,
    ),
)


def listing(profile: Profile) -> dict[str, Any]:
    """The result of `tools/list`."""
    return {"tools": [tool.listed(profile) for tool in TOOLS]}


_BY_NAME = {tool.name: tool for tool in TOOLS}


def _checked(tool: Tool, arguments: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    for name in arguments:
        if name not in tool.arguments and name not in profile.ignored_arguments:
            takes = ", ".join(tool.arguments) or "no arguments"
            raise InvalidRequest(f"{tool.name} has no argument {name[:MAX_QUOTED_CHARS]!r}", hint=f"it takes {takes}")
    checked: dict[str, Any] = {}
    for name, argument in tool.arguments.items():
        if arguments.get(name) is not None:  # null is what some clients send for nothing [ARG-1]
            checked[name] = argument.check(name, arguments[name], profile)
        elif argument.is_required:
            raise InvalidRequest(f"{tool.name} needs the argument {name!r}", hint=argument.description)
    return checked


async def call(
    context: ToolContext,
    name: str,
    arguments: Mapping[str, Any] | None,
    meta: Mapping[str, Any] | None = None,
) -> ToolResult:
    """Run a tool. `meta` is the `_meta` of the call. [TOOL-2]"""
    CALL_META.set(meta or {})
    if context.arrival is not None:
        await context.arrival.over.wait()
    tool = _BY_NAME.get(name)
    session = context.session
    if session is None:
        reason = told(context, context.choice.reason, MAX_REASON_CHARS)
        return ToolResult(f"this is no session: {reason}", is_error=True)
    if context.aside():
        return ToolResult(told(context, context.aside(), ASIDE_CHARS), is_error=True)
    try:
        if tool is None:
            known = ", ".join(_BY_NAME)
            result = ToolResult(f"there is no tool {name[:MAX_QUOTED_CHARS]!r}: use {known}", is_error=True)
        else:
            try:
                done = await tool.run(context, session, _checked(tool, arguments or {}, context.profile))
                result = ToolResult(done) if isinstance(done, str) else done
            except AgentbusError as error:
                result = ToolResult(str(error), is_error=True)
        return _finished(context, session, result)
    except Exception as error:  # noqa: BLE001 - see _fault
        return _fault(name, error)


def call_now(context: ToolContext, name: str, arguments: Mapping[str, Any] | None) -> ToolResult | None:
    """Run a tool, with the same result as `call`. If the tool could have to wait for long, do nothing and return None.

    Raises Busy, with nothing done, if the tool has to wait for another process or for an earlier call.
    """
    tool, session = _BY_NAME.get(name), context.session
    if tool is None or tool.run_now is None or session is None or context.aside():
        return None
    try:
        try:
            result = ToolResult(tool.run_now(context, session, _checked(tool, arguments or {}, context.profile)))
        except Busy:
            raise
        except AgentbusError as error:
            result = ToolResult(str(error), is_error=True)
        return _finished(context, session, result)
    except Busy:
        raise
    except Exception as error:  # noqa: BLE001 - see _fault
        return _fault(name, error)


def _fault(name: str, error: Exception) -> ToolResult:
    """The result of a call that met a fault of ours: only this call fails, and stderr says so. [ERR-2]"""
    fault = f"internal error, {type(error).__name__}: {error}"
    say(f"{name}: {fault}")
    return ToolResult(fault, is_error=True)


def _finished(context: ToolContext, session: Session, result: ToolResult) -> ToolResult:
    notice = session.take_notice()
    if notice:
        result = replace(result, text=f"{result.text}\n{notice}")
    if result.settle is None:
        # No message stands in it, but a folder can have a tag of the client in its name. [TRUST-5]
        text = context.profile.frames.defused(result.text)
        result = result if text == result.text else replace(result, text=text)
    if context.is_pushed or result.settle is not None:
        return result
    return ToolResult(result.text + unread_line(session), result.is_error)
