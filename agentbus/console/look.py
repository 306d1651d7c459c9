"""How the console draws messages and peers: as texts of rich, with signs and colours. Knows no widget.

What others wrote is escaped first, so that it steers no terminal and breaks no line. Implements [CONSOLE-5].
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from rich.text import Text

from agentbus.cli import output
from agentbus.core.bus import HOOK, PULL
from agentbus.core.model import MessageState, Pause, Peer, Status
from agentbus.core.search import Hit
from agentbus.core.text import escaped, one_line, word

__all__ = ["FOLDED_LINES", "message_head", "message_text", "peer_lines", "plain"]

# A longer text is folded to this many lines until it is opened.
FOLDED_LINES = 6
# Of a folded text no more than this is looked at: it may have a million characters.
_FOLDED_CHARS = 4_000
# A peer that was last seen longer ago than this is said to be so.
_SILENT_MS = 30_000
_SIGNS = {MessageState.PENDING: "○", MessageState.DELIVERED: "◐", MessageState.READ: "●"}


def plain(text: str) -> str:
    """`text` with its line breaks, and with every other character that is not seen as its escape."""
    return "\n".join(map(escaped, text.expandtabs(4).split("\n")))


def message_head(copies: Sequence[Status], name: str, answered: Collection[int], *, width: int) -> Text:
    """The first line of a message: when, from whom, to whom, its state and its number.

    `copies` has several if it was sent to a group: the first is the one that is shown.
    """
    message = copies[0]
    is_mine = message.recipient == name
    is_unopened = is_mine and message.state is not MessageState.READ
    head = Text(no_wrap=True, overflow="ellipsis", end="")
    head.append(_clock(message.sent_at), "dim")
    head.append("  ")
    head.append(escaped(message.sender), "bold" if is_unopened else "")
    head.append(" → ", "dim")
    if message.to_group:
        head.append(escaped(message.to_group), "magenta")
        head.append(f" ({len(copies)})" if len(copies) > 1 else "", "dim")
        head.append(", " if is_mine or len(copies) == 1 else "", "dim")
    if is_mine:
        head.append("you", "bold reverse" if is_unopened else "")
    elif len(copies) == 1:
        head.append(escaped(message.recipient))
    head.append("  ")
    head.append_text(_states(copies))
    if message.answer_by is not None:
        is_answered = message.id in answered
        head.append("  ✓ answered" if is_answered else "  ? unanswered", "green" if is_answered else "yellow")
    head.append(f"  #{message.id}", "dim")
    if message.reply_to is not None:
        head.append(f" ↩ #{message.reply_to}", "dim")
    head.truncate(max(1, width), overflow="ellipsis")
    return head


def _states(copies: Sequence[Status]) -> Text:
    text = Text()
    for state in MessageState:
        count = sum(one.state is state for one in copies)
        if count:
            number = f"{count} " if len(copies) > 1 else ""
            text.append(f"{' ' if text else ''}{_SIGNS[state]} {number}{state.value}", output.STYLES[state])
    if any(one.state is MessageState.PENDING and one.returned_at is not None for one in copies):
        text.append(" ↺ returned", "yellow")
    return text


def message_text(message: Status, *, is_folded: bool) -> Text:
    """The text of a message; if it is folded, its beginning."""
    text = message.text[:_FOLDED_CHARS] if is_folded else message.text
    return Text(plain(text), end="")


def peer_lines(peer: Peer, pending: int, now: int, *, is_you: bool, activity: str, pause: Pause | None) -> Text:
    """A peer in the list: its name and signs, how it receives, and below what it is doing, as far as it says so."""
    text = Text(no_wrap=True, overflow="ellipsis", end="")
    waits = pause is not None or peer.delivery in (PULL, HOOK)
    text.append("‖ " if pause is not None else "● ", "yellow" if waits else "green")
    text.append(escaped(peer.name), "bold")
    text.append(" (you)" if is_you else "", "dim")
    text.append(f" {activity}" if activity else "", "cyan")
    text.append(f" ✉ {pending:,}" if pending else "", "yellow")
    text.append(f"\n  {word(peer.runtime)}, {word(peer.delivery)}", "dim")
    # Where a lock tells that it lives, it was seen just now.
    text.append(f", {output.age(peer.last_seen, now)} ago" if now - peer.last_seen > _SILENT_MS else "", "dim")
    if pause is not None:
        text.append(f"\n  {pause}", "yellow")
    if peer.status and peer.status_at is not None:
        # The age first: where the line is too long, its end is cut.
        text.append(f"\n  {output.age(peer.status_at, now)}: {escaped(peer.status)}", "italic")
    return text


def offline_line(name: str, pending: int) -> Text:
    """A name that nobody has now, and for which mail waits."""
    text = Text(no_wrap=True, overflow="ellipsis", end="")
    text.append("○ ", "dim")
    text.append(escaped(name), "dim")
    text.append(f"  ✉ {pending:,}", "yellow")
    text.append("\n  offline", "dim")
    return text


def group_line(group: str, members: Sequence[str]) -> Text:
    """A group, and how many are in it."""
    text = Text(no_wrap=True, overflow="ellipsis", end="")
    text.append(escaped(group), "magenta")
    text.append(f"  {len(members)} in it\n  {', '.join(map(escaped, members))}", "dim")
    return text


def found_lines(hit: Hit) -> Text:
    """A message that was found: its head, and the part of it that matches."""
    text = output.status_head(hit.message, ())
    text.append("\n  ")
    text.append_text(output.marked(hit.snippet))
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def details(message: Status) -> Text:
    """All that is known about a message, for the side panel."""
    text = Text()
    text.append(f"#{message.id}\n", "bold")
    text.append(f"from  {escaped(message.sender)}\nto    {escaped(message.recipient)}\n")
    instants = (message.sent_at, message.delivered_at, message.read_at, message.returned_at)
    for what, at in zip(("sent", "delivered", "read", "returned"), instants, strict=True):
        if at is not None:
            text.append(f"{what:<10}{output.clock(at)}\n", "dim")
    if message.carrier:
        text.append(f"by {one_line(message.carrier)}\n", "dim")
    if message.answer_by is not None:
        text.append(f"an answer is awaited until {output.clock(message.answer_by)}\n", "yellow")
    text.append("\n")
    text.append(plain(message.text))
    return text


def _clock(at_ms: int) -> str:
    then, now = time.localtime(at_ms / 1_000), time.localtime()
    day = "" if then[:3] == now[:3] else time.strftime("%m-%d ", then)
    return day + time.strftime("%H:%M:%S", then)
