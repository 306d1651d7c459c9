"""The examples in the README work as they are shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agentbus as package
from tests.support.command import agentbus, clean_env, until

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

ROOT = Path(__file__).parents[2]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_program_runs_and_answers(home: Path) -> None:
    (program,) = blocks("python")
    worker = subprocess.Popen(
        [sys.executable, "-u", "-c", program], env=clean_env(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(lambda: "worker" in agentbus(home, "peers").stdout)
        agentbus(home, "send", "--from", "boss", "worker", "are you there?")
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"boss are you there?\n"
        until(lambda: '"boss" (offline)' in agentbus(home, "peers").stdout)
    finally:
        worker.kill()
        worker.communicate()
    assert '"backend" (offline)' in agentbus(home, "peers").stdout


def test_the_strangers_session_is_as_shown(home: Path) -> None:
    shown = next(block for block in blocks("console") if "agentbus send nobody hi" in block)
    printed = ""
    for line in shown.splitlines(keepends=True):
        if line.startswith("$ agentbus "):
            printed += line + agentbus(home, *line.split()[2:]).stdout
        elif line.startswith("$ "):
            printed += line
    assert printed == shown


@pytest.mark.spec("ASK-7", "ASK-3", "THREAD-3")
def test_asking_works_as_it_is_shown(home: Path) -> None:
    shown = next(block for block in blocks("console") if "agentbus ask backend" in block)
    env = clean_env(home, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    answers = (
        "import anyio, agentbus\n"
        "async def main():\n"
        "    async with agentbus.join('backend') as me:\n"
        "        async for one in me:\n"
        "            await me.send(one.sender, '8080', reply_to=one.id)\n"
        "anyio.run(main)\n"
    )
    printed = ""
    with subprocess.Popen([sys.executable, "-c", answers], env=env) as backend:
        try:
            until(lambda: "backend" in agentbus(home, "peers").stdout)
            for line in shown.splitlines(keepends=True):
                if line.startswith("$ "):
                    command = ["sh", "-c", f"exec 2>&1; {line[2:]}"]
                    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
                    printed += line + done.stdout
        finally:
            backend.kill()
    assert printed == shown


def test_the_tools_and_commands_are_those_that_there_are() -> None:
    from agentbus.adapters.mcp.tools import TOOLS

    shown = re.findall(r"^\| `(\w+)\{(.*?)\}` \|", README, re.MULTILINE)
    assert [(tool.name, ", ".join(tool.arguments)) for tool in TOOLS] == shown
    assert f"## {package.__version__}" in ROOT.joinpath("CHANGELOG.md").read_text(encoding="utf-8")


def test_every_module_that_is_benchmarked_exists() -> None:
    for name in set(re.findall(r"python -m (bench\.\w+)", README)):
        assert ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()
