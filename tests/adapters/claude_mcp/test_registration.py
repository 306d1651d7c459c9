"""The registration with Claude Code: through a stand-in for `claude`, and through the real one where it is on PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.claude_mcp.registration import ClaudeRegistration
from agentbus.core import adapter
from agentbus.core.adapter import Standing
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Level
from tests.support.command import ClaudeOnPath, agentbus, claude_on_path, until

pytestmark = pytest.mark.timeout(120)  # the real one takes half a second a call, on an idle machine

REAL = shutil.which("claude")
ELSEWHERE = {"type": "stdio", "command": "/usr/bin/env", "args": ["serve", "claude-mcp"], "env": {"A": "1"}}


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param("real", marks=pytest.mark.skipif(REAL is None, reason="claude is not on PATH")),
    ]
)
def claude(request: pytest.FixtureRequest, tmp_path: Path) -> ClaudeOnPath:
    return claude_on_path(tmp_path / "claude", REAL if request.param == "real" else None)


@pytest.fixture
def stand_in(tmp_path: Path) -> ClaudeOnPath:
    return claude_on_path(tmp_path / "claude")


def run(home: Path, claude: ClaudeOnPath, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return agentbus(home, *arguments, cwd=claude.folder, **{**claude.variables, **variables})


def row_of_claude(listed: str) -> dict[str, str]:
    """What `agentbus list --json` says about the adapter for Claude Code."""
    (row,) = (row for row in map(json.loads, listed.splitlines()) if row["id"] == "claude-mcp")
    return dict(row)


def standing(home: Path, claude: ClaudeOnPath) -> tuple[str, str]:
    row = row_of_claude(run(home, claude, "list", "--json").stdout)
    return row["standing"], row["seen"]


@pytest.mark.spec("REG-1", "REG-2", "REG-3")
def test_enable_and_disable_through_claude(home: Path, claude: ClaudeOnPath) -> None:
    assert standing(home, claude)[0] == "not enabled"
    done = run(home, claude, "enable", "claude-mcp")
    assert (done.returncode, done.stderr) == (0, "")
    folder = claude.home / ".claude" / "skills" / "agentbus"
    assert done.stdout == (
        "registered agentbus with Claude Code for all projects\n"
        f"wrote {folder}: every Claude Code that starts from now on has it\n"
    )
    entry = claude.entry()
    assert entry is not None
    assert entry["args"] == ["-E", "-P", "-m", "agentbus", "serve", "claude-mcp"]
    assert "alwaysLoad" not in entry
    assert os.path.isabs(entry["command"])
    # The command works from anywhere, with no PATH at all.
    command = [entry["command"], *entry["args"][:-2], "--version"]
    shown = subprocess.run(command, cwd="/", env={"PATH": ""}, capture_output=True, text=True)
    assert shown.stdout.startswith("agentbus ")
    assert standing(home, claude)[0] == "enabled"

    before = claude.state["mcpServers"]
    again = run(home, claude, "enable", "claude-mcp")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == "agentbus is already registered with Claude Code, nothing was changed\n"
    assert claude.state["mcpServers"] == before

    done = run(home, claude, "disable", "claude-mcp")
    assert (done.returncode, done.stderr) == (0, "")
    assert claude.entry() is None
    again = run(home, claude, "disable", "claude-mcp")
    assert (again.returncode, again.stdout) == (
        0,
        "agentbus is not registered with Claude Code, nothing to do there\n",
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.spec("MOD-11")
def test_the_module_comes_with_the_registration_and_goes_without_a_trace(home: Path, claude: ClaudeOnPath) -> None:
    others = claude.home / ".claude" / "skills" / "notes" / "SKILL.md"
    others.parent.mkdir(parents=True)
    others.write_text("mine")
    before = tree(claude.home / ".claude")
    run(home, claude, "install")
    folder = others.parents[1] / "agentbus"
    assert tree(folder).keys() == {".claude-plugin/plugin.json", "hooks/hooks.json", "hooks/mod.js"}
    assert json.loads((folder / "hooks" / "hooks.json").read_text()) == {"modules": ["./mod.js"]}
    assert f"{folder} holds the module" in run(home, claude, "doctor").stdout
    # An earlier one is replaced, and what changed is said.
    (folder / "hooks" / "mod.js").write_text("// another version")
    assert "is not what agentbus" in run(home, claude, "doctor").stdout
    mended = run(home, claude, "enable", "claude-mcp").stdout
    assert mended.startswith("agentbus is already registered with Claude Code\nreplaced ")
    # Without the entry, the folder alone is still something to be mended or removed.
    assert claude.run("mcp", "remove", "-s", "user", "agentbus").returncode == 0
    assert standing(home, claude) == ("stale", f"only {folder} is there, without the server")
    done = run(home, claude, "uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"removed {folder}" in done.stdout
    after = tree(claude.home / ".claude")
    assert {name: after.get(name) for name in before} == before
    assert not folder.exists()


@pytest.mark.spec("MOD-11")
def test_a_module_that_cannot_be_put_there_is_said_and_all_else_works(home: Path, stand_in: ClaudeOnPath) -> None:
    folder = stand_in.home / ".claude" / "skills" / "agentbus"
    folder.mkdir(parents=True)
    (folder / "SKILL.md").write_text("somebody's")
    done = run(home, stand_in, "enable", "claude-mcp")
    assert (done.returncode, done.stderr) == (0, "")
    assert "but without its module, so that messages go into the inbox of a session" in done.stdout
    assert f"{folder} is not from agentbus, and was left as it is" in done.stdout
    assert stand_in.entry() is not None
    assert "messages go into the inbox of a session" in run(home, stand_in, "doctor").stdout
    assert run(home, stand_in, "disable", "claude-mcp").returncode == 0
    assert tree(folder) == {"SKILL.md": b"somebody's"}


@pytest.mark.spec("REG-2", "TOOL-6")
def test_an_entry_that_loads_all_tools_at_once_is_renewed(home: Path, claude: ClaudeOnPath) -> None:
    run(home, claude, "enable", "claude-mcp")
    entry = {**(claude.entry() or {}), "env": {"A": "1"}}
    run(home, claude, "disable", "claude-mcp")
    claude.run("mcp", "add-json", "-s", "user", "agentbus", json.dumps({**entry, "alwaysLoad": True}))
    assert standing(home, claude)[0] == "enabled"
    assert "in each request of a model" in run(home, claude, "doctor").stdout
    done = run(home, claude, "install")
    assert "without alwaysLoad: sessions that start now load only the tools that an answer needs" in done.stdout
    assert claude.entry() == entry
    assert "nothing was changed" in run(home, claude, "install").stdout


@pytest.mark.spec("REG-2", "REG-3")
def test_a_stale_registration_is_seen_and_mended(home: Path, claude: ClaudeOnPath) -> None:
    assert claude.run("mcp", "add-json", "-s", "user", "agentbus", json.dumps(ELSEWHERE)).returncode == 0
    how, seen = standing(home, claude)
    assert how == "stale"
    assert "registered as /usr/bin/env serve claude-mcp, but this agentbus is " in seen
    done = run(home, claude, "enable", "claude-mcp")
    assert (done.returncode, done.stderr) == (0, "")
    assert "in place of /usr/bin/env serve claude-mcp" in done.stdout
    entry = claude.entry()
    assert entry is not None
    assert entry["command"] != "/usr/bin/env"
    assert entry["env"] == {"A": "1"}, "what the user has set there is the user's"
    assert standing(home, claude)[0] == "enabled"


@pytest.mark.spec("REG-3")
def test_a_command_that_is_gone_is_stale(home: Path, claude: ClaudeOnPath) -> None:
    gone = json.dumps({**ELSEWHERE, "command": "/nowhere/agentbus"})
    claude.run("mcp", "add-json", "-s", "user", "agentbus", gone)
    how, seen = standing(home, claude)
    assert how == "stale"
    assert "/nowhere/agentbus serve claude-mcp, which does not exist or cannot be run" in seen


@pytest.mark.spec("REG-3")
def test_an_entry_for_the_folder_alone_shadows(home: Path, claude: ClaudeOnPath) -> None:
    run(home, claude, "enable", "claude-mcp")
    subprocess.run(["git", "init", "-q"], cwd=claude.folder, check=True)
    deep = claude.folder / "deep"
    deep.mkdir()
    claude.run("mcp", "add-json", "-s", "local", "agentbus", json.dumps(ELSEWHERE))
    for folder in (claude.folder, deep):
        done = agentbus(home, "list", "--json", cwd=folder, **claude.variables)
        row = row_of_claude(done.stdout)
        assert row["standing"] == "shadowed"
        assert row["remedy"] == f"cd {claude.folder} && claude mcp remove agentbus -s local"
    assert (
        f"but an entry for the folder {claude.folder} overrides it" in run(home, claude, "enable", "claude-mcp").stdout
    )
    subprocess.run(["sh", "-c", row["remedy"]], env={**os.environ, **claude.variables}, check=True, capture_output=True)
    assert standing(home, claude)[0] == "enabled"


@pytest.mark.spec("REG-3")
def test_the_config_folder_of_claude_is_respected(home: Path, claude: ClaudeOnPath, tmp_path: Path) -> None:
    claude.variables["CLAUDE_CONFIG_DIR"] = str(tmp_path / "elsewhere")
    assert run(home, claude, "enable", "claude-mcp").returncode == 0
    assert (tmp_path / "elsewhere" / ".claude.json").exists()
    assert not (claude.home / ".claude.json").exists()
    assert standing(home, claude)[0] == "enabled"


@pytest.mark.spec("REG-3", "REG-5")
def test_a_corrupt_file_is_named_and_left_alone(home: Path, claude: ClaudeOnPath) -> None:
    file = claude.home / ".claude.json"
    file.write_text("{ broken")
    how, seen = standing(home, claude)
    assert how == "unknown"
    assert str(file) in seen
    for verb in ("enable", "disable"):
        done = run(home, claude, verb, "claude-mcp")
        assert done.returncode == 1
        assert done.stderr.startswith(f"agentbus: {file} cannot be read (")
        assert done.stderr.count("\n") == 1
    assert file.read_text() == "{ broken"


@pytest.mark.parametrize("claude", ["stand-in"], indirect=True)
def test_the_stand_in_says_what_the_real_one_says(claude: ClaudeOnPath) -> None:
    said(claude)


@pytest.mark.skipif(REAL is None, reason="claude is not on PATH")
@pytest.mark.parametrize("claude", ["real"], indirect=True)
def test_the_real_one_says_what_was_recorded(claude: ClaudeOnPath) -> None:
    said(claude)


def said(claude: ClaudeOnPath) -> None:
    """The output that was recorded from a run of the real one."""
    text = json.dumps(ELSEWHERE)
    add = ("mcp", "add-json", "-s", "user", "agentbus")
    for arguments, code, output in (
        (("--version",), 0, r"\d+\.\d+\.\d+ \(Claude Code\)\n"),
        (("mcp", "get", "agentbus"), 1, 'No MCP server named "agentbus". Run `claude mcp add` to add one.\n'),
        ((*add, "nonsense"), 1, "Invalid configuration: not a JSON object. Check its quotes, commas and braces.\n"),
        ((*add, text), 0, "Added stdio MCP server agentbus to user config\n"),
        ((*add, text), 1, "MCP server agentbus already exists in user config\n"),
        (("mcp", "remove", "-s", "user", "agentbus"), 0, None),
        (("mcp", "remove", "-s", "user", "agentbus"), 1, 'No MCP server named "agentbus" in user scope\n'),
    ):
        done = claude.run(*arguments)
        assert done.returncode == code, arguments
        printed = done.stderr if code else done.stdout
        if arguments == ("--version",):
            assert re.fullmatch(str(output), printed)
        elif output is None:
            assert printed.splitlines() == [
                "Removed MCP server agentbus from user config",
                f"File modified: {claude.home / '.claude.json'}",
            ]
        else:
            assert printed == output


# -- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.spec("REG-5")
def test_a_claude_that_hangs_is_stopped_with_all_that_it_started(
    stand_in: ClaudeOnPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**stand_in.variables, "STAND_IN_HANG": "add-json"}.items():
        monkeypatch.setenv(name, value)
    found = ClaudeRegistration(registry.manifest("claude-mcp"), cwd=stand_in.folder, patience_s=1.0)
    with pytest.raises(
        BrokenSetup, match=r"claude mcp add-json .* did not end within 1 s and was stopped: run it yourself"
    ):
        found.enable()
    mark = str(stand_in.home.parent)

    def left() -> bool:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in entry.joinpath("environ").read_bytes():
                    return True
            except OSError:
                continue  # the process of another user, or one that has ended
        return False

    if Path("/proc/self/environ").exists():
        monkeypatch.undo()
        until(lambda: not left(), "the end of what hung")


@pytest.mark.spec("REG-4", "REG-5")
def test_a_claude_that_fails_is_one_line_and_what_to_do_by_hand(home: Path, stand_in: ClaudeOnPath) -> None:
    done = run(home, stand_in, "enable", "claude-mcp", STAND_IN_FAIL="add-json")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "agentbus: claude mcp add-json failed with exit code 1 (the config could not be saved: EROFS"
    )
    assert done.stderr.count("\n") == 1
    assert "claude mcp add-json -s user agentbus '{" in done.stdout


@pytest.mark.spec("REG-2", "REG-5")
def test_a_mend_that_fails_puts_the_old_entry_back(home: Path, stand_in: ClaudeOnPath) -> None:
    stand_in.run("mcp", "add-json", "-s", "user", "agentbus", json.dumps(ELSEWHERE))
    wrapper = stand_in.folder.parent / "bin" / "claude"
    real = wrapper.with_name("claude-stand-in")
    wrapper.rename(real)
    # It fails for every entry except the old one.
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-E*) echo no >&2; exit 1;; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    done = run(home, stand_in, "enable", "claude-mcp")
    assert done.returncode == 1
    assert stand_in.entry() == ELSEWHERE


@pytest.mark.spec("REG-4")
def test_without_claude_it_says_what_to_type_and_what_to_paste(home: Path, stand_in: ClaudeOnPath) -> None:
    done = run(home, stand_in, "enable", "claude-mcp", PATH="/nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("agentbus: claude is not on PATH, nothing was changed: ")
    typed = next(line for line in done.stdout.splitlines() if "add-json" in line)
    # The printed line works when it is typed into a shell.
    subprocess.run(["/bin/sh", "-c", typed], env={**os.environ, **stand_in.variables}, check=True, capture_output=True)
    assert standing(home, stand_in)[0] == "enabled"
    pasted = json.loads(done.stdout.split("configuration:\n")[1])
    assert pasted["mcpServers"]["agentbus"]["args"] == ["-E", "-P", "-m", "agentbus", "serve", "claude-mcp"]


@pytest.mark.spec("REG-1")
def test_the_command_survives_every_way_of_installing() -> None:
    assert adapter.own_command() == [os.path.abspath(sys.executable), "-E", "-P", "-m", "agentbus"]
    for once in (
        "/home/u/.cache/uv/archive-v0/Xy12/",
        "/home/u/.cache/uv/environments-v2/x-1",
        "/home/u/.local/share/pipx/.cache/5b2c",
        "/home/u/.cache/pipx/5b2c",
    ):
        with pytest.raises(
            BrokenSetup, match=r"temporary folder \(.*\): install it with `uv tool install` or `pipx install`"
        ):
            adapter.own_command(once)
    for stays in ("/home/u/.local/share/uv/tools/agentbus-local", "/home/u/.local/share/pipx/venvs/agentbus-local"):
        assert adapter.own_command(stays)


@pytest.mark.spec("REG-3")
def test_what_a_name_on_path_leads_to_counts(stand_in: ClaudeOnPath, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = stand_in.folder / "scripts"
    scripts.mkdir()
    ours = scripts / "agentbus"
    ours.write_text("#!/bin/sh\n")
    ours.chmod(0o755)
    link = stand_in.folder.parent / "bin" / "agentbus"
    link.symlink_to(ours)
    for name, value in stand_in.variables.items():
        monkeypatch.setenv(name, value)
    found = ClaudeRegistration(registry.manifest("claude-mcp"), cwd=stand_in.folder, own=lambda: [str(ours)])
    stand_in.run("mcp", "add-json", "-s", "user", "agentbus", json.dumps({**ELSEWHERE, "command": "agentbus"}))
    assert found.registered().standing is Standing.ENABLED
    link.unlink()
    assert found.registered().standing is Standing.STALE


@pytest.mark.spec("REG-3")
@pytest.mark.parametrize(
    ("project", "shared", "how"),
    [
        ({}, True, Standing.ENABLED),  # nobody has approved that file
        ({"enabledMcpjsonServers": ["agentbus"]}, True, Standing.SHADOWED),
        ({"enabledMcpjsonServers": ["agentbus"]}, False, Standing.ENABLED),
        ({"disabledMcpServers": ["agentbus"]}, False, Standing.SHADOWED),
        (
            {"mcpServers": {"agentbus": {"command": "/usr/bin/agentbus", "args": ["serve", "claude-mcp"]}}},
            False,
            Standing.ENABLED,
        ),
        ({"mcpServers": "nonsense", "enabledMcpjsonServers": 7}, True, Standing.ENABLED),
    ],
)
def test_what_a_project_says_of_it(
    stand_in: ClaudeOnPath,
    monkeypatch: pytest.MonkeyPatch,
    project: dict[str, object],
    shared: bool,
    how: Standing,
) -> None:
    for name, value in stand_in.variables.items():
        monkeypatch.setenv(name, value)
    own = {"type": "stdio", "command": "/usr/bin/env", "args": ["serve", "claude-mcp"]}
    state = {"mcpServers": {"agentbus": own}, "projects": {str(stand_in.folder): project}}
    (stand_in.home / ".claude.json").write_text(json.dumps(state))
    if shared:
        other = {"mcpServers": {"agentbus": {**own, "command": "/other/agentbus"}}}
        (stand_in.folder / ".mcp.json").write_text(json.dumps(other))
    found = ClaudeRegistration(registry.manifest("claude-mcp"), cwd=stand_in.folder, own=lambda: ["/usr/bin/env"])
    assert found.registered().standing is how


@pytest.mark.spec("DOCTOR-4")
@pytest.mark.parametrize(
    ("variables", "level", "sentence"),
    [
        ({}, Level.OK, "is version 2.1.331"),
        ({"STAND_IN_VERSION": "2.1.79"}, Level.WRONG, "is version 2.1.79, channels need 2.1.80"),
        ({"STAND_IN_VERSION": "unknown"}, Level.NOTE, "does not print its version"),
        ({"PATH": "/nowhere"}, Level.NOTE, "claude is not on PATH"),
        ({"STAND_IN_HANG": "--version"}, Level.WRONG, "did not end within 1 s"),
    ],
)
def test_what_doctor_is_told_of_claude(
    stand_in: ClaudeOnPath,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    level: Level,
    sentence: str,
) -> None:
    for name, value in {**stand_in.variables, **variables}.items():
        monkeypatch.setenv(name, value)
    found = ClaudeRegistration(registry.manifest("claude-mcp"), cwd=stand_in.folder, patience_s=1.0).findings()
    claude = next(one for one in found if one.code == "client")
    assert claude.level is level
    assert sentence in claude.seen
    registered = next(one for one in found if one.code == "registration")
    assert registered.level is (Level.NOTE if "PATH" in variables else Level.WRONG)
    assert registered.remedy == "agentbus enable claude-mcp"
