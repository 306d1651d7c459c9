"""The registration with Codex, against a stand-in of its command, and the real one if that is on PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support import codex_stand_in
from tests.support.command import agentbus

pytestmark = pytest.mark.timeout(90)

REAL = shutil.which("codex")
OTHER = {"command": "/usr/bin/env", "args": ["true"], "env": {"A": "1"}, "startup_timeout_sec": 20}


class CodexOnPath:
    """A `codex` on a PATH of its own, with a home folder of its own."""

    def __init__(self, root: Path, real: str | None) -> None:
        self.home, self.folder = root / "home", root / "work"
        for path in (root / "bin", self.home / ".codex", self.folder):
            path.mkdir(parents=True)
        codex = root / "bin" / "codex"
        if real is None:
            codex.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{codex_stand_in.__file__}' \"$@\"\n")
            codex.chmod(0o755)
        else:
            codex.symlink_to(os.path.realpath(real))
        self.file = self.home / ".codex" / "config.toml"
        self.variables = {"PATH": f"{root / 'bin'}:/usr/bin:/bin", "HOME": str(self.home)}

    def entry(self) -> dict[str, Any] | None:
        servers = tomllib.loads(self.file.read_text()).get("mcp_servers", {}) if self.file.exists() else {}
        found: dict[str, Any] | None = servers.get("agentbus")
        return found

    def put(self, entry: dict[str, Any]) -> None:
        lines = [f"{key} = {codex_stand_in.toml(value)}" for key, value in entry.items()]
        self.file.write_text("\n".join(['model = "m"', "[mcp_servers.agentbus]", *lines, ""]))


@pytest.fixture(
    params=["stand-in", pytest.param("real", marks=pytest.mark.skipif(REAL is None, reason="codex is not on PATH"))]
)
def codex(request: pytest.FixtureRequest, tmp_path: Path) -> CodexOnPath:
    return CodexOnPath(tmp_path, REAL if request.param == "real" else None)


def run(home: Path, codex: CodexOnPath, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A home that is not the usual one belongs to the entry: Codex hands no variables on.
    return agentbus(home, *arguments, cwd=codex.folder, **{**codex.variables, **variables})


def rows(home: Path, codex: CodexOnPath, **variables: str) -> dict[str, dict[str, Any]]:
    lines = run(home, codex, "doctor", "--json", **variables).stdout.splitlines()
    return {row["code"]: row for row in map(json.loads, lines) if "codex" in str(row).lower()}


@pytest.mark.spec("REG-1", "REG-2", "CODEX-10")
def test_it_registers_once_and_takes_that_back(home: Path, codex: CodexOnPath) -> None:
    codex.file.write_text('model = "m"\n')
    done = run(home, codex, "enable", "codex")
    assert done.stdout == "registered agentbus with Codex for all projects\n"
    entry = codex.entry()
    assert entry is not None
    assert entry["args"][-2:] == ["serve", "codex"]
    assert entry["env"] == {"AGENTBUS_HOME": str(home)}
    before = codex.file.read_bytes()
    assert run(home, codex, "enable", "codex").stdout.endswith("already registered with Codex, nothing was changed\n")
    assert codex.file.read_bytes() == before
    assert "codex  Codex: enabled" in run(home, codex, "list").stdout
    assert run(home, codex, "disable", "codex").stdout.startswith("removed agentbus from Codex")
    assert codex.entry() is None
    assert run(home, codex, "disable", "codex").stdout.endswith("nothing to do there\n")


@pytest.mark.spec("REG-2", "CODEX-10")
@pytest.mark.parametrize("former", [["/gone/agentbus"], ["/gone/python", "-E", "-P", "-m", "agentbus"]])
def test_what_the_user_has_set_in_our_entry_is_kept(home: Path, codex: CodexOnPath, former: list[str]) -> None:
    kept = {"env_vars": ["X"], "tools": {"whoami": {"approval_mode": "approve"}}, "startup_timeout_sec": 20}
    codex.put({"command": former[0], "args": [*former[1:], "serve", "codex"], "env": {"B": "2"}, **kept})
    assert "fix it: agentbus enable codex" in run(home, codex, "list").stdout
    done = run(home, codex, "enable", "codex")
    assert done.stdout.endswith(f", in place of {' '.join(former)} serve codex\n")
    entry = codex.entry()
    assert entry is not None
    assert entry["command"] != "/gone/agentbus"
    assert {key: entry[key] for key in kept} == kept
    assert entry["env"] == {"B": "2", "AGENTBUS_HOME": str(home)}
    run(home, codex, "disable", "codex")
    assert codex.entry() is None, "an entry of ours is not put back"


@pytest.mark.spec("DOCTOR-4", "CODEX-10")
def test_doctor_says_what_the_settings_mean_for_a_session(home: Path, codex: CodexOnPath) -> None:
    run(home, codex, "enable", "codex")
    assert rows(home, codex)["permission"]["level"] == "ok"
    text = codex.file.read_text()
    more = (
        '[mcp_servers.agentbus.tools.send_message]\napproval_mode = "prompt"\n[features]\ndaemon_auto_start = false\n'
    )
    codex.file.write_text(text + more)
    found = rows(home, codex)
    assert "Codex asks before it uses send_message of agentbus" in found["permission"]["seen"]
    assert "daemon_auto_start is off" in found["client"]["seen"]
    codex.file.write_text(
        text.replace("[mcp_servers.agentbus]", "[mcp_servers.agentbus]\ndefault_tools_approval_mode = 'writes'")
    )
    assert "asks before it uses every tool" in rows(home, codex)["permission"]["seen"]


@pytest.mark.spec("REG-2", "CODEX-10")
def test_an_entry_of_somebody_elses_is_put_back(home: Path, codex: CodexOnPath) -> None:
    codex.put(OTHER)
    assert run(home, codex, "enable", "codex").stdout.endswith(", in place of /usr/bin/env true\n")
    assert codex.entry() != OTHER
    done = run(home, codex, "disable", "codex")
    assert "put back the entry that was there before: /usr/bin/env true" in done.stdout
    assert codex.entry() == OTHER
    assert tomllib.loads(codex.file.read_text())["model"] == "m"
    assert run(home, codex, "uninstall").returncode == 0
    assert not home.exists()


@pytest.mark.spec("REG-3", "DOCTOR-4")
def test_what_stands_in_the_way_is_said(home: Path, codex: CodexOnPath) -> None:
    run(home, codex, "enable", "codex")
    entry = codex.entry()
    assert entry is not None
    assert {row["level"] for row in rows(home, codex).values()} <= {"ok", "note"}
    codex.put({**entry, "enabled": False})
    assert "switched off in" in rows(home, codex)["registration"]["seen"]
    codex.put(entry)
    codex.file.write_text(f'{codex.file.read_text()}[projects."{codex.folder}"]\ntrust_level = "trusted"\n')
    project = codex.folder / ".codex" / "config.toml"
    project.parent.mkdir()
    project.write_text('[mcp_servers.agentbus]\ncommand = "/bin/false"\n')
    assert rows(home, codex)["registration"]["seen"] == f"codex: {project} overrides it: /bin/false"
    project.unlink()
    codex.file.write_text("not TOML = = \n")
    assert "cannot be read" in rows(home, codex)["registration"]["seen"]
    failed = run(home, codex, "enable", "codex")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


@pytest.mark.spec("REG-4", "REG-5")
def test_without_codex_it_says_what_to_type(home: Path, codex: CodexOnPath) -> None:
    done = run(home, codex, "enable", "codex", PATH="/nowhere")
    assert done.returncode == 1
    assert "codex mcp add agentbus -- " in done.stdout
    assert done.stderr.startswith("agentbus: codex is not on PATH, nothing was changed")


@pytest.mark.spec("DOCTOR-4")
def test_an_older_codex_is_no_fault_and_doctor_says_what_a_newer_one_brings(home: Path, tmp_path: Path) -> None:
    codex = CodexOnPath(tmp_path, None)
    found = rows(home, codex, STAND_IN_VERSION="0.140.0")["client"]
    assert found["level"] == "note"
    assert "from 0.157.0 on, messages go into a running session" in found["seen"]


@pytest.mark.spec("REG-2")
def test_launch_names_the_session_by_its_terminal(home: Path, codex: CodexOnPath) -> None:
    assert run(home, codex, "launch", "codex", "backend").stdout == "AGENTBUS_NAME=backend codex\n"
