"""Turns an envelope into an A2A 1.0 `Message` and back: the form for other machines and other programs.

Pure: values in, values out, and no A2A library. The field names are those of the protocol's JSON form,
https://a2a-protocol.org/latest/specification (Message, Part). Implements [ENV-1] to [ENV-3].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from agentbus.core.errors import InvalidRequest
from agentbus.core.model import Envelope, check_body
from agentbus.core.names import NAME_RULE, group_name, shown_address
from agentbus.core.text import one_line

__all__ = ["METADATA_KEY", "from_a2a", "message_id", "split_id", "to_a2a"]

# This key holds the values that A2A has no field for. The number is the version of this form: a reader that does not
# know it must not guess.
METADATA_KEY = "agentbus/1"
# A2A knows only users and agents, so a message from a peer counts as an agent's.
_ROLE = "ROLE_AGENT"
_ID = re.compile(r"(?:([0-9a-f]{16})\.)?([1-9]\d{0,15})")
# The largest whole number that every JSON parser preserves; instants and ids are below it.
_HIGHEST = 2**53 - 1
_MAX_QUOTED_CHARS = 48


def message_id(row_id: int, bus: str = "") -> str:
    """The id of a message outside its bus: the id of the bus (16 hex digits), if it has one, and its own. [ENV-1]"""
    return f"{bus}.{row_id}" if bus else str(row_id)


def split_id(text: object) -> tuple[str, int]:
    """Split the text that `message_id` made into bus and id; the bus is "" if none is named. Raises InvalidRequest."""
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[2]) > _HIGHEST:
        raise InvalidRequest(f"{_quoted(text)} is not a message id", hint="use BUS.NUMBER or NUMBER")
    return found[1] or "", int(found[2])


def to_a2a(envelope: Envelope, *, bus: str = "", answers: str | None = None) -> dict[str, Any]:
    """`envelope` as a `Message`, ready for `json.dumps`. `bus` is the identity of the bus of the ids. [ENV-1]

    `answers` is the id of what it answers, in the form of `message_id`, where that is of another bus. It is then taken
    for the beginning of the thread, too.
    """
    root = answers or message_id(envelope.root, bus)
    if answers is None and envelope.reply_to is not None:
        answers = message_id(envelope.reply_to, bus)
    more: dict[str, Any] = {"from": envelope.sender, "to": envelope.recipient, "sentAt": envelope.sent_at}
    message: dict[str, Any] = {
        "messageId": message_id(envelope.id, bus),
        "contextId": root,
        "role": _ROLE,
        "parts": [{"text": envelope.text}],
        "metadata": {METADATA_KEY: more},
    }
    if answers is not None:
        message["referenceTaskIds"] = [answers]
        more["replyTo"] = answers
    if envelope.to_group is not None:
        more["toGroup"] = envelope.to_group
    if envelope.answer_by is not None:
        more["answerBy"] = envelope.answer_by
    return message


def from_a2a(message: object, *, max_bytes: int) -> Envelope:
    """The envelope in a `Message` that `to_a2a` made, here or elsewhere. [ENV-2]

    Unknown fields and unknown metadata are ignored. `max_bytes` bounds the text, in bytes of UTF-8.

    Raises InvalidRequest, naming the field, for anything that `to_a2a` could not have made.
    """
    fields = _object(message, "the message")
    more = _object(_object(fields.get("metadata"), "metadata").get(METADATA_KEY), f"metadata[{METADATA_KEY!r}]")
    row_id = split_id(fields.get("messageId"))[1]
    answered = None if more.get("replyTo") is None else split_id(more["replyTo"])[1]
    return Envelope(
        id=row_id,
        sender=_name(more.get("from"), "from"),
        recipient=_name(more.get("to"), "to"),
        text=check_body(_text(fields.get("parts")), max_bytes),
        sent_at=_instant(more.get("sentAt"), "sentAt"),
        reply_to=answered,
        thread=_thread(fields.get("contextId"), row_id, answered),
        answer_by=None if more.get("answerBy") is None else _instant(more["answerBy"], "answerBy"),
        to_group=None if more.get("toGroup") is None else _name(more["toGroup"], "toGroup", group_name),
    )


def _thread(context: object, row_id: int, answered: int | None) -> int | None:
    """The thread that `contextId` names; it is left out, or no id of ours, in what others made."""
    try:
        root = split_id(context)[1]
    except InvalidRequest:
        return answered
    return None if root == row_id else root


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"{what} is not a JSON object", hint=f"an A2A Message of agentbus has {METADATA_KEY!r} in it"
        )
    return value


def _name(value: object, what: str, form: Callable[[str], str] = shown_address) -> str:
    # Not normalised here: a bus gives out names only in their one form.
    with suppress(InvalidRequest):
        if isinstance(value, str) and form(value) == value:
            return value
    raise InvalidRequest(f"{what!r} is {_quoted(value)}", hint=NAME_RULE)


def _quoted(value: object) -> str:
    return f"'{one_line(str(value), _MAX_QUOTED_CHARS)}'"


def _text(parts: object) -> str:
    part = parts[0] if isinstance(parts, list) and len(parts) == 1 else None
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise InvalidRequest("the message does not have exactly one text part", hint="send a file's path as text")
    return text


def _instant(value: object, what: str) -> int:
    # The protocol's own types keep every number as a float.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _HIGHEST:
        raise InvalidRequest(f"{what!r} is {_quoted(value)}", hint="use milliseconds since 1970 UTC, as a whole number")
    return value
