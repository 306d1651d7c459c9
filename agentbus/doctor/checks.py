"""How a check is made: its failure is a finding like any other. Implements [DOCTOR-3]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agentbus.core.errors import AgentbusError
from agentbus.core.findings import Finding, Level, from_error

__all__ = ["safely"]


def safely(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; its failure is one more. [DOCTOR-3]"""
    try:
        yield from check()
    except AgentbusError as error:
        yield from_error(what, error)
    except Exception as error:  # noqa: BLE001 - a doctor that falls over its patient helps nobody: it is said instead
        seen = f"this could not be looked at ({type(error).__name__}: {error})"
        yield Finding(what, Level.WRONG, seen, "agentbus doctor --json, and report it")
