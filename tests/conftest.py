"""Fixtures: a home of its own for each test, and raw clients that never outlive it."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentbus.core.store import Store
from tests.support.client import RawClient, clients

# Folders and modules in which every test starts processes, and the calls that start one elsewhere.
_PLACES = {"e2e", "faults", "test_bench", "test_sdk_clients"}
_STARTS = re.compile(
    r"\b(subprocess|agentbus\(|RawClient\(|clients\(|command\(|run\(home|examine\(|[Ww]atch\(home|Plain\()"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes: by where they are, by their fixtures, or by what they call."""
    for item in items:
        assert isinstance(item, pytest.Function)
        is_started = {"start", "plain"} & set(item.fixturenames) or _PLACES & {item.path.stem, item.path.parent.name}
        if is_started or _STARTS.search(inspect.getsource(item.function)):
            item.add_marker("process")


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of a session. Test modules for code that a program can run under another loop take both."""
    return "asyncio"


@pytest.fixture(scope="session")
def _nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nobody")


@pytest.fixture(autouse=True)
def _scrub_environment(monkeypatch: pytest.MonkeyPatch, _nobodys_home: Path) -> None:
    # A message to a name that nobody has must not reach a session that runs on this machine. [REACH-1]
    monkeypatch.setenv("HOME", str(_nobodys_home))
    for variable in list(os.environ):
        if variable.startswith(("AGENTBUS_", "CLAUDE")):
            monkeypatch.delenv(variable)


@pytest.fixture
def home() -> Iterator[Path]:
    """A bus of its own, under a path short enough for a socket."""
    root = Path(tempfile.mkdtemp(prefix="ab-", dir="/tmp"))
    yield root / "bus"
    shutil.rmtree(root)


@pytest.fixture
def adapter() -> str:
    """The adapter that `start` serves. Test modules that hold for all adapters take each of them."""
    return "claude-mcp"


@pytest.fixture
def start(home: Path, adapter: str) -> Iterator[Callable[..., RawClient]]:
    """Starts `agentbus serve` on `home` under a name: start("backend")."""
    with clients() as start_client:
        yield lambda name=None, **options: start_client(home, name, **{"adapter": adapter, **options})


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """The mailboxes of that bus, over a connection of the test's own."""
    home.mkdir(mode=0o700)
    store = Store(home / "bus.db", busy_ms=1_000)
    yield store
    store.close()
