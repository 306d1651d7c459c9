"""How a message, a time and a finding look on a terminal, in a pipe and as JSON.

rich takes care that there are colours only on a terminal, and none where NO_COLOR is set. This module knows no bus and
reads none. Implements [CLI-3], [CLI-6], [CLI-7].
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from agentbus.core import stderr
from agentbus.core.model import Envelope, MessageState, Pause, Status, timestamp
from agentbus.core.search import MATCH_BEGINS, MATCH_ENDS
from agentbus.core.text import age, span

__all__ = [
    "age",
    "clock",
    "console",
    "contents",
    "envelope_row",
    "exactly",
    "instant",
    "json_line",
    "line",
    "marked",
    "named",
    "pause_row",
    "printable",
    "say",
    "span",
    "status_head",
    "status_line",
    "status_row",
    "to",
    "was",
]

STYLES = {MessageState.PENDING: "yellow", MessageState.DELIVERED: "cyan", MessageState.READ: "green"}
# Control characters, except tab and newline: a peer's text must not control the reader's terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Of the names that a sender had before, this many are shown: the first, and the latest.
_MOST_FORMER = 3


def console() -> Console:
    """The console to print to. It does not guess what a text means, and does not wrap it."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(sentence: str) -> None:
    """Print one line to stderr, for the person and not for the program that reads the output."""
    stderr.say(sentence)


def line(to: Console, text: Text) -> None:
    """Print one line. On a terminal a line that is too long is cut; in a pipe nothing is cut."""
    if to.is_terminal:
        to.print(text, soft_wrap=False, no_wrap=True, overflow="ellipsis", crop=True)
    else:
        to.print(text)


def json_line(row: dict[str, Any]) -> None:
    """Print one object on its own line, in UTF-8 and at once, because the reader of a pipe waits for it. [CLI-3]

    Control and format characters are escaped as JSON does: the value is the same, and it steers no terminal. [CLI-7]
    """
    text = json.dumps(row, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
    _write(text)


def exactly(text: str) -> None:
    """Print `text` byte for byte into a pipe or a file; on a terminal, make it printable. [CLI-7]"""
    _write(printable(text) if sys.stdout.isatty() else text)


def _write(text: str) -> None:
    # Always in UTF-8: a message can hold characters that the locale does not have.
    sys.stdout.flush()
    # A lone surrogate, from a path that is not UTF-8, becomes its escape, which JSON has too.
    sys.stdout.buffer.write(text.encode(errors="backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with its control characters escaped; newlines and tabs too, unless `lines`. [CLI-7]"""
    shown = _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def clock(at_ms: int) -> str:
    """The local time of day, to the millisecond, with the date if it is not today."""
    then, now = time.localtime(at_ms / 1_000), time.localtime()
    day = "" if then[:3] == now[:3] else time.strftime("%Y-%m-%d ", then)
    return f"{day}{time.strftime('%H:%M:%S', then)}.{at_ms % 1_000:03d}"


def instant(at: int | None) -> str | None:
    """An instant in ISO 8601; None if it has not come yet. [CLI-3]"""
    return None if at is None else timestamp(at)


def status_row(status: Status) -> dict[str, Any]:
    """A message as JSON: times in ISO 8601, null for a time that has not come yet. [CLI-3]"""
    row = envelope_row(status)
    return {
        "id": row.pop("id"),
        "state": status.state.value,
        **row,
        "delivered_at": instant(status.delivered_at),
        "carrier": status.carrier,
        "read_at": instant(status.read_at),
        "read_by": status.read_by,
        "sender_session": status.sender_session,
    }


# The keys that a message has before anything is known about its delivery.
_ENVELOPE_KEYS = ("id", "from", "to", "to_group", "text", "reply_to", "thread", "answer_by", "sent_at")


def envelope_row(envelope: Envelope) -> dict[str, Any]:
    """The part of `status_row` that comes from an envelope."""
    names = (envelope.sender, envelope.recipient, envelope.to_group)
    values = (envelope.id, *names, envelope.text, envelope.reply_to, envelope.root)
    instants = (instant(envelope.answer_by), timestamp(envelope.sent_at))
    return dict(zip(_ENVELOPE_KEYS, (*values, *instants), strict=True))


def pause_row(pause: Pause) -> dict[str, Any]:
    """A pause as JSON; `until` is null if a person has to end it."""
    return {"by": pause.by, "since": timestamp(pause.since), "until": instant(pause.until)}


def was(names: Sequence[str]) -> str:
    """What a sender was called before it sent, as `was "x" before`; empty if it had no other name. [NAME-13]"""
    if not names:
        return ""
    shown = [f'"{name}"' for name in (names if len(names) <= _MOST_FORMER else [names[0], *names[1 - _MOST_FORMER :]])]
    if len(names) > _MOST_FORMER:
        shown.insert(1, "...")
    return f"was {', '.join(shown)} before"


def named(sender: str, former: Sequence[str]) -> str:
    """A sender, with the names that it had before."""
    return f"{sender} ({was(former)})" if former else sender


def to(envelope: Envelope) -> str:
    """The recipient, with the group that the message was sent to."""
    return envelope.recipient if envelope.to_group is None else f"{envelope.recipient} ({envelope.to_group})"


def status_line(status: Status, former: Sequence[str] = ()) -> Text:
    """A message on one line: time, id, state, sender with the names that it had before, recipient, text."""
    return status_head(status, former).append(contents(status))


def status_head(status: Status, former: Sequence[str] = ()) -> Text:
    """The line of a message up to its text."""
    text = Text(f"{clock(status.sent_at)}  #{status.id:<5} ")
    text.append(f"{status.state.value:<9}", STYLES[status.state])
    return text.append(f"  {named(status.sender, former)} -> {to(status)}", "bold")


def contents(status: Status) -> Text:
    """The end of a message's line: the id of the message that it answers, and its text."""
    text = Text() if status.reply_to is None else Text(f"  (re #{status.reply_to})", "dim")
    return Text().append(text).append(f"  {printable(status.text, lines=False)}")


def marked(snippet: str) -> Text:
    """A snippet on one line, with the words that were searched for in bold."""
    text = Text()
    for part in snippet.split(MATCH_BEGINS):
        found, ends, rest = part.partition(MATCH_ENDS)
        if not ends:
            found, rest = "", part
        text.append(printable(found, lines=False), "bold magenta")
        text.append(printable(rest, lines=False))
    return text
