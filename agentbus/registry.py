"""Which triggers and adapters there are, by name; each is imported when it is first used.

Joins settings, store and triggers to a bus. The only module that knows triggers by name; adapters are found by their
manifests. Implements [WAKE-5], [WATCH-1], [MOD-1], [CONF-2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

from agentbus.core.bus import Bus
from agentbus.core.config import Settings, prepare_home
from agentbus.core.errors import BrokenSetup, InvalidRequest
from agentbus.core.ports import Trigger
from agentbus.core.store import Store
from agentbus.core.watchers import Watchers

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

    from agentbus.core.adapter import Manifest, Registration

__all__ = ["Triggers", "manifest", "manifests", "open_bus", "registration", "serve", "watchers"]

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
        self.watchers = watchers(settings)

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
        self.watchers.close()

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


def watchers(settings: Settings) -> Watchers:
    """The watchers of the home, each with a socket in `watch/`. [WATCH-1]"""

    def make() -> Trigger:
        from agentbus.triggers.socket import SocketTrigger

        return SocketTrigger(settings.home, folder="watch")

    return Watchers(settings.home / "watch", make)


def open_bus(settings: Settings, *, busy_ms: int, on_wal: Callable[[int], None] | None = None) -> tuple[Bus, Triggers]:
    """The bus of `settings.home`, created as needed, and its triggers.

    `busy_ms` is how long a call waits inline for another writer: 0 in an event loop.

    Raises BrokenSetup when the home or the database is not fit, TryAgain when it is locked for 10 s.
    """
    path = prepare_home(settings.home)
    triggers = Triggers(settings)
    store = Store(path, busy_ms=busy_ms, sync=settings.sync, on_wal=on_wal)
    return Bus(store, triggers, max_bytes=settings.max_bytes, tell=triggers.watchers.tell), triggers


def _read_manifest(path: Path) -> Manifest:
    import json  # 5 ms, which `agentbus send` need not pay

    from agentbus.core.adapter import Manifest

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        lists = {key: tuple(fields[key]) for key in ("serve", "launch_flags")}
        manifest = Manifest(**{**fields, **lists})
        texts = [value for value in fields.values() if not isinstance(value, list)]
        if not all(isinstance(value, str) for value in (*texts, *manifest.serve, *manifest.launch_flags)):
            raise ValueError("what should be text is not")
        if not (":" in manifest.entry and ":" in manifest.registration):
            raise ValueError("entry and registration are module:function")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BrokenSetup(
            f"{path} is not the manifest of a module ({error})", hint="install agentbus anew, or remove that folder"
        ) from error
    return manifest


def manifests() -> tuple[list[Manifest], list[BrokenSetup]]:
    """The manifests of all modules, by id, and what is wrong with the broken ones; imports no adapter. [MOD-1]"""
    found: list[Manifest] = []
    broken: list[BrokenSetup] = []
    for path in sorted(_ADAPTERS.glob("*/module.json")):
        try:
            found.append(_read_manifest(path))
        except BrokenSetup as error:
            broken.append(error)
    return sorted(found, key=lambda manifest: manifest.id), broken


def manifest(module: str) -> Manifest:
    """The manifest of the module with that id.

    Raises InvalidRequest when there is none, BrokenSetup when it may be the one whose manifest is broken.
    """
    found, broken = manifests()
    for one in found:
        if one.id == module:
            return one
    if broken:
        raise broken[0]
    known = " or ".join(one.id for one in found)
    raise InvalidRequest(f"there is no module {module[:40]!r}", hint=f"use {known}")


def registration(of: Manifest) -> Registration:
    """What its client knows of a module. Raises BrokenSetup when the module is not what its manifest says."""
    made: Registration = _named(of, of.registration)(of)
    return made


def _named(of: Manifest, dotted: str) -> Any:
    module, _, function = dotted.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BrokenSetup(f"the module {of.id} cannot be loaded ({error})", hint="install agentbus anew") from error


def serve(module: str, settings: Settings) -> None:
    """Be a peer for the runtime of `module` until it goes; does not return.

    Raises InvalidRequest when there is no such module, and what its entry raises before it serves.
    """
    of = manifest(module)
    _named(of, of.entry)(settings, open_bus)
