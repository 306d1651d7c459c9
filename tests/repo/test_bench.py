"""Each benchmark runs for real, with counts that are too small to mean anything. No test asserts a figure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import nats

pytestmark = pytest.mark.timeout(120)  # a dozen processes each, on a loaded machine

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in ROOT.joinpath("bench").glob("*.py") if path.stem != "__init__")
COMMANDS = [path.stem for path in MODULES if "def command(" in path.read_text() or "typer.run(" in path.read_text()]
# Our own server, started in the way another server would be.
OURS = (
    "env AGENTBUS_HOME={home} AGENTBUS_NAME={name} AGENTBUS_DELIVERY=channel AGENTBUS_BURST=0 AGENTBUS_HOURLY=0 "
    f"{shlex.quote(sys.executable)} -m agentbus serve claude-mcp"
)
MACHINE = {"system", "cores", "python", "sqlite", "agentbus", "mcp", "clock", "load before"}


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *arguments],
        cwd=ROOT,
        # Variables that a shell has set must not reach the sessions: this trigger name would be refused.
        env={**os.environ, "COLUMNS": "200", "AGENTBUS_TRIGGER": "nonsense"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def measured(tmp_path: Path, name: str, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Run a benchmark that writes its tables as JSON, and also draws and shows them. Returns the rows of each table."""
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    done = bench(name, *arguments, "--json", str(out), "--plot", str(plot))
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(out.read_text())
    assert set(facts["machine"]) == MACHINE
    assert f"bench.{name}" in facts["command"]
    for title, rows in facts["tables"].items():
        assert rows, title
        assert title.split()[0] in done.stdout
    assert all(samples for table in facts["samples"].values() for samples in table.values())
    assert plot.read_text().startswith("<?xml")
    return facts["tables"]


def rows(tables: dict[str, list[dict[str, Any]]], start: str) -> set[str]:
    """The names of the rows in the one table whose title starts with `start`."""
    (found,) = [table for title, table in tables.items() if title.startswith(start)]
    return {row[""] for row in found}


def test_the_commands_are_known() -> None:
    known = {"delivery_latency", "throughput", "scale", "search", "startup", "asking", "link_latency", "soak"}
    assert known <= set(COMMANDS)
    about = ROOT.joinpath("bench", "README.md").read_text()
    assert all(f"`python -m bench.{name}`" in about for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    done = bench(name, "--help")
    assert done.returncode == 0
    assert f"Example: python -m bench.{name}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_delivery_latency(tmp_path: Path) -> None:
    options = ("--rounds", "2", "--pause-ms", "1", "--trigger", "socket", "--against", OURS)
    tables = measured(tmp_path, "delivery_latency", *options)
    expected = {"socket, after 1 ms", "theirs, after 1 ms", "theirs / socket, after 1 ms"}
    assert rows(tables, "tool call written") == expected
    assert rows(tables, "in-process send") == {"socket, after 1 ms"}
    assert {row.split(",")[0] for row in rows(tables, "floor")} >= {"a bare INSERT", "a bare datagram", "a pipe"}
    steps = rows(tables, "where it goes: socket")
    assert steps == {"request", "send", "wake", "read", "push", "client", "total, traced", "total, not traced"}
    assert len(tables["targets"]) == 4


def test_link_latency(tmp_path: Path) -> None:
    nats.binary()
    options = ("--rounds", "2", "--pause-ms", "1", "--count", "20", "--idle", "0.2")
    tables = measured(tmp_path, "link_latency", *options)
    expected = {"one machine, after 1 ms", "one machine, with a link, after 1 ms", "two machines, after 1 ms"}
    assert rows(tables, "tool call written") == expected
    assert rows(tables, "messages a second") == {"received in order", "known to be delivered"}


def test_throughput(tmp_path: Path) -> None:
    options = ("--count", "60", "--rounds", "1", "--senders", "2", "--peers", "2", "--broadcasts", "1")
    tables = measured(tmp_path, "throughput", *options)
    rates = rows(tables, "messages a second")
    for road in ("tools, 1 -> 1", "tools, 2 -> 1", "Python API -> session", "Python API -> Python API"):
        assert {f"{road}, sync normal", f"{road}, sync full"} <= rates
    for title in ("broadcast", "to a group"):
        assert rows(tables, title) == {"1 -> 2, sync normal", "1 -> 2, sync full"}


def test_scale(tmp_path: Path) -> None:
    sizes = (
        "--old-rows",
        "0",
        "--old-rows",
        "1000",
        "--peers",
        "1",
        "--peers",
        "3",
        "--pending",
        "1",
        "--pending",
        "5",
        "--sessions",
        "2",
    )
    tables = measured(tmp_path, "scale", *sizes, "--rounds", "1", "--commands", "1", "--drains", "1", "--idle", "0")
    each = {"tool call -> event", "send, a call", "peers, a call", "agentbus send", "agentbus peers"}
    assert rows(tables, "old rows") == each
    assert rows(tables, "live peers") == {*each, "broadcast, a call"}
    assert "drained after tools/list was asked for" in rows(tables, "pending")
    assert {"0", "1,000", "last / first"} <= set(tables["old rows: p50, ms"][0])
    assert {"all up, s", "broadcast to the others, p50, ms"} <= set(tables["2 sessions"][0])


def test_asking(tmp_path: Path) -> None:
    tables = measured(tmp_path, "asking", "--rounds", "2", "--commands", "1")
    expected = {"a message, one way", "an ask, there and back", "an ask / a message"}
    assert rows(tables, "tool call written") == expected
    assert rows(tables, "whole processes") == {"agentbus send", "agentbus ask"}
    assert len(tables["targets"]) == 2


def test_startup(tmp_path: Path) -> None:
    options = ("--rounds", "1", "--at-once", "2", "--idle", "0.2", "--runs", "1")
    tables = measured(tmp_path, "startup", *options)
    for table in ("exec -> ..., alone", "exec -> ..., the last of 2"):
        assert {"agentbus: tools/list answered", "a bare SDK server: initialize answered"} <= rows(tables, table)
    assert {"agentbus send", "agentbus ask", "python -c 'import apsw'"} <= rows(tables, "whole processes")
    if sys.platform == "linux":
        assert rows(tables, "memory") == {"agentbus", "agentbus, with the SDK", "a bare SDK server"}
        assert "trigger socket" in rows(tables, "idle")


def test_search(tmp_path: Path) -> None:
    tables = measured(tmp_path, "search", "--messages", "300", "--rounds", "1", "--commands", "1")
    assert {"the whole command, s", "the index, MB"} <= rows(tables, "the first search")
    assert {"a word of 3 in 4 messages", "a frequent phrase"} <= rows(tables, "a later search, a call")
    assert rows(tables, "send") == {"while the index is made", "never searched", "searched"}
    assert len(tables["targets"]) == 3


@pytest.mark.parametrize("name", ["delivery_latency", "throughput", "startup"])
def test_a_server_that_does_not_start_is_said_in_one_line(name: str) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(\"no config\")'"
    done = bench(name, "--rounds", "1", "--against", command)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert sys.executable in done.stderr
    assert "no config" in done.stderr.split("its last line:")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rounds", "none"),
        ("--trigger", "telepathy"),
        ("--against", ""),
        ("--against", "'unbalanced"),
        ("--plot", "out.pdf"),
        ("--nonsense",),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(arguments: tuple[str, ...]) -> None:
    done = bench("delivery_latency", *arguments)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "see --help" in done.stderr
