"""Findings of a check: the one form in which `doctor`, `list` and the adapters say what is right and what is not.

A finding is a plain value. Knows nothing about the checks or about printing. Implements [DOCTOR-1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from agentbus.core.errors import AgentbusError

__all__ = ["Finding", "Level", "from_error"]


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"  # checked, and as it should be
    NOTE = "note"  # nothing is wrong, but it is worth knowing
    WRONG = "wrong"  # something does not work, and `remedy` fixes it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `code` is stable, lower case with dashes: scripts can look for it.

    `seen` is one sentence without a full stop; `remedy` is the command that fixes it, or how to fix it.
    """

    code: str
    level: Level
    seen: str
    remedy: str = ""


def from_error(code: str, error: AgentbusError) -> Finding:
    """The finding for an error of agentbus: its sentence, and its hint as the remedy."""
    return Finding(code, Level.WRONG, str(error.args[0]), error.hint or "")
