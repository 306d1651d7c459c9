"""The commands that read the mailboxes: inbox, history, status, which change nothing; and those that remove mail.

Implements [OLD-2], [OLD-3], [KEEP-1], [LEDGER-1] to [LEDGER-3], [CLI-3].
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from rich.text import Text

from agentbus.cli import common, output
from agentbus.core import a2a
from agentbus.core.bus import Bus, now_ms
from agentbus.core.config import RETENTION, Settings
from agentbus.core.errors import InvalidRequest, Refused
from agentbus.core.model import MessageState, Status, timestamp
from agentbus.core.names import group_name, is_group, shown_address
from agentbus.core.stdout import reported
from agentbus.core.text import one_line, word

__all__ = [
    "cancel",
    "discard",
    "history",
    "inbox",
    "message_row",
    "parse_peer",
    "parse_since",
    "parse_span",
    "prune",
    "status",
]

_SPAN = re.compile(r"(\d{1,6})\s*(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400}


def parse_since(text: str, now: int, what: str = "--since") -> int:
    """The instant that `10m`, `2h`, `3d`, `2026-01-31` or `2026-01-31T12:00` means, in ms since 1970 UTC.

    A date without a zone is in local time. Raises InvalidRequest.
    """
    found = _SPAN.fullmatch(text.strip().lower())
    if found:
        return now - int(found[1]) * _SECONDS[found[2]] * 1_000
    try:
        return int(datetime.fromisoformat(text.strip()).timestamp() * 1_000)
    except (ValueError, OverflowError, OSError):
        raise InvalidRequest(
            f"{what} is {text[:40]!r}", hint="use an age (90s, 10m, 2h, 3d) or a time (2026-01-31T12:00)"
        ) from None


def parse_span(what: str, text: str, most_days: int) -> int:
    """The length of time that `90s`, `10m`, `2h` or `3d` is, in ms: 1 s to `most_days`. Raises InvalidRequest."""
    found = _SPAN.fullmatch(text.strip().lower())
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not 1 <= seconds <= most_days * 86_400:
        raise InvalidRequest(f"{what} is {text[:40]!r}", hint=f"use 90s, 10m, 2h or 3d, from 1s to {most_days}d")
    return seconds * 1_000


def parse_peer(text: str) -> str:
    """The mailbox, or the group, whose messages are meant, also one whose name is no address any more.

    Raises InvalidRequest.
    """
    return group_name(text) if is_group(text) else shown_address(text)


def _parse_grep(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise InvalidRequest(
            f"--grep is {text[:40]!r}, which is not a regular expression ({error})", hint="put \\ before ( [ * + ? . |"
        ) from None


def _mailbox(bus: Bus, settings: Settings, name: str | None) -> str:
    # Any mailbox can be looked into, also one whose name is no address any more.
    return common.own_name(bus, settings, None) if name is None else shown_address(name)


def inbox(name: str | None, *, limit: int, as_json: bool) -> None:
    """Show the messages of a mailbox that are not known to be read: the mailbox of `name`, by default the caller's."""
    with common.bus_and_settings() as (bus, settings):
        mailbox = _mailbox(bus, settings, name)
        found = bus.store.queries.inbox(mailbox, limit + 1)
        former = bus.store.queries.earlier_names(found)
    shown, is_more = found[:limit], len(found) > limit
    if as_json:
        for one in shown:
            output.json_line(message_row(one, former))
        return
    out = output.console()
    for one in shown:
        out.print(_heading(one, former.get(one.id, ())))
        out.print(_indented(one.text))
    if not shown:
        out.print(f'nothing unread in the mailbox of "{mailbox}"')
    if is_more:
        out.print(f"there is more: agentbus inbox {mailbox} --limit {limit * 10}")


def discard(name: str | None, *, before: str | None, is_sure: bool, as_json: bool) -> None:
    """Remove what `inbox` shows, or what of it is older than `before`, and print what was removed. [OLD-2]

    Raises InvalidRequest where nobody can be asked and `is_sure` is not given, and Refused when the answer is no.
    """
    instant = 2**63 - 1 if before is None else parse_since(before, now_ms(), "--before")
    if not is_sure and not sys.stdin.isatty():
        raise InvalidRequest("nobody can be asked here, nothing was removed", hint="add --yes")
    with common.bus_and_settings() as (bus, settings):
        mailbox = _mailbox(bus, settings, name)
        if not is_sure:
            older = "" if before is None else f" that are older than {before}"
            print(
                f'remove the unread messages of "{mailbox}"{older} for good? [y/N] ',
                end="",
                file=sys.stderr,
                flush=True,
            )
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise Refused("nothing was removed")
        removed = bus.discard(mailbox, instant)
    with reported():
        _show_removed(mailbox, removed, as_json=as_json)


def _show_removed(mailbox: str, removed: list[Status], *, as_json: bool) -> None:
    if as_json:
        for one in removed:
            output.json_line(output.status_row(one))
        return
    if not removed:
        print(f'nothing to remove in the mailbox of "{mailbox}"')
        return
    pending = sum(one.state is MessageState.PENDING for one in removed)
    senders = ", ".join(f"{who} {count:,}" for who, count in Counter(one.sender for one in removed).most_common())
    print(
        f'removed {len(removed):,} {"message" if len(removed) == 1 else "messages"} from the mailbox of "{mailbox}"'
        f" ({pending:,} pending, {len(removed) - pending:,} delivered): from {senders};"
        f" sent {timestamp(removed[0].sent_at)} to {timestamp(removed[-1].sent_at)}"
    )


def cancel(row_id: int) -> None:
    """Take back a message that is still pending. Raises InvalidRequest and Refused. [OLD-3]"""
    with common.bus_and_settings() as (bus, _settings):
        one = bus.cancel(row_id)
    with reported():
        print(
            f'took back #{one.id} from "{one.sender}" to "{one.recipient}",'
            f" {output.age(one.sent_at, now_ms())} after it was sent"
        )


def prune(*, before: str | None, peer: str | None, with_pending: bool) -> None:
    """Remove what was delivered, and print how many messages that were. Raises InvalidRequest. [KEEP-1]"""
    if with_pending and before is None and peer is None:
        raise InvalidRequest("--pending needs to know which mail", hint="add --before WHEN or --peer NAME")
    name = None if peer is None else parse_peer(peer)
    instant = None if before is None else parse_since(before, now_ms(), "--before")
    with common.bus_and_settings() as (bus, _settings):
        hours = bus.store.queries.setting(RETENTION)
        if instant is None:
            instant = 2**63 - 1 if name is not None else now_ms() - hours * 3_600_000
        removed = bus.prune(instant, peer=name, with_pending=with_pending)
    with reported():
        if not removed:
            kept = f" that is older than {hours:,} h" if before is None and name is None else ""
            print(f"no {'' if with_pending else 'delivered '}message to remove{kept}")
            return
        pending = f", {sum(removed):,} of them pending" if with_pending else ""
        print(f"removed {len(removed):,} {'message' if len(removed) == 1 else 'messages'}{pending}")


def _indented(text: str) -> Text:
    return Text("    " + output.printable(text).replace("\n", "\n    "))


def message_row(one: Status, former: Mapping[int, list[str]]) -> dict[str, Any]:
    """A message as JSON, with what its sender was called before. [NAME-13]"""
    return {**output.status_row(one), "sender_was": former.get(one.id, [])}


def _heading(one: Status, former: Sequence[str]) -> Text:
    text = Text(f"#{one.id} from ")
    text.append(output.named(one.sender, former), "bold")
    text.append(f", {output.age(one.sent_at, now_ms())} ago, ")
    text.append(one.state.value, output.STYLES[one.state])
    if one.state is MessageState.DELIVERED:
        text.append(f" by {word(one.carrier)}, whether it was read is not known")
    if one.to_group is not None:
        text.append(f", to {one.to_group}")
    if one.reply_to is not None:
        text.append(f", answers #{one.reply_to}")
    return text


def history(
    *,
    peer: str | None,
    since: str | None,
    grep: str | None,
    limit: int,
    as_json: bool,
    as_a2a: bool = False,
    thread: int | None = None,
) -> None:
    """Show the newest messages of all mailboxes, the oldest of these first. Raises InvalidRequest."""
    if as_json and as_a2a:
        raise InvalidRequest("--json and --a2a cannot be used together", hint="choose one")
    name = None if peer is None else parse_peer(peer)
    start = 0 if since is None else parse_since(since, now_ms())
    wanted = _parse_grep(grep) if grep is not None else None
    with common.bus_and_settings() as (bus, _settings):
        all_of_them = bus.store.queries.newest_first(peer=name, since=start, thread=thread)
        found = list(islice((one for one in all_of_them if wanted is None or wanted.search(one.text)), limit))
        if as_a2a:
            for one in reversed(found):
                output.json_line(a2a.to_a2a(one))
            return
        former = bus.store.queries.earlier_names(found)
    if not as_json and not found:
        print("no such message" if name or since or grep or thread else "no message was sent yet, or all are pruned")
    out = output.console()
    for one in reversed(found):
        if as_json:
            output.json_line(message_row(one, former))
        else:
            output.line(out, output.status_line(one, former.get(one.id, ())))


def status(row_id: int, *, as_json: bool) -> None:
    """Show one message and its state. Raises InvalidRequest when there is no message with that id."""
    with common.bus_and_settings() as (bus, _settings):
        found = bus.store.queries.status(row_id)
        former = bus.store.queries.earlier_names([found])
        answer = None if found.answer_by is None else bus.store.queries.answer(row_id)
        by = None if found.sender_session is None else bus.store.queries.session(found.sender_session)
    if as_json:
        output.json_line({**message_row(found, former), "answered_by": None if answer is None else answer.id})
        return
    out = output.console()
    out.print(str(found))
    if found.sender_session is not None:
        name, runtime, folder = by or (found.sender, "forgotten", "")
        where = f"{word(runtime)} in {one_line(folder)}" if folder else word(runtime)
        where += f", {output.was(former[found.id])}" if found.id in former else ""
        now = "" if name == found.sender else f', "{name}" since'
        out.print(f"    sent by session {found.sender_session} ({where}{now})")
    if found.reply_to is not None:
        out.print(f"    answers #{found.reply_to}")
    if found.answer_by is not None:
        out.print(f"    {found.answered(answer)}")
    out.print(_indented(found.text))
