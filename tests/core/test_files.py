"""The files of the database: those of one life never meet those of another."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from agentbus.core import database, files
from agentbus.core.config import prepare_home
from agentbus.core.errors import BrokenSetup
from agentbus.core.store import Store
from tests.support.command import clean_env


@pytest.fixture
def path(home: Path) -> Path:
    return Path(prepare_home(home))


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir())


def killed(home: Path, text: str) -> None:
    """A program that sends `text` and dies with its database open: its WAL holds what nobody has merged."""
    code = (
        "import os, sys; from agentbus import registry; from agentbus.core import config\n"
        "bus, _ = registry.open_bus(config.load(), busy_ms=1000); bus.send('a', 'bob', sys.argv[1]); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, text], env=clean_env(home), check=True)


def texts(path: Path) -> list[str]:
    store = Store(path, busy_ms=1_000)
    found = [one.text for one in store.queries.inbox("bob", 100)]
    store.close()
    return found


@pytest.mark.spec("STORE-7", "STORE-8", "TRUST-1")
def test_a_new_database_is_whole_and_has_an_identity(path: Path) -> None:
    store = Store(path, busy_ms=0)
    identity = store.identity()
    assert len(identity) == 16
    assert int(identity, 16)
    store.close()
    assert names(path) == ["bus.db", "bus.db-owner"]
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}
    again = Store(path, busy_ms=0)
    assert again.identity() == identity
    again.close()


@pytest.mark.spec("STORE-8")
def test_a_wal_is_read_by_the_next_program_as_long_as_its_database_is_there(path: Path) -> None:
    killed(path.parent, "in the WAL")
    assert "bus.db-wal" in names(path)
    assert texts(path) == ["in the WAL"]


@pytest.mark.spec("STORE-8")
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_wal_of_another_life_is_set_aside_and_not_read(path: Path, how: str) -> None:
    backup = path.with_name("backup")
    Store(path, busy_ms=0).close()
    shutil.copy(path, backup)
    killed(path.parent, "of the old life")
    if how == "removed":
        path.unlink()
    else:
        os.replace(backup, path)
    assert texts(path) == []
    aside = [name for name in names(path) if files.ASIDE in name]
    assert sorted(name.rsplit("-", 1)[1] for name in aside) == ["shm", "wal"]
    assert len({name.rsplit("-", 1)[0] for name in aside}) == 1, "under one name, as SQLite wants them"
    killed(path.parent, "of the new life")
    assert texts(path) == ["of the new life"]


@pytest.mark.spec("STORE-8")
def test_a_home_that_was_copied_whole_keeps_its_wal(path: Path) -> None:
    """Inodes are others in a copy, and so is that of the file which names them: then it says nothing."""
    killed(path.parent, "in the WAL")
    copy = path.parent.with_name("copy")
    shutil.copytree(path.parent, copy)
    assert texts(copy / path.name) == ["in the WAL"]


@pytest.mark.spec("STORE-8", "STORE-1")
def test_a_database_of_an_earlier_version_keeps_its_wal(path: Path) -> None:
    killed(path.parent, "in the WAL")
    path.with_name("bus.db-owner").unlink()
    assert texts(path) == ["in the WAL"]
    assert "bus.db-owner" in names(path)


@pytest.mark.spec("STORE-8")
def test_what_a_killed_start_was_building_is_cleared_away(path: Path) -> None:
    for part in ("", "-wal"):
        path.with_name(f"bus.db.new-4711{part}").write_text("half")
    Store(path, busy_ms=0).close()
    assert names(path) == ["bus.db", "bus.db-owner"]


@pytest.mark.spec("STORE-8")
def test_what_belongs_together_is_set_aside_together(path: Path) -> None:
    killed(path.parent, "for the rescue")
    moved = files.set_aside(path)
    assert names(path) == sorted(one.name for one in moved)
    assert [one.name.removeprefix(moved[0].name) for one in moved] == ["", "-wal", "-shm"]
    rescued = apsw.Connection(str(moved[0]))
    assert list(rescued.execute("SELECT body FROM messages")) == [("for the rescue",)]
    rescued.close()
    assert texts(path) == []
    assert len(set(files.set_aside(path)) & set(moved)) == 0, "a second one in the same second has another name"


@pytest.mark.spec("ERR-1")
def test_a_folder_that_cannot_be_written_is_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(BrokenSetup, match="cannot be created"):
            files.settle(path, lambda _fresh: None)


@pytest.mark.spec("STORE-8")
def test_what_is_linked_into_place_is_whole(path: Path) -> None:
    """Whoever opens it at that moment, an older agentbus for one, finds every table in it."""
    seen = []

    def build(fresh: Path) -> None:
        database._build(fresh, "normal")
        seen.append(path.exists())

    files.settle(path, build)
    assert seen == [False]
    assert names(path) == ["bus.db", "bus.db-owner"], "and nothing is beside it"
    whole = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    assert whole.pragma("user_version") == database.SCHEMA
    whole.close()


@pytest.mark.spec("STORE-8")
def test_a_new_database_is_built_before_it_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    real = database._build
    monkeypatch.setattr(database, "_build", lambda fresh, sync: (built.append(fresh), real(fresh, sync)))
    Store(path, busy_ms=0).close()
    assert [one.name.split(".new-")[0] for one in built] == ["bus.db"]
    assert built[0] != path


@pytest.mark.spec("STORE-8")
def test_where_there_are_no_hard_links_a_new_database_is_renamed_into_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(path, busy_ms=0)
    store.send("a", "bob", "x", now=0)
    store.close()
    assert names(path) == ["bus.db", "bus.db-owner"]
    assert texts(path) == ["x"]
