"""`agentbus config`: shows and sets what holds for everybody on a bus, and is kept in its database.

What concerns one process alone is a variable of its environment. Implements [CONF-5].
"""

from __future__ import annotations

from contextlib import nullcontext

from agentbus.cli import common, output
from agentbus.core import config as settings
from agentbus.core.config import RETENTION, SHARED, Shared
from agentbus.core.errors import InvalidRequest
from agentbus.core.stdout import reported

__all__ = ["config"]


def config(key: str | None, value: str | None, *, as_json: bool) -> None:
    """Show all settings of the bus, or one; or set one. Raises InvalidRequest."""
    if key is not None and key not in SHARED:
        raise InvalidRequest(f"there is no setting {key[:40]!r}", hint=f"use {' or '.join(SHARED)}")
    chosen = list(SHARED.values()) if key is None else [SHARED[key]]
    wanted = None if value is None else chosen[0].check(value)
    with common.bus_and_settings() as (bus, _settings):
        before = [bus.store.queries.setting(one) for one in chosen]
        if wanted is not None:
            bus.store.set_setting(chosen[0], wanted, may_lower=True)
    with nullcontext() if wanted is None else reported():
        for one, now in zip(chosen, before if wanted is None else [wanted], strict=True):
            if as_json:
                _print_json(one, now)
            elif wanted is not None:
                _print_change(one, before[0], wanted)
            elif key is not None:
                print(now)
            else:
                _print_line(one, now)


def _print_json(one: Shared, now: int) -> None:
    row = {"key": one.key, "value": now, "default": one.default, "low": one.low, "high": one.high}
    said = settings.other_program(one.variable)
    output.json_line({**row, "variable": one.variable, "variable_value": said or None})


def _print_line(one: Shared, now: int) -> None:
    print(f"{one.key}  {now}  {one.meaning}: {one.low:,} to {one.high:,}, default {one.default:,}")
    said = settings.other_program(one.variable)
    if said:
        print(f"  {one.variable} is {said} here: it can raise this when a session starts, and never lowers it")


def _print_change(one: Shared, before: int, now: int) -> None:
    is_cut = one is RETENTION and now < before
    removes = "; what is older is removed by the next heartbeat of a session" if is_cut else ""
    print(f"{one.key} is {now:,} now, it was {before:,}{removes}")
