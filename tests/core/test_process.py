from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agentbus.core import process
from agentbus.core.process import Life, Process
from tests.support.command import until


@pytest.mark.spec("PRES-1")
def test_this_process_and_its_parents_live() -> None:
    here = process.current()
    assert here.pid == os.getpid()
    assert process.life(here) is Life.LIVES
    chain = process.ancestors()
    assert chain[0] == process.parent()
    assert chain[0].pid == os.getppid()
    assert all(process.life(one) is Life.LIVES for one in chain)


@pytest.mark.spec("PRES-1")
def test_a_pid_that_was_used_again_is_another_process() -> None:
    here = process.current()
    assert process.life(Process(here.pid, "long ago")) is Life.ENDED


@pytest.mark.spec("PRES-1")
def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: process.look_up(child.pid) is None)  # it has ended, and nobody has waited for it
    os.kill(child.pid, 0)
    child.wait()


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1])
def test_no_process_is_none(pid: int) -> None:
    assert process.look_up(pid) is None


@pytest.mark.spec("PRES-1")
def test_ps_tells_what_proc_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the code for systems without /proc on this system."""
    parents = [one.pid for one in process.ancestors()]
    monkeypatch.setattr(process, "_HAS_PROC", False)
    here = process.current()
    assert here.started
    assert process.life(here) is Life.LIVES
    assert process.life(Process(here.pid, "long ago")) is Life.ENDED
    assert [one.pid for one in process.ancestors()] == parents
    assert process.look_up(2**22 + 1) is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: process.look_up(child.pid) is None)
    child.wait()
