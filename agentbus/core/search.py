"""Full-text search over the messages of a bus, by an index (FTS5) that is brought up to date when it is searched.

The index is in the database of the bus, so it is restored, replaced and set aside with it. It is made by the first
search: a bus that nobody searches has none, and no send ever waits for it. Knows nothing about printing. Synchronous;
the first search of a long history takes seconds. Implements [SEARCH-1] to [SEARCH-6].
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from agentbus.core.database import Database
from agentbus.core.errors import DamagedIndex, InvalidRequest
from agentbus.core.model import Status
from agentbus.core.names import is_group
from agentbus.core.queries import TEXT, Queries, listed

__all__ = ["MATCH_BEGINS", "MATCH_ENDS", "MOST_RANKED", "Found", "Hit", "SearchIndex", "expression"]

# What stands before and after each word of a snippet that was searched for.
MATCH_BEGINS, MATCH_ENDS = "\x01", "\x02"
# Of more matches than this, the newest are ranked: to rank 700,000 takes 0.4 s, and nobody looks at them all.
MOST_RANKED = 5_000
# A search is typed, or written by a model. This is far more than either needs, and keeps an error readable.
_MAX_CHARS = 1_000
_SNIPPET_WORDS = 16
# For how long one batch of the catch-up holds up those who write, without its commit, which takes 10 ms and now and
# then 70. CPU time, so that a busy machine does not make the batches small, whose commits cost more than they hold.
_HOLD_S = 0.02
# Between two batches those who wait get a turn.
_PAUSE_S = 0.01

# The index holds the words, and finds the text in the tables of the messages, so that it is not stored twice. To take
# a message out, it has to be given what it was given before. So a message that is deleted, or goes to another name,
# changes the index in the same transaction, whatever program does so, also one of an older version.
_MAKE = f"""
CREATE VIEW search_texts (id, text, names) AS SELECT m.id, {TEXT}, m.sender || ' ' || m.recipient FROM messages m;
CREATE VIRTUAL TABLE search USING fts5 (
    text, names, content = 'search_texts', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER search_forgets BEFORE DELETE ON messages
WHEN EXISTS (SELECT 1 FROM search_docsize WHERE id = old.id)
BEGIN
    INSERT INTO search (search, rowid, text, names) SELECT 'delete', * FROM search_texts WHERE id = old.id;
END;
CREATE TRIGGER search_loses_name BEFORE UPDATE OF recipient ON messages
WHEN EXISTS (SELECT 1 FROM search_docsize WHERE id = old.id)
BEGIN
    INSERT INTO search (search, rowid, text, names) SELECT 'delete', * FROM search_texts WHERE id = old.id;
END;
CREATE TRIGGER search_gets_name AFTER UPDATE OF recipient ON messages
WHEN new.id <= (SELECT max(id) FROM search_docsize)
BEGIN
    INSERT INTO search (rowid, text, names) SELECT * FROM search_texts WHERE id = new.id;
END;
"""
_DROP = """
DROP TRIGGER search_forgets;
DROP TRIGGER search_loses_name;
DROP TRIGGER search_gets_name;
DROP TABLE search;
DROP VIEW search_texts;
"""
# The highest id in the index. Ids are committed in their order, so all that are below it are there.
_NEWEST = "SELECT coalesce(max(id), 0) FROM search_docsize"
# CROSS JOIN: the index comes first. It has the newest match first without sorting.
_RANKED = """
SELECT id, count(*) OVER () FROM (
    SELECT m.id AS id, bm25(search, 1, 0) AS score FROM search CROSS JOIN messages m ON m.id = search.rowid
    WHERE search.text MATCH ?1 {} AND search.rowid BETWEEN ?2 AND ?3 AND m.sent_at >= ?4
        AND (?5 IS NULL OR m.id IN (SELECT value FROM json_each(?5)))
        AND (?6 IS NULL OR ?6 IN (m.sender, m.recipient, m.to_group))
    ORDER BY search.rowid DESC LIMIT ?7
) ORDER BY score, id DESC LIMIT ?8
"""
# The names of both peers stand in one text, and are cut into words. This finds some that it must not, which the
# condition on the message leaves out, and is only there to be quick.
_TO_OR_FROM = """AND search.names MATCH '"' || replace(?6, '"', '""') || '"'"""
# The +: for each id alone, a prefix of one letter would be looked up anew.
_SNIPPETS = f"""
SELECT rowid, snippet(search, 0, char({ord(MATCH_BEGINS)}), char({ord(MATCH_ENDS)}), '...', {_SNIPPET_WORDS})
FROM search WHERE search.text MATCH ?1 AND rowid BETWEEN ?2 AND ?3 AND +rowid IN (SELECT value FROM json_each(?4))
"""

_PART = re.compile(r'"(?P<phrase>(?:[^"]|"")*)"(?P<star>\*?)|(?P<word>[^\s"]+)|(?P<open>")')
_OPERATORS = ("AND", "OR", "NOT")


@dataclass(frozen=True, slots=True)
class Hit:
    """A message that matches, and the part of its text around the match, with MATCH_BEGINS and MATCH_ENDS in it."""

    message: Status
    snippet: str


@dataclass(frozen=True, slots=True)
class Found:
    """The best matches, the best first. `is_cut`: only the newest MOST_RANKED matches were ranked."""

    hits: list[Hit]
    is_cut: bool


def expression(words: str) -> str:
    """What `words` mean, in the language of FTS5. [SEARCH-2]

    Raises InvalidRequest if there is no word in them, if they are too long, or if a quote is not closed.
    """
    if len(words) > _MAX_CHARS:
        problem = f"the search has {len(words):,} characters, the limit is {_MAX_CHARS:,}"
        raise InvalidRequest(problem, hint="leave words out")
    if not any(one.isalnum() for one in words):
        raise InvalidRequest(f"there is no word in {words[:40]!r}", hint="agentbus history --grep finds any characters")
    parts: list[str] = []
    for part in _PART.finditer(words):
        if part["open"]:
            raise InvalidRequest(
                f"the quote before {words[part.end() :][:40]!r} is not closed", hint='put a " behind the phrase'
            )
        if part["word"] is None:
            parts.append(f'"{part["phrase"]}"{part["star"]}')
        else:
            parts += _grouped(part["word"])
    for number in range(len(parts) - 1, 0, -1):
        # Between words FTS5 puts an AND by itself, but not beside a bracket.
        before, after = parts[number - 1], parts[number]
        if (before == ")" or after == "(") and not {before, after} & {*_OPERATORS} and before != "(" and after != ")":
            parts.insert(number, "AND")
    return " ".join(parts)


def _grouped(word: str) -> list[str]:
    """A word with the brackets around it that group. Those that belong to it stay in it: `f()` is a word."""
    bare = word.lstrip("(")
    opened, closed = len(word) - len(bare), 0
    while bare.endswith(")") and bare.count(")") > bare.count("("):
        bare, closed = bare[:-1], closed + 1
    if bare in _OPERATORS:
        inner = [bare]
    else:
        # As a phrase, any characters can stand in it: a path, `a-b`, `can't`.
        star = "*" if bare.endswith("*") else ""
        inner = [f'"{bare.rstrip("*")}"{star}'] if bare else []
    return ["("] * opened + inner + [")"] * closed


class SearchIndex:
    """The index of one database. Every method raises what `Database.read` and `Database.writing` raise."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = Queries(database.read)

    def search(
        self,
        words: str,
        *,
        limit: int,
        peer: str | None = None,
        since: int = 0,
        among: Collection[int] | None = None,
        tell: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Found:
        """Check the words, catch up, and find. A damaged index is made anew, once. [SEARCH-6]

        The arguments are those of `find` and `catch_up`. Raises InvalidRequest before anything takes long.
        """
        for is_last in (False, True):
            try:
                self.check(words)
                self.catch_up(tell)
                return self.find(words, limit=limit, peer=peer, since=since, among=among)
            except DamagedIndex:
                if is_last:
                    raise
                with self._database.writing() as execute:
                    execute(_DROP)
        raise AssertionError("the second round returns or raises")

    def check(self, words: str) -> None:
        """Refuse what cannot be understood, before anything takes long. Raises InvalidRequest. [SEARCH-2]"""
        asked = expression(words)
        self._make()
        self._database.read("SELECT rowid FROM search WHERE search.text MATCH ? AND rowid < 0", asked)

    def catch_up(self, tell: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        """Take up the messages that came since the last search. [SEARCH-3]

        Commits in batches, so that others can write meanwhile. If it is interrupted, the next one goes on. `tell` is
        called before each batch with how many ids were looked at, and of how many.
        """
        target = self._queries.newest_id()
        self._make()
        start = newest = self._newest()
        while newest < target:
            tell(newest - start, target - start)
            if not self._take_up():
                return  # what was left has been deleted meanwhile
            self._database.merge_if_due()
            newest = self._newest()
            if newest < target:
                time.sleep(_PAUSE_S)

    def _make(self) -> None:
        there = "SELECT 1 FROM sqlite_master WHERE name = 'search'"
        if self._database.read(there):
            return
        with self._database.writing() as execute:
            if not execute(there).fetchone():  # another process can have been faster
                execute(_MAKE)

    def _newest(self) -> int:
        return int(self._database.read(_NEWEST)[0][0])

    def _take_up(self) -> int:
        """Take up one batch, in one transaction; return how many messages that were."""
        count = 0
        with self._database.writing() as execute:
            give_way_at = time.thread_time() + _HOLD_S
            rows = execute(f"SELECT * FROM search_texts WHERE id > ({_NEWEST}) ORDER BY id")
            for count, row in enumerate(rows, 1):  # noqa: B007 - counts
                execute("INSERT INTO search (rowid, text, names) VALUES (?, ?, ?)", row)
                if time.thread_time() > give_way_at:
                    break
            rows.close()
        return count

    def find(
        self,
        words: str,
        *,
        limit: int,
        peer: str | None = None,
        since: int = 0,
        among: Collection[int] | None = None,
    ) -> Found:
        """The best `limit` messages that match `words` in the index as it is, the best first. [SEARCH-1]

        Only those to or from `peer`, a name or a group, sent at or after `since`, and among these ids, where these are
        given. Raises InvalidRequest if the words cannot be understood. [SEARCH-2]
        """
        asked = expression(words)
        low, high, allowed = (0, 2**63 - 1, None) if among is None else (min(among), max(among), listed(among))
        ranked = self._database.read(
            # The index has the names of the peers, and not the group.
            _RANKED.format("" if peer is None or is_group(peer) else _TO_OR_FROM),
            *(asked, low, high, since, allowed, peer, MOST_RANKED, limit),
        )
        ids = [int(row[0]) for row in ranked]
        if not ids:
            return Found([], is_cut=False)
        snippets = dict(self._database.read(_SNIPPETS, asked, min(ids), max(ids), listed(ids)))
        messages = {one.id: one for one in self._queries.among(ids)}
        hits = [Hit(messages[one], str(snippets[one])) for one in ids if one in messages and one in snippets]
        return Found(hits, is_cut=int(ranked[0][1]) == MOST_RANKED)
