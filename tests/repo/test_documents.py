"""README.md, SPEC.md and `--help` say the same: commands, options, variables, exit codes; links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from agentbus import registry
from agentbus.cli import app
from agentbus.core import errors
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

ROOT = Path(__file__).parents[2]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
SPEC = ROOT.joinpath("SPEC.md").read_text(encoding="utf-8")
EXIT_CODES = "0 done, 1 failed, 2 usage error, 75 try again later"
# Options that a command can have without SPEC.md saying so each time.
COMMON = {"--help", "-h"}

root: Any = typer.main.get_command(app.app)
COMMANDS: dict[str, Any] = root.commands


def options(command: Any) -> set[str]:
    own = {one for param in command.params for one in param.opts if one.startswith("-")} - COMMON
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def arguments(command: Any) -> list[str]:
    return [param.metavar or param.name.upper() for param in command.params if param.param_type_name == "argument"]


def spec_rows() -> dict[str, str]:
    """The rows of SPEC.md's table of commands, by command."""
    table = SPEC.split("## 8. The command line")[1].split("\n- **")[0]
    return {line.split()[2].rstrip("`"): line.split("|")[1] for line in table.splitlines() if line.startswith("| `")}


@pytest.mark.spec("CLI-3")
def test_spec_has_each_command_with_just_its_options() -> None:
    rows = spec_rows()
    assert set(rows) == {*COMMANDS, "--version"}
    for name, command in COMMANDS.items():
        assert set(re.findall(r"--[a-z0-9-]+", rows[name])) == options(command), name
        for argument in arguments(command):
            word = argument.strip("[]")
            assert word in rows[name] or name == "serve", f"{name}: {argument}"
    reading = {"peers", "groups", "inbox", "history", "search", "status", "watch", "wait", "ask", "list", "doctor"}
    reading |= {"config", "link"}
    assert {name for name, command in COMMANDS.items() if "--json" in options(command)} == reading


def test_readme_has_each_command_and_no_option_that_there_is_not() -> None:
    for name in COMMANDS:
        assert re.search(rf"`(?:agentbus )?{name}\b|agentbus {name}\b", README), name
    known = set().union(*(options(command) for command in COMMANDS.values())) | {"--version", "--install-completion"}
    theirs = {
        "--dangerously-load-development-channels",
        "--allowedTools",
        "--allowed",
        "--help",
        "--against",
        "--no-daemon",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known <= theirs
    # Each command that README shows takes the options that README gives it.
    for line in re.findall(r"^\$ agentbus (.*)$", README, re.MULTILINE):
        name, rest = [*line.split("#")[0].split(maxsplit=1), ""][:2]
        if name in COMMANDS:
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest)) <= options(COMMANDS[name]), line


@pytest.mark.spec("CLI-4")
def test_exit_codes_are_the_same_everywhere(home: Path) -> None:
    for text in (README, SPEC, agentbus(home, "--help", COLUMNS="300").stdout):
        assert EXIT_CODES in " ".join(text.split())
    codes = {getattr(errors, name).exit_code for name in errors.__all__}
    assert codes == {1, 2, 75}


def test_help_shows_no_variable_that_there_is_not(home: Path) -> None:
    for name in COMMANDS:
        shown = agentbus(home, name, "--help", COLUMNS="200").stdout
        assert set(re.findall(r"AGENTBUS_[A-Z_]+", shown)) <= set(registry.variables()), name
        assert len(re.findall(r"Example: ", shown)) == 1, name
        # The example is a command line that makes sense.
        example = " ".join(shown.split("Example: ")[1].split("╭")[0].split())
        assert f"agentbus {name}" in example


def test_every_variable_is_known_and_documented_with_its_values() -> None:
    for name, text in (("SPEC.md", SPEC), ("README.md", README)):
        rows = set(re.findall(r"^\| `(AGENTBUS_[A-Z_]+)` \|", text, re.MULTILINE))
        assert rows == set(registry.variables()), name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "SPEC.md", "bench/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = ROOT.joinpath(name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("http") or ROOT.joinpath(name).parent.joinpath(target).exists(), target


@pytest.mark.spec("CLI-6")
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("agentbus sta", ["status"]),
        ("agentbus history --si", ["--since"]),
        ("agentbus send ba", ["backend", "backoffice"]),
        ("agentbus doctor backe", ["backend"]),
        ("agentbus inbox x", []),
    ],
)
def test_a_shell_completes_commands_options_and_names(home: Path, words: str, completions: list[str]) -> None:
    for name in ("backend", "backoffice", "frontend"):
        agentbus(home, "send", name, "hi")
    env = clean_env(home, _AGENTBUS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    done = subprocess.run(
        [Path(sys.executable).with_name("agentbus")], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == completions


@pytest.mark.spec("CLI-6")
def test_completing_makes_nothing_and_says_nothing_of_what_is_broken(home: Path) -> None:
    env = clean_env(home, _AGENTBUS_COMPLETE="complete_bash", COMP_WORDS="agentbus send b", COMP_CWORD="2")
    command = [Path(sys.executable).with_name("agentbus")]
    assert subprocess.run(command, env=env, capture_output=True, text=True).stdout.split() == []
    assert not home.exists()
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    (home / "bus.db").write_text("x")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


@pytest.mark.spec("CLI-6")
def test_typer_installs_the_completion_for_bash(home: Path, tmp_path: Path) -> None:
    # typer asks which shell has started it, so a shell starts it here.
    command = f"'{Path(sys.executable).with_name('agentbus')}' --install-completion; true"
    env = clean_env(home, HOME=str(tmp_path), SHELL="/bin/bash")
    done = subprocess.run(["/bin/bash", "-c", command], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "bash completion installed" in done.stdout, done.stdout + done.stderr
    script = next(path for path in tmp_path.rglob("*agentbus*") if path.is_file())
    assert "_AGENTBUS_COMPLETE=complete_bash" in script.read_text()
    assert os.path.exists(tmp_path / ".bashrc")
    until(lambda: not home.exists())
