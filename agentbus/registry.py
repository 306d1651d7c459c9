"""Which triggers and adapters there are, by name; each is imported when it is first used.

Joins settings, store and triggers to a bus. The only module that knows triggers by name; adapters are found by their
manifests.
Implements [WAKE-5], [CONF-2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from agentbus.bus import Bus
from agentbus.config import Settings, prepare_home
from agentbus.errors import BrokenSetup, InvalidRequest
from agentbus.ports import Trigger
from agentbus.store import Store

__all__ = ["Manifest", "Triggers", "manifests", "open_bus", "serve"]

# In the order of preference when AGENTBUS_TRIGGER is unset.
_TRIGGERS = ("socket", "file-watch", "poll")
_ADAPTERS = Path(__file__).with_name("adapters")


def _make_trigger(name: str, home: Path, poll_ms: int) -> Trigger:
    if name == "socket":
        from agentbus.triggers.socket import SocketTrigger

        return SocketTrigger(home)
    if name == "file-watch":
        from agentbus.triggers.file_watch import FileWatchTrigger

        return FileWatchTrigger(home)
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
class Manifest:
    """What an adapter says of itself in its module.json. `entry` is `module:function`, imported only to serve."""

    id: str
    title: str
    summary: str
    entry: str
    server_name: str
    launch_flags: tuple[str, ...]


def _read_manifest(path: Path) -> Manifest:
    import json  # 5 ms, which `agentbus send` need not pay

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**{**fields, "launch_flags": tuple(fields["launch_flags"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BrokenSetup(
            f"{path} is not the manifest of an adapter ({error})", hint="install agentbus anew"
        ) from error
    return manifest


def manifests() -> list[Manifest]:
    """The manifests of all adapters, by id; no adapter is imported. Raises BrokenSetup for one that is broken."""
    found = [_read_manifest(path) for path in _ADAPTERS.glob("*/module.json")]
    return sorted(found, key=lambda manifest: manifest.id)


def serve(adapter: str, settings: Settings) -> None:
    """Be a peer for the runtime of `adapter` until it goes; does not return.

    Raises InvalidRequest when there is no such adapter, and what its entry raises before it serves.
    """
    known = {manifest.id: manifest for manifest in manifests()}
    if adapter not in known:
        raise InvalidRequest(f"there is no adapter {adapter[:40]!r}", hint=f"use {' or '.join(known)}")
    module, function = known[adapter].entry.split(":")
    getattr(import_module(module), function)(settings, open_bus)
