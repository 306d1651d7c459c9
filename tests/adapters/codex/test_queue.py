"""Codex without its app server: a terminal that has its sessions in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from agentbus.adapters.codex import queue
from agentbus.adapters.codex.queue import QueueDelivery, own_thread
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import current
from tests.support.command import agentbus, clean_env, until
from tests.support.fakes import envelope

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# Starts a server of ours for each line that it reads, and speaks the handshake with it.
TERMINAL = """
import json, os, subprocess, sys
lines = [
    {"id": 1, "method": "initialize", "params": {"protocolVersion": "2025-06-18", "clientInfo": {"name": "c",
     "version": "1"}, "capabilities": {"experimental": {"codex/auth-change": {}}}}},
    {"method": "notifications/initialized"},
    {"id": 2, "method": "tools/list", "params": {}},
]
servers = []
for _ in sys.stdin:
    servers.append(subprocess.Popen([os.environ["PYTHON"], "-m", "agentbus", "serve", "codex"], stdin=subprocess.PIPE,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for line in lines:
        servers[-1].stdin.write(json.dumps({"jsonrpc": "2.0", **line}).encode() + b"\\n")
        servers[-1].stdin.flush()
for server in servers:
    server.stdin.close()
    server.wait()
"""


@pytest.fixture
def terminal(home: Path, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Begins another conversation each time it is called."""
    environment = clean_env(
        home, CODEX_HOME=str(tmp_path / "none"), PYTHON=sys.executable, AGENTBUS_NAME="web", PYTHONPATH=os.getcwd()
    )
    process = subprocess.Popen(
        ["codex", "-c", TERMINAL], executable=sys.executable, env=environment, stdin=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdin is not None
    stdin = process.stdin

    def begin() -> None:
        stdin.write(b"\n")
        stdin.flush()

    yield begin
    stdin.close()
    process.wait(30)


def pids(home: Path) -> dict[str, str]:
    rows = [line.split() for line in agentbus(home, "peers").stdout.splitlines()]
    return {row[0]: row[5] for row in rows if len(row) == 7 and row[1] == "codex"}


@pytest.mark.spec("CODEX-11", "CODEX-3")
def test_the_newest_session_of_a_terminal_has_the_name_and_the_former_one_is_no_peer(
    home: Path, terminal: Callable[[], None]
) -> None:
    terminal()
    until(lambda: list(pids(home)) == ["web"])
    first = pids(home)["web"]
    terminal()
    until(lambda: list(now := pids(home)) == ["web"] and now["web"] != first)
    assert "codex was started with -c" in agentbus(home, "doctor", "web").stdout


@pytest.mark.spec("CODEX-11")
def test_the_own_thread_is_the_one_that_was_made_just_before(tmp_path: Path) -> None:
    now_ms = time.time_ns() // 1_000_000
    ids = [f"{at:012x}" for at in (now_ms - 60_000, now_ms - 90)]
    old, new = [f"{one[:8]}-{one[8:]}-7abc-8abc-0123456789ab" for one in ids]
    folder = tmp_path / "thread-writer-locks"
    folder.mkdir()
    with (folder / f"{old}.lock").open("w"):
        assert own_thread(current(), now_ms) == ""
        with (folder / f"{new}.lock").open("w"):
            assert own_thread(current(), now_ms) == new


@pytest.mark.anyio
@pytest.mark.spec("CODEX-11")
async def test_a_message_is_announced_once_and_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_LOOK_S", 0.01)
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    # The program of this very process is Python: `python queue --thread ...` runs this.
    Path("queue").write_text(f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    delivery = QueueDelivery(current(), "t1")
    for batch in ([envelope(1, "secret words")], [envelope(1, "secret words"), envelope(2)]):
        for _ in range(2):
            with anyio.fail_after(20), pytest.raises(DeliveryFailed, match="knows that mail waits"):
                await delivery.deliver(batch)
    said = log.read_text().splitlines()
    assert [line.split()[4] for line in said] == ["#1", "#2"]
    assert said[0].startswith("--thread t1 --message agentbus: #1 from ")
    assert said[0].endswith("To read, call check_messages of agentbus")
    assert "secret" not in log.read_text()


@pytest.mark.anyio
@pytest.mark.spec("CODEX-11")
async def test_what_codex_queue_refuses_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_LOOK_S", 0.01)
    monkeypatch.chdir(tmp_path)
    delivery = QueueDelivery(current(), "t1")
    Path("queue").write_text("import sys; sys.exit('no rollout found for thread')\n")
    with pytest.raises(DeliveryFailed, match=r"codex queue failed .*no rollout found"):
        await delivery.deliver([envelope(1)])
    Path("queue").write_text("")
    with pytest.raises(DeliveryFailed, match="knows that mail waits"):
        await delivery.deliver([envelope(1)])
