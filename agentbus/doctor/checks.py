"""Runs a check, and turns its failure into a finding like any other. Implements [DOCTOR-3]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agentbus.core.errors import AgentbusError
from agentbus.core.findings import Finding, Level, from_error

__all__ = ["safely"]


def safely(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. If the check fails, that is one more finding. [DOCTOR-3]"""
    try:
        yield from check()
    except AgentbusError as error:
        yield from_error(what, error)
    except Exception as error:  # noqa: BLE001 - doctor must not crash on what it examines: it reports it
        seen = f"this check failed ({type(error).__name__}: {error})"
        yield Finding(what, Level.WRONG, seen, "run agentbus doctor --json, and report its output")
