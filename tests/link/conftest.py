"""A server for each module, and machines that have joined its mesh."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.machine import Machine
from tests.support.nats import Server, server


@pytest.fixture
def folder() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="abl-", dir="/tmp"))
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    root = Path(tempfile.mkdtemp(prefix="abn-", dir="/tmp"))
    with server(root / "team") as made:
        yield made
    shutil.rmtree(root)


@pytest.fixture
def nats(shared_server: Server) -> Server:
    """The server of the module, running, and empty."""
    shared_server.kill()
    if shared_server.store.exists():
        shared_server.wipe()
    shared_server.start()
    return shared_server


@pytest.fixture
def machine(folder: Path, nats: Server) -> Iterator[Callable[[str], Machine]]:
    """Makes a machine of the mesh: machine("alpha")."""
    made: dict[str, Machine] = {}

    def make(name: str, home: str | None = None) -> Machine:
        one = made[home or name] = Machine(folder / (home or name), name, nats.invite(name))
        return one

    yield make
    for one in made.values():
        one.close()
