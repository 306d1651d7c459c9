"""What a check has found: the one form in which `doctor`, `list` and the adapters say what is right and what is not.

A value and nothing else; knows nothing of who checks or who prints. Implements [DOCTOR-1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from agentbus.core.errors import AgentbusError

__all__ = ["Finding", "Level", "from_error"]


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"  # looked at, and as it should be
    NOTE = "note"  # nothing is wrong, and worth knowing
    WRONG = "wrong"  # something does not work, and `remedy` mends it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `code` is stable, lower case with dashes: scripts may ask for it.

    `seen` is one sentence without a full stop; `remedy` is the command that mends it, or how to mend it.
    """

    code: str
    level: Level
    seen: str
    remedy: str = ""


def from_error(code: str, error: AgentbusError) -> Finding:
    """What an error of ours is as a finding: its sentence, and its hint as the remedy."""
    return Finding(code, Level.WRONG, str(error.args[0]), error.hint or "")
