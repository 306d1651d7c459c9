"""The index that search uses: what it finds, when it is brought up to date, and that it forgets what is removed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentbus.core import search as module
from agentbus.core.errors import DamagedIndex, InvalidRequest
from agentbus.core.search import MATCH_BEGINS, MATCH_ENDS, SearchIndex, expression
from agentbus.core.store import Store
from tests.support.command import PATIENCE_S
from tests.support.fakes import arrival

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process


@pytest.fixture
def index(store: Store) -> Iterator[SearchIndex]:
    yield store.search_index()
    check(store.path)


def check(path: Path) -> None:
    """See to it that the index has the words of each message that is there, up to its newest, and no others."""
    connection = apsw.Connection(str(path))
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'search'").get:
        newest = connection.execute("SELECT coalesce(max(id), 0) FROM search_docsize").get
        assert (
            connection.execute("SELECT id FROM search_docsize ORDER BY id").fetchall()
            == connection.execute("SELECT id FROM messages WHERE id <= ? ORDER BY id", (newest,)).fetchall()
        )
        if newest == connection.execute("SELECT coalesce(max(id), 0) FROM messages").get:
            # FTS5 reads all texts anew and compares: it raises when there is a difference.
            connection.execute("INSERT INTO search (search, rank) VALUES ('integrity-check', 1)")
    connection.close()


def say(store: Store, *texts: str, sender: str = "a", to: str = "b", now: int = 1_000) -> list[int]:
    return [store.send(sender, to, text, now=now)[0] for text in texts]


def found(index: SearchIndex, words: str, **options: object) -> list[int]:
    return [hit.message.id for hit in index.search(words, **{"limit": 20, **options}).hits]  # type: ignore[arg-type]


@pytest.mark.spec("SEARCH-1")
def test_the_best_match_comes_first_and_of_equal_ones_the_newest(store: Store, index: SearchIndex) -> None:
    ids = say(
        store, "the port of the api is 8080", "port, port and port", "no word of it", "which port is it, and why so"
    )
    assert found(index, "port")[0] == ids[1]
    assert sorted(found(index, "port")) == [ids[0], ids[1], ids[3]]
    assert found(index, "port api") == [ids[0]]
    assert found(index, "port", limit=1) == [ids[1]]
    assert found(index, "nothing") == []
    equal = say(store, "build is green", "build is green")
    assert found(index, "green") == equal[::-1]


@pytest.mark.spec("SEARCH-1")
def test_options_narrow_it_to_a_peer_a_time_and_a_conversation(store: Store, index: SearchIndex) -> None:
    (old,) = say(store, "which port", now=1_000)
    (other,) = say(store, "which port", sender="c", to="d", now=2_000)
    answer, _ = store.send("b", "a", "port 8080", now=3_000, reply_to=old)
    thanks, _ = store.send("a", "b", "that port works", now=4_000, reply_to=answer)
    assert set(found(index, "port", peer="a")) == {old, answer, thanks}
    assert found(index, "port", peer="d") == [other]
    assert set(found(index, "port", since=2_000)) == {other, answer, thanks}
    assert set(found(index, "port", among=[old, answer, thanks])) == {old, answer, thanks}
    assert found(index, "port", among=[other]) == [other]
    assert found(index, "port", among=[99]) == []


@pytest.mark.spec("SEARCH-1")
def test_a_hit_shows_the_text_around_the_match(store: Store, index: SearchIndex) -> None:
    (row_id,) = say(store, "x " * 3_000 + "the needle is here" + " y" * 3_000)  # long: its text is in another table
    index.catch_up()
    (hit,) = index.find("Needle", limit=5).hits
    assert hit.message.id == row_id
    assert len(hit.message.text) > 12_000
    assert f"the {MATCH_BEGINS}needle{MATCH_ENDS} is here" in hit.snippet
    assert len(hit.snippet) < 100


@pytest.mark.spec("SEARCH-1")
def test_of_too_many_matches_the_newest_are_ranked(
    store: Store, index: SearchIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RANKED", 3)
    ids = say(store, "port port port", "port", "port of", "port of call", sender="a")
    say(store, "a port", sender="x", to="y")
    index.catch_up()
    some = index.find("port", limit=2)
    assert some.is_cut
    assert ids[0] not in [hit.message.id for hit in some.hits]
    assert len(some.hits) == 2
    # What does not come into question takes no place from what does.
    assert set(found(index, "port", peer="a", since=0)) == set(ids[1:])
    assert not index.find("call", limit=2).is_cut


@pytest.mark.spec("SEARCH-2")
@pytest.mark.parametrize(
    ("words", "matches"),
    [
        ("möller", {0}),
        ("MOLLER", {0}),
        ("which port", {1, 2}),
        ('"which port"', {1}),
        ("por*", {1, 2, 3}),
        ('"which po"*', {1}),
        ("src/a-b.py", {3}),
        ("f()", {3}),
        ("can't", {2}),
        ("moller OR which", {0, 1, 2}),
        ("which NOT can't", {1}),
        ("(moller OR port) which", {1, 2}),
        ("which (moller OR api)", {1}),
        ("(which) (api)", {1}),
        ("port:8080", {3}),
        ("-> which", {1, 2}),
        ("日本*", {4}),
        ("or", set()),
        ("NEAR", set()),
        ("text", set()),
        ('say "" port', set()),
        ("^which + port", {1, 2}),
        ("{a b}: c", set()),
    ],
)
def test_words_phrases_beginnings_and_operators(
    store: Store, index: SearchIndex, words: str, matches: set[int]
) -> None:
    ids = say(
        store,
        "Möller says so",
        "which port has the api?",
        "for which can't it be? the port",
        "f() in src/a-b.py listens on port:8080",
        "日本語のテキスト",
    )
    assert set(found(index, words)) == {ids[number] for number in matches}


@pytest.mark.spec("SEARCH-2", "ERR-1")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", r"there is no word in ''"),
        ("... ->", r"there is no word in '\.\.\. ->': agentbus history --grep"),
        ('say "which port', r"the quote before 'which port' is not closed"),
        ("port AND", r"the search is not understood: syntax error at its end: AND, OR and NOT"),
        ("OR port", r'the search is not understood: syntax error near "OR"'),
        ("(port", r"the search is not understood: syntax error at its end"),
        ("port )", r'the search is not understood: syntax error near "\)"'),
        ("NOT port", r"not understood"),
        ("() port", r"not understood"),
        ("(" * 400 + "port" + ")" * 400, r"the search is not understood: parser stack overflow"),
        ("x" * 1_001, r"the search has 1,001 characters, the limit is 1,000"),
    ],
)
def test_what_cannot_be_understood_is_a_sentence(store: Store, index: SearchIndex, words: str, sentence: str) -> None:
    say(store, "which port")
    for ask in (index.check, lambda words: index.find(words, limit=5)):
        with pytest.raises(InvalidRequest, match=sentence):
            ask(words)
    is_made = store._read("SELECT 1 FROM sqlite_master WHERE name = 'search'")
    assert not is_made or store._read("SELECT count(*) FROM search_docsize") == [(0,)]


@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from('"()*AND OR NOT'), max_size=40))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_words_find_something_or_are_refused(words: str) -> None:
    connection = apsw.Connection(":memory:")
    connection.execute("CREATE VIRTUAL TABLE search USING fts5 (text)")
    try:
        asked = expression(words.replace("\0", ""))
    except InvalidRequest:
        return
    try:
        connection.execute("SELECT * FROM search WHERE search MATCH ?", (asked,)).fetchall()
    except apsw.SQLError as error:
        assert str(error).startswith("fts5: ")  # what `database.explain` makes a sentence of


@pytest.mark.spec("SEARCH-3")
def test_only_a_search_touches_the_index(store: Store, index: SearchIndex) -> None:
    def tables() -> list[tuple[str]]:
        return store._read("SELECT name FROM sqlite_master WHERE name LIKE 'search%'")

    def size() -> int:
        return int(store._read("SELECT count(*) FROM search_docsize")[0][0])

    ids = say(store, "one", "two")
    assert tables() == []
    index.catch_up()
    assert size() == 2
    say(store, "three")
    store.mark_delivered(ids, session="s", carrier="channel", now=2_000)
    store.mark_read(ids, session="s", now=3_000)
    assert size() == 2
    assert index.find("three", limit=5).hits == []
    assert len(found(index, "three")) == 1


@pytest.mark.spec("SEARCH-3")
def test_others_write_between_two_batches(store: Store, index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOLD_S", 0.0)  # one message a batch
    say(store, *(f"word {number}" for number in range(5)))
    other = Store(store.path, busy_ms=0)
    seen = []

    def tell(done: int, total: int) -> None:
        seen.append((done, total))
        say(other, "a word meanwhile")

    index.catch_up(tell)
    other.close()
    # What came meanwhile is left to the next one: a search ends, however much is sent.
    assert seen == [(done, 5) for done in range(5)]
    assert len(index.find("word", limit=20).hits) == 5
    assert len(found(index, "word")) == 10


@pytest.mark.spec("SEARCH-3")
def test_what_is_left_to_take_up_can_be_removed_meanwhile(
    store: Store, index: SearchIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HOLD_S", 0.0)
    ids = say(store, "one", "two", "three")
    index.catch_up(lambda done, _total: [store.cancel(one) for one in ids[1:]] if done else None)
    assert found(index, "one OR two OR three") == ids[:1]


_CHILD = """
import sys, time
from pathlib import Path
from agentbus.core import search
from agentbus.core.store import Store
search._HOLD_S = 0.0
Store(Path(sys.argv[1]), busy_ms=1_000).search_index().catch_up(lambda done, _total: print(done, flush=True))
"""


@pytest.mark.spec("SEARCH-3")
def test_a_catch_up_that_is_killed_goes_on(store: Store, index: SearchIndex) -> None:
    ids = say(store, *(f"word {number}" for number in range(300)))
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(store.path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    while int(child.stdout.readline()) < 3:
        pass
    child.kill()
    child.communicate(timeout=PATIENCE_S)
    told: list[tuple[int, int]] = []
    index.catch_up(lambda done, total: told.append((done, total)))
    assert told[0][1] <= 297, "it began anew"
    assert len(index.find("word", limit=400).hits) == len(ids)


@pytest.mark.spec("SEARCH-3")
def test_two_catch_ups_at_once_take_up_each_message_once(
    store: Store, index: SearchIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HOLD_S", 0.0)
    monkeypatch.setattr(module, "_PAUSE_S", 0.001)
    ids = say(store, *(f"word {number}" for number in range(60)))
    begin = threading.Barrier(3)
    errors: list[BaseException] = []

    def search() -> None:
        own = Store(store.path, busy_ms=10_000)
        try:
            begin.wait()
            own.search_index().catch_up()
        except BaseException as error:
            errors.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=search) for _ in range(2)]
    for one in threads:
        one.start()
    begin.wait()
    ids += say(store, *("a word of another" for _ in range(20)))
    for one in threads:
        one.join(PATIENCE_S)
    assert errors == []
    assert sorted(found(index, "word", limit=100)) == ids


@pytest.mark.spec("SEARCH-5")
def test_what_is_removed_is_found_no_more_whatever_removes_it(store: Store, index: SearchIndex) -> None:
    ids = say(store, "word 0", "word 1", "word 2", "word 3 " + "long " * 2_000, "word 4")
    index.catch_up()
    store.mark_delivered(ids[:1], session="s", carrier="channel", now=2_000)
    assert store.prune(3_000, 10) == 1
    assert store.cancel(ids[1])
    assert found(index, "word") == [ids[4], ids[2], ids[3]]
    # A program of an older version deletes messages, and knows nothing of an index.
    other = apsw.Connection(str(store.path))
    other.pragma("foreign_keys", 1)
    other.execute("DELETE FROM messages WHERE id IN (?, ?)", (ids[2], ids[3]))
    other.close()
    assert found(index, "word") == [ids[4]]
    check(store.path)
    late = say(store, "word 5")
    assert len(store.discard("b", 2**62)) == 2  # also one that is not in the index yet
    assert found(index, "word") == []
    assert found(index, "word", among=late) == []


@pytest.mark.spec("SEARCH-5", "NAME-5")
def test_mail_that_moves_with_a_rename_is_found_under_the_new_name(store: Store, index: SearchIndex) -> None:
    claimed = store.claim(arrival("api"), now=1_000, endpoint=str, join_crowd=True)
    assert claimed is not None
    peer = claimed[0]
    ids = say(store, "word one", "word two", to="api")
    store.mark_delivered(ids[:1], session="s", carrier="channel", now=2_000)
    index.catch_up()
    late = say(store, "word three", to="api")
    store.rename(peer.session, peer.process.pid, "shop-api")
    assert found(index, "word", peer="api") == ids[:1]  # and not what the word `api` in `shop-api` would find
    assert set(found(index, "word", peer="shop-api")) == {ids[1], *late}
    assert found(index, "shop") == [], "a name is no text"


@pytest.mark.spec("SEARCH-6")
def test_a_damaged_index_is_made_anew(store: Store, index: SearchIndex) -> None:
    ids = say(store, *(f"word {number} " + f"x{number} " * 50 for number in range(200)))
    index.catch_up()
    connection = apsw.Connection(str(store.path))
    connection.execute("DELETE FROM search_data WHERE id > 10")  # below are its lists of what there is
    connection.close()
    store.reopen()  # a connection has some of it in its memory
    with pytest.raises(DamagedIndex, match=r"the search index in .* is damaged: agentbus search makes it anew"):
        index.find("word", limit=5)
    assert len(found(index, "word", limit=300)) == len(ids)
    assert store.cancel(ids[0])
    assert len(found(index, "word", limit=300)) == len(ids) - 1
