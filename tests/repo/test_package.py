"""The wheel: everything in it, installed alone into a fresh environment, the demo runs."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from agentbus import __version__
from tests.support.command import clean_env

ROOT = Path(__file__).parents[2]


def pip(python: Path | str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(400)  # it downloads and installs what the package needs
def test_the_wheel_works_when_installed_alone(home: Path, tmp_path: Path) -> None:
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    source = {path.relative_to(ROOT).as_posix() for path in ROOT.joinpath("agentbus").rglob("*") if path.is_file()}
    packed = {name for name in files if name.startswith("agentbus/")}
    assert packed == {name for name in source if "__pycache__" not in name}
    for needed in ("agentbus/core/migrations/0001_mailbox.sql", "agentbus/adapters/claude_mcp/module.json"):
        assert needed in packed
    assert "agentbus/py.typed" in packed

    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=True)
    pip(fresh / "bin" / "python", "install", "--quiet", wheel)
    env = clean_env(home, TMPDIR="/tmp", HOME=str(tmp_path), PATH="/usr/bin:/bin")
    env.pop("PYTHONPATH", None)
    env.pop("VIRTUAL_ENV", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(fresh / "bin" / "agentbus"), *arguments]
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120, check=False)

    assert run("--version").stdout == f"agentbus {__version__}\n"
    demo = run("demo")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert "All 6 steps happened." in demo.stdout
    # The registered command is the one of this very environment.
    assert f"{fresh / 'bin' / 'python'}" in run("enable", "claude-mcp").stdout
    listed = run("list")
    assert (listed.returncode, listed.stderr) == (0, "")
