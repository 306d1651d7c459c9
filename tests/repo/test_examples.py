"""The files in examples/ work as they say: a real git hook, a real job, the plugin's manifest, the pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest

from agentbus import __version__, registry
from agentbus.adapters.claude_mcp import plugin
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

EXAMPLES = Path(__file__).parents[2] / "examples"


def on_path(home: Path, **variables: str) -> dict[str, str]:
    """An environment with this agentbus on PATH, and git without the settings of the user who runs the tests."""
    folder = Path(sys.executable).parent
    git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(home.parent)}
    who = {f"GIT_{role}_{what}": "x@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return clean_env(home, PATH=f"{folder}:{os.environ['PATH']}", **git, **who, **variables)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH")
def test_the_git_hook_tells_a_session_of_each_commit(home: Path, tmp_path: Path) -> None:
    git = repository_with_hook(tmp_path / "shop", home)
    git("commit", "--allow-empty", "-m", "nobody is told")
    git("config", "agentbus.tell", "backend")
    (tmp_path / "shop" / "a.txt").write_text("x")
    git("add", "a.txt")
    git("commit", "-m", "add a")
    (row,) = until(lambda: _inbox(home), "the message")
    assert row["from"] == "git-shop"
    assert re.fullmatch(r"commit \w+ on .* by x@example.com: add a\nA\ta.txt", row["text"])
    # A bus that cannot be used does not make a commit fail.
    home.chmod(0o777)
    git("commit", "--allow-empty", "-m", "still works")
    log = tmp_path / "shop" / ".git" / "agentbus.log"
    until(lambda: "can be written by other users" in log.read_text(), "the reason in the log")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH")
def test_a_commit_does_not_wait_for_a_locked_database(home: Path, tmp_path: Path) -> None:
    git = repository_with_hook(tmp_path / "shop", home)
    git("config", "agentbus.tell", "backend")
    agentbus(home, "send", "backend", "first")
    with closing(sqlite3.connect(home / "bus.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        # A send gives up after 10 s. git is run to the end of its output, so nothing of the hook may hold that open.
        git("commit", "--allow-empty", "-m", "while it is locked", timeout=9)
        assert len(_inbox(home)) == 1
        writer.execute("ROLLBACK")
    until(lambda: len(_inbox(home)) == 2, "the message")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH")
def test_the_git_hook_tells_of_a_repository_whatever_its_folder_is_called(home: Path, tmp_path: Path) -> None:
    for folder in ("x" * 60, "shop (old)", "ö" * 40):
        git = repository_with_hook(tmp_path / folder, home)
        git("config", "agentbus.tell", "backend")
        git("commit", "--allow-empty", "-m", folder)
        until(lambda said=folder: any(row["text"].endswith(said) for row in _inbox(home)), f"the message of {folder}")


def repository_with_hook(folder: Path, home: Path) -> Callable[..., None]:
    """A new repository with the hook in it; returns what runs git there."""
    folder.mkdir()
    env = on_path(home)

    def git(*arguments: str, timeout: float = PATIENCE_S) -> None:
        subprocess.run(["git", *arguments], cwd=folder, env=env, check=True, capture_output=True, timeout=timeout)

    git("init", "-q")
    shutil.copy(EXAMPLES / "git-hook" / "post-commit", folder / ".git" / "hooks" / "post-commit")
    return git


def test_a_job_asks_a_session_and_prints_its_answer(home: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "ci" / "ask-a-session.sh"
    passed = subprocess.run([script, "backend", "true"], env=on_path(home), capture_output=True, text=True, timeout=60)
    assert (passed.returncode, passed.stderr) == (0, "")
    with subprocess.Popen(
        [script, "backend", "sh", "-c", "echo broken test; exit 3"],
        env=on_path(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        answer_question(home, "the test is wrong", "exit code 3", "broken test")
        out, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 3, "that of the command"
    assert out.endswith("backend answered: the test is wrong\n")
    flag = tmp_path / "flag"
    with subprocess.Popen(
        [script, "backend", "sh", "-c", f"test -e {flag} || {{ touch {flag}; exit 4; }}"],
        env=on_path(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        answer_question(home, "Again, it is flaky", "exit code 4", "")
        out, _ = job.communicate(timeout=PATIENCE_S)
    assert (job.returncode, out) == (0, "backend answered: Again, it is flaky\n"), "the answer is used"
    late = subprocess.run(
        [script, "backend", "false"], env=on_path(home, ANSWER_S="0"), capture_output=True, text=True, timeout=60
    )
    assert late.returncode == 1
    assert "no answer yet; it will wait in the mailbox: agentbus inbox ci-" in late.stdout


def answer_question(home: Path, answer: str, said: str, end: str) -> None:
    (row,) = until(lambda: [row for row in _inbox(home) if said in row["text"]], "the job's question")
    assert row["text"].endswith(end)
    assert row["answer_by"]
    done = agentbus(home, "send", row["from"], answer, "--from", "backend", "--reply-to", f"#{row['id']}")
    assert done.stdout.endswith(", which waits for this answer\n")


def _inbox(home: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in agentbus(home, "inbox", "backend", "--json").stdout.splitlines()]


def test_the_plugin_runs_the_same_server_as_the_module() -> None:
    folder = EXAMPLES / "claude-plugin"
    described = json.loads((folder / plugin.MAIN).read_text())
    assert (described["name"], described["version"]) == ("agentbus", __version__)
    module = registry.manifest("claude-mcp")
    entry = json.loads((folder / ".mcp.json").read_text())["mcpServers"][module.server_name]
    # Without the variables of the host that would shadow what agentbus imports.
    isolated = ("-u", "PYTHONPATH", "-u", "PYTHONHOME", "agentbus", *module.serve)
    assert (entry["command"], tuple(entry["args"])) == ("env", isolated)
    assert "alwaysLoad" not in entry
    assert described["channels"] == [{"server": module.server_name}]


@pytest.mark.spec("MOD-11")
def test_the_plugin_has_the_same_module_as_is_installed() -> None:
    folder = EXAMPLES / "claude-plugin"
    made = plugin.files()
    described = json.loads((folder / plugin.MAIN).read_text())
    assert {key: described[key] for key in ("name", "version")} == {
        key: json.loads(made[plugin.MAIN])[key] for key in ("name", "version")
    }
    for name in sorted(made.keys() - {plugin.MAIN}):
        assert (folder / name).read_text() == made[name], name


@pytest.mark.skipif(shutil.which("claude") is None, reason="claude is not on PATH")
def test_claude_itself_accepts_the_plugin(tmp_path: Path) -> None:
    env = {**clean_env(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["claude", "plugin", "validate", str(EXAMPLES / "claude-plugin")],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["demo", "watch", "console", "console-pause"])
def test_the_pictures_are_whole_and_load_nothing(name: str) -> None:
    text = (EXAMPLES / f"{name}.svg").read_text(encoding="utf-8")
    words = "".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    assert f"$ agentbus {name.split('-')[0]}" in words
    assert not re.findall(r"url\((?!#)|https?://(?!www\.w3\.org/)", text)
