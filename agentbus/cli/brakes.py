"""The commands of the brakes: pause and resume. They are for a person, and refused in a shell that an agent runs.

Implements [BRAKE-2], [BRAKE-5].
"""

from __future__ import annotations

from agentbus.cli import common
from agentbus.cli.messages import parse_span
from agentbus.core.errors import InvalidRequest
from agentbus.core.stdout import reported

__all__ = ["pause", "resume"]

_MOST_DAYS = 365


def pause(name: str | None, *, is_all: bool, span: str | None) -> None:
    """Pause a session, or all that are online, for `span` or until a person resumes them. Raises as `Bus.pause`."""
    _check_who("pause", name, is_all=is_all)
    for_ms = None if span is None else parse_span("--for", span, _MOST_DAYS)
    with common.bus_and_settings() as (bus, settings):
        by = common.person_here(bus, settings, "pause")
        paused = bus.pause(name, by=by, for_ms=for_ms)
    with reported():
        for one in paused:
            print(f'"{one.name}" is {one}: it sends nothing, and its mail waits')


def resume(name: str | None, *, is_all: bool) -> None:
    """End the pause of a session, or all pauses. Raises as `Bus.resume`."""
    _check_who("resume", name, is_all=is_all)
    with common.bus_and_settings() as (bus, settings):
        by = common.person_here(bus, settings, "resume")
        names, resumed = bus.resume(name, by=by)
    with reported():
        if not names:
            print("nobody is paused")
        for one in names:
            print(
                f'"{one}" {"is resumed" if one in resumed else "was not paused; what it sends is counted from now on"}'
            )


def _check_who(what: str, name: str | None, *, is_all: bool) -> None:
    if (name is None) is not is_all:
        both = "not both a name and --all" if is_all else "a name, or --all"
        raise InvalidRequest(f"agentbus {what} takes {both}", hint="agentbus peers shows who is there")
