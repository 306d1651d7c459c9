"""The triggers and adapters, by name. Each is imported when it is first used.

Makes a bus out of settings, store and triggers. The only door from the core to its edges: the table below names the
triggers, and each adapter is found by its manifest. Implements [WAKE-5], [WATCH-1], [MOD-1], [CONF-2].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module

from agentbus.core import config
from agentbus.core.bus import Bus
from agentbus.core.config import Settings, prepare_home
from agentbus.core.errors import AgentbusError, BrokenSetup, InvalidRequest
from agentbus.core.ports import ListeningTrigger, Shown, Trigger
from agentbus.core.presence import FOLDER
from agentbus.core.shadows import explain
from agentbus.core.store import Store
from agentbus.core.watchers import Watchers

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from agentbus.core.adapter import Manifest, Reachable, Registration
    from agentbus.core.model import Peer
    from agentbus.core.process import Process

__all__ = [
    "CONVERSATIONS",
    "TRIGGERS",
    "Triggers",
    "folders",
    "leftovers",
    "link",
    "manifest",
    "manifests",
    "open_bus",
    "registration",
    "running",
    "serve",
    "variables",
    "watchers",
]

# Every trigger, in the order of preference when AGENTBUS_TRIGGER is unset, with the function that makes it. [WAKE-5]
TRIGGERS = {
    "socket": "agentbus.triggers.socket:make",
    "file-watch": "agentbus.triggers.file_watch:make",
    "poll": "agentbus.triggers.poll:make",
}
# The variables in which a client tells its shell commands which conversation they belong to. [CLI-2]
# The second one is that of the main agent, whose subagent's shell it may be.
CONVERSATIONS = ("CODEX_THREAD_ID", "CODEX_SESSION_ID")
_ADAPTERS = os.path.join(os.path.dirname(__file__), "adapters")


def _load(dotted: str) -> Any:
    """The function that `module:function` names. Raises ImportError and AttributeError."""
    module, _, function = dotted.partition(":")
    return getattr(import_module(module), function)


class Triggers(Mapping[str, Trigger]):
    """The triggers of one home. Each is made when it is first used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[str, Trigger] = {}
        self.watchers = watchers(settings)

    def __getitem__(self, name: str) -> Trigger:
        if name not in self._made:
            self._made[name] = _load(TRIGGERS[name])(self._settings)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(TRIGGERS)

    def __len__(self) -> int:
        return len(TRIGGERS)

    def close(self) -> None:
        """Close the triggers that were used, and the watchers."""
        for trigger in self._made.values():
            trigger.close()
        self.watchers.close()

    @property
    def usual(self) -> str:
        """The name of the trigger that a session uses when it can choose."""
        return next(iter(TRIGGERS))

    def preferred(self) -> list[Trigger]:
        """The triggers that a session tries, in order: the one that AGENTBUS_TRIGGER names, or all. [WAKE-5]

        Raises InvalidRequest when AGENTBUS_TRIGGER does not name a trigger.
        """
        asked = self._settings.trigger
        if asked is None:
            return list(self.values())
        if asked not in TRIGGERS:
            raise InvalidRequest(
                f"AGENTBUS_TRIGGER is {asked[:40]!r}", hint=f"set it to {' or '.join(TRIGGERS)}, or unset it"
            )
        return [self[asked]]


def watchers(settings: Settings) -> Watchers:
    """The watchers of the home. Sockets wake them; if a watcher cannot have a socket, it polls. [WATCH-1]"""

    def make() -> ListeningTrigger:
        trigger: ListeningTrigger = _load(TRIGGERS["socket"])(settings, folder=config.WATCH_FOLDER)
        return trigger

    return Watchers(f"{settings.root}/{config.WATCH_FOLDER}", make)


def open_bus(
    settings: Settings,
    *,
    busy_ms: int,
    on_wal: Callable[[int], None] | None = None,
    make_store: Callable[..., Store] = Store,
    make_bus: Callable[..., Bus] = Bus,
) -> tuple[Bus, Triggers]:
    """The bus of `settings.home`, created as needed, and its triggers.

    `busy_ms` is how long a call waits inline for another writer: 0 in an event loop.

    Raises BrokenSetup when the home or the database is not usable, TryAgain when the database is locked for 10 s.
    """
    path = prepare_home(settings.root)
    triggers = Triggers(settings)
    store = make_store(path, busy_ms=busy_ms, sync=settings.sync, on_wal=on_wal)
    bus = make_bus(store, triggers, max_bytes=settings.max_bytes, tell=triggers.watchers.tell)
    bus.recorded = _recorded
    bus.running = lambda name: running(settings, name)
    bus.activity = _Activities(store)
    return bus, triggers


def running(settings: Settings, name: str | None = None) -> list[Reachable]:
    """The sessions that the clients of this machine run, joined or not, all or those called `name`. [REACH-1]

    Raises BrokenSetup when an adapter does not match its manifest.
    """
    return [found for sessions in _session_lists() for found in sessions(settings.root, name)]


@cache
def _session_lists() -> list[Callable[[str, str | None], list[Reachable]]]:
    """What lists the running sessions, of each adapter that can. Kept: a program can send often to who is not there.

    Found by the name of its file: to read the manifests takes 10 ms, and `agentbus send` would wait for it.
    """
    folders = [name for name in sorted(os.listdir(_ADAPTERS)) if os.path.exists(f"{_ADAPTERS}/{name}/reach.py")]
    return [_part(name, f"agentbus.adapters.{name}.reach:sessions") for name in folders]


def _recorded(runtime: str, place: str) -> set[Shown] | None:
    """What the record of a session of the adapter `runtime` at `place` shows; None if it cannot be read. [STATE-6]"""
    try:
        of = manifest(runtime)
        found: set[Shown] | None = _part(of.id, of.record)(place) if of.record else None
    except AgentbusError:
        return None
    return found


class _Activities:
    """Asks the client of a peer, by its adapter, whether it is busy or idle. Each adapter is loaded once. [STATUS-3]"""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ask: dict[str, Callable[[Process], str]] = {}

    def __call__(self, peer: Peer) -> str:
        # Where its pid means nothing, another process can have it.
        if not peer.domain or peer.domain != self._store.here:
            return ""
        if peer.runtime not in self._ask:
            self._ask[peer.runtime] = self._load(peer.runtime)
        return self._ask[peer.runtime](peer.host)

    @staticmethod
    def _load(runtime: str) -> Callable[[Process], str]:
        try:
            of = manifest(runtime)
            found: Callable[[Process], str] = _part(of.id, of.activity) if of.activity else lambda _host: ""
        except AgentbusError:  # a program, or an adapter that cannot be loaded, which is reported elsewhere
            return lambda _host: ""
        return found


def _read_manifest(path: Path) -> Manifest:
    import json  # takes 5 ms, and `agentbus send` does not need it

    from agentbus.core.adapter import Manifest

    try:
        return Manifest.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenSetup(
            f"{path} is not a valid module manifest ({error})", hint="reinstall agentbus, or remove that folder"
        ) from error


def manifests() -> tuple[list[Manifest], list[BrokenSetup]]:
    """The manifests of all adapters, sorted by id, and an error for each broken one. Imports no adapter. [MOD-1]"""
    from pathlib import Path  # takes 4 ms, and a send looks for no manifest

    found: list[Manifest] = []
    broken: list[BrokenSetup] = []
    for path in sorted(Path(_ADAPTERS).glob("*/module.json")):
        try:
            found.append(_read_manifest(path))
        except BrokenSetup as error:
            broken.append(error)
    return sorted(found, key=lambda manifest: manifest.id), broken


def manifest(module: str) -> Manifest:
    """The manifest of the adapter with that id.

    Raises InvalidRequest when there is none. Raises BrokenSetup instead when a manifest is broken: it can be that one.
    """
    found, broken = manifests()
    for one in found:
        if one.id == module:
            return one
    if broken:
        raise broken[0]
    known = " or ".join(one.id for one in found)
    raise InvalidRequest(f"there is no module {module[:40]!r}", hint=f"use {known}")


def variables() -> tuple[str, ...]:
    """All AGENTBUS_* variables: those of the core and those of the adapters. [CONF-1]"""
    found, _ = manifests()
    return tuple(sorted({*config.VARIABLES, *(name for one in found for name in one.variables)}))


def folders(settings: Settings) -> list[str]:
    """The names of the folders in the home: those of the locks, the triggers, the watchers and the adapters."""
    of_triggers = [trigger.folder for trigger in Triggers(settings).values()]
    of_adapters = [folder for one in manifests()[0] for folder in one.folders]
    return [name for name in dict.fromkeys([FOLDER, *of_triggers, config.WATCH_FOLDER, *of_adapters]) if name]


def leftovers(of: Manifest, folder: Path) -> list[str]:
    """The names in a folder of the adapter in the home that are its own."""
    try:
        return list(_part(of.id, of.leftovers)(folder)) if of.leftovers else []
    except BrokenSetup:
        return []  # nobody knows what is its own, and that it cannot be loaded is reported elsewhere


def registration(of: Manifest) -> Registration:
    """The adapter's registration with its client. Raises BrokenSetup when the adapter does not match its manifest."""
    made: Registration = _part(of.id, of.registration)(of)
    return made


def _part(module: str, dotted: str) -> Any:
    try:
        return _load(dotted)
    except (ImportError, AttributeError) as error:
        shadow = explain(error)
        if shadow:
            raise BrokenSetup(shadow) from error
        raise BrokenSetup(f"the module {module} cannot be loaded ({error})", hint="reinstall agentbus") from error


def link(function: str) -> Any:
    """A part of the link, as `module:name`. Raises BrokenSetup where what it needs is not installed. [LINK-9]"""
    try:
        return _load(f"agentbus.link.{function}")
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("nats", "nkeys"):
            raise
        raise BrokenSetup(
            f"{missing} is not installed, which a link to other machines needs",
            hint="pipx install --force 'agentbus-local[link]', or pip install 'agentbus-local[link]'",
        ) from error


def serve(module: str) -> None:
    """Be a peer for the runtime of the adapter `module` until that runtime ends; does not return.

    Raises InvalidRequest when there is no such adapter or a setting is not usable, and the errors that the adapter's
    entry raises before it serves.
    """
    of = manifest(module)
    settings = config.load(folder=config.other_program(of.folder_variable) if of.folder_variable else "")
    _part(of.id, of.entry)(of, settings, open_bus)
