"""Which triggers and adapters there are, by name; each is imported when it is first used.

Joins settings, store and triggers to a bus. The only module that knows implementations by name.
Implements [WAKE-5], [CONF-2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentbus.bus import Bus
from agentbus.config import Settings, prepare_home
from agentbus.errors import InvalidRequest
from agentbus.ports import Trigger
from agentbus.store import Store

__all__ = ["ADAPTERS", "Triggers", "adapter", "open_bus"]

# In the order of preference when AGENTBUS_TRIGGER is unset.
_TRIGGERS = ("socket", "poll")
ADAPTERS = ("claude-mcp",)


def _make_trigger(name: str, home: Path, poll_ms: int) -> Trigger:
    if name == "socket":
        from agentbus.triggers.socket import SocketTrigger

        return SocketTrigger(home)
    from agentbus.triggers.poll import PollTrigger

    return PollTrigger(home, poll_ms=poll_ms)


class Triggers(Mapping[str, Trigger]):
    """The triggers of one home, made when they are first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[str, Trigger] = {}

    def __getitem__(self, name: str) -> Trigger:
        if name not in _TRIGGERS:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = _make_trigger(name, self._settings.home, self._settings.poll_ms)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_TRIGGERS)

    def __len__(self) -> int:
        return len(_TRIGGERS)

    def close(self) -> None:
        """Give back what the triggers that were used keep open."""
        for trigger in self._made.values():
            trigger.close()

    def preferred(self) -> list[Trigger]:
        """What a session tries, in order: the one that AGENTBUS_TRIGGER names, or all. [WAKE-5]

        Raises InvalidRequest for a name that is none.
        """
        asked = self._settings.trigger
        if asked is None:
            return [self[name] for name in _TRIGGERS]
        if asked not in _TRIGGERS:
            raise InvalidRequest(
                f"AGENTBUS_TRIGGER is {asked[:40]!r}", hint=f"set it to {' or '.join(_TRIGGERS)}, or unset it"
            )
        return [self[asked]]


def open_bus(settings: Settings, *, busy_ms: int, on_wal: Callable[[int], None] | None = None) -> tuple[Bus, Triggers]:
    """The bus of `settings.home`, created as needed, and its triggers.

    `busy_ms` is how long a call waits inline for another writer: 0 in an event loop.

    Raises BrokenSetup when the home or the database is not fit, TryAgain when it is locked for 10 s.
    """
    path = prepare_home(settings.home)
    triggers = Triggers(settings)
    store = Store(path, busy_ms=busy_ms, sync=settings.sync, on_wal=on_wal)
    return Bus(store, triggers, max_bytes=settings.max_bytes), triggers


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be served: `serve` runs a session until its client goes, and does not return."""

    name: str
    serve: Callable[[Settings], None]


def adapter(name: str) -> Adapter:
    """The adapter called `name`. Raises InvalidRequest when there is none."""
    if name == "claude-mcp":
        from agentbus.adapters.claude_mcp.server import serve

        return Adapter(name, lambda settings: serve(settings, open_bus))
    raise InvalidRequest(f"there is no adapter {name[:40]!r}", hint=f"use {' or '.join(ADAPTERS)}")
