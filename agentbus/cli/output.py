"""How a message, a time and a finding look on a terminal, in a pipe and as JSON.

Colours only on a terminal, and not where NO_COLOR is set: rich sees to both. Knows no bus and reads none. Implements
[CLI-3], [CLI-6], [CLI-7].
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

from rich.console import Console
from rich.text import Text

from agentbus.core.model import Envelope, MessageState, Status, timestamp

__all__ = [
    "age",
    "clock",
    "console",
    "contents",
    "envelope_row",
    "exactly",
    "json_line",
    "line",
    "printable",
    "say",
    "span",
    "status_line",
    "status_row",
]

STYLES = {MessageState.PENDING: "yellow", MessageState.DELIVERED: "cyan", MessageState.READ: "green"}
# Control characters, but for tab and newline: what a peer has written must not steer the reader's terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read our output has had enough: rich would exit with 1, and __main__ knows that this is no error."""
        raise BrokenPipeError


def console() -> Console:
    """Where to print: no guessing of what a text means, no wrapping of it."""
    return _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(sentence: str) -> None:
    """One line to stderr, for the person and not for whoever reads the output."""
    print(f"agentbus: {sentence}", file=sys.stderr, flush=True)


def line(to: Console, text: Text) -> None:
    """Print one line; on a terminal what is too long for it is cut, in a pipe nothing is."""
    if to.is_terminal:
        to.print(text, soft_wrap=False, no_wrap=True, overflow="ellipsis", crop=True)
    else:
        to.print(text)


def json_line(row: dict[str, Any]) -> None:
    """One object on a line of its own, in UTF-8 and at once: who reads a pipe waits for it. [CLI-3]"""
    _write(json.dumps(row, ensure_ascii=False))


def exactly(text: str) -> None:
    """`text`, byte for byte, into a pipe or a file; made printable on a terminal. [CLI-7]"""
    _write(printable(text) if sys.stdout.isatty() else text)


def _write(text: str) -> None:
    # In UTF-8 whatever the locale says: a message may hold what the locale cannot.
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with its control characters shown and not sent; newlines and tabs too, unless `lines`. [CLI-7]"""
    shown = _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def span(ms: float) -> str:
    """A length of time in the unit that suits it."""
    if ms < 1_000:
        return f"{ms:.0f} ms"
    seconds = ms / 1_000
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def age(at_ms: int, now_ms: int) -> str:
    """How long ago that was; a clock that went back makes it now."""
    return span(max(1_000, now_ms - at_ms))


def clock(at_ms: int) -> str:
    """The time of day here, to the millisecond, with the date where it is not today's."""
    then, now = time.localtime(at_ms / 1_000), time.localtime()
    day = "" if then[:3] == now[:3] else time.strftime("%Y-%m-%d ", then)
    return f"{day}{time.strftime('%H:%M:%S', then)}.{at_ms % 1_000:03d}"


def status_row(status: Status) -> dict[str, Any]:
    """A message as JSON: the instants in ISO 8601, null for what has not happened. [CLI-3]"""

    def instant(at: int | None) -> str | None:
        return None if at is None else timestamp(at)

    row = envelope_row(status)
    return {
        "id": row.pop("id"),
        "state": status.state.value,
        **row,
        "delivered_at": instant(status.delivered_at),
        "carrier": status.carrier,
        "read_at": instant(status.read_at),
    }


# The keys that a message has before anything is known about its way.
_ENVELOPE_KEYS = ("id", "from", "to", "text", "reply_to", "sent_at")


def envelope_row(envelope: Envelope) -> dict[str, Any]:
    """The part of `status_row` that an envelope has."""
    values = (envelope.id, envelope.sender, envelope.recipient, envelope.text, envelope.reply_to)
    return dict(zip(_ENVELOPE_KEYS, (*values, timestamp(envelope.sent_at)), strict=True))


def status_line(status: Status) -> Text:
    """A message on one line: when, which, where it is, from whom to whom, what."""
    text = Text(f"{clock(status.sent_at)}  #{status.id:<5} ")
    text.append(f"{status.state.value:<9}", STYLES[status.state])
    text.append(f"  {status.sender} -> {status.recipient}", "bold")
    return text.append(contents(status))


def contents(status: Status) -> Text:
    """What ends the line of a message: which one it answers, and its text."""
    text = Text() if status.reply_to is None else Text(f"  (re #{status.reply_to})", "dim")
    return Text().append(text).append(f"  {printable(status.text, lines=False)}")
