"""`agentbus search`: finds messages by their words, the best match first.

Brings the index up to date, says on stderr how that goes if it takes long, and changes nothing else.
Implements [SEARCH-1], [SEARCH-4], [CLI-3].
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from agentbus.cli import common, output
from agentbus.cli.messages import message_row, parse_peer, parse_since
from agentbus.core.bus import now_ms
from agentbus.core.search import MATCH_BEGINS, MATCH_ENDS, MOST_RANKED

__all__ = ["search"]

# Fewer messages are taken up before a person wonders.
_FEW = 20_000
_PROGRESS_S = 5.0
_MARKS = re.compile(f"[{MATCH_BEGINS}{MATCH_ENDS}]")


class _Progress:
    """Says on stderr how far the index is: once when it begins, and then every 5 s."""

    def __init__(self) -> None:
        self._due_at: float | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._due_at is None and total > _FEW:
            output.say(f"indexing {total:,} messages; the next search only adds what is new")
        elif self._due_at is None or time.monotonic() < self._due_at:
            return
        else:
            output.say(f"indexed {done:,} of {total:,}")
        self._due_at = time.monotonic() + _PROGRESS_S


def search(
    words: Sequence[str], *, peer: str | None, since: str | None, thread: int | None, limit: int, as_json: bool
) -> None:
    """Show the messages that match best. Raises InvalidRequest."""
    text = " ".join(words)
    name = None if peer is None else parse_peer(peer)
    start = 0 if since is None else parse_since(since, now_ms())
    with common.bus_and_settings() as (bus, _settings):
        queries, index = bus.store.queries, bus.store.search_index()
        among = None if thread is None else [one.id for one in queries.thread(queries.status(thread).root)]
        found = index.search(text, limit=limit + 1, peer=name, since=start, among=among, tell=_Progress())
        hits = found.hits[:limit]
        former = queries.earlier_names([hit.message for hit in hits])
    out = output.console()
    for hit in hits:
        if as_json:
            output.json_line({**message_row(hit.message, former), "snippet": _MARKS.sub("", hit.snippet)})
        else:
            line = output.status_head(hit.message, former.get(hit.message.id, ()))
            output.line(out, line.append("  ").append(output.marked(hit.snippet)))
    if as_json:
        return
    if not hits:
        print("no message matches")
    if len(found.hits) > limit:
        output.say(f"there are more matches: --limit {limit * 10}")
    if found.is_cut:
        output.say(f"{MOST_RANKED:,} messages or more match, and the best of the newest {MOST_RANKED:,} are shown")
