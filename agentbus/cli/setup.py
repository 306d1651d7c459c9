"""The commands that set up agentbus and remove it: install, list, enable, disable, launch, uninstall.

This module knows no adapter by name: the manifests say what to register, and how. Implements [MOD-1] to [MOD-3],
[UNINST-1], [UNINST-2].
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.text import Text

from agentbus import registry
from agentbus.cli import output
from agentbus.cli.common import bus_and_settings
from agentbus.core import config, files
from agentbus.core.adapter import Manifest, Reachable, Registration, Standing
from agentbus.core.errors import AgentbusError, BrokenSetup, Refused
from agentbus.core.model import Peer
from agentbus.core.names import LINK_NAME
from agentbus.core.presence import Presence
from agentbus.core.stdout import OutputFailed, reported
from agentbus.core.text import escaped, one_line

__all__ = ["disable", "enable", "install", "launch", "show", "uninstall"]

# A leftover of a database that was put there before it used a WAL.
_JOURNAL = "bus.db-journal"
# So many files that are not ours are named.
_MOST_LEFT = 20
_STYLES = {Standing.ENABLED: "green", Standing.DISABLED: "dim", Standing.STALE: "red", Standing.SHADOWED: "red"}


def _load() -> tuple[list[tuple[Manifest, Registration]], list[tuple[str, BrokenSetup]]]:
    """The adapters that can be loaded, and what is wrong with the others; `?` if their id cannot be read. [MOD-1]"""
    manifests, broken = registry.manifests()
    loaded: list[tuple[Manifest, Registration]] = []
    failures = [("?", error) for error in broken]
    for manifest in manifests:
        try:
            loaded.append((manifest, registry.registration(manifest)))
        except BrokenSetup as error:
            failures.append((manifest.id, error))
    return loaded, failures


def _modules() -> list[tuple[Manifest, Registration]]:
    """Every adapter that can be loaded. Prints what is wrong with the others to stderr."""
    loaded, failures = _load()
    for _, error in failures:
        output.say(str(error))
    return loaded


def install() -> None:
    """Register every adapter whose client is on PATH, and print what to run next.

    Raises BrokenSetup, after printing what to do by hand.
    """
    modules = [one for one in _modules() if one[0].client]
    if not modules:
        raise BrokenSetup("no module can be loaded", hint="reinstall agentbus")
    # The adapters whose client is here. If there are none, the first adapter says what to do by hand, and fails.
    there = [one for one in modules if shutil.which(one[0].client)]
    running = _reachable() if there else []
    for manifest, registration in there or modules:
        _enable(registration)
        with reported():
            _show_next(manifest, registration, running)


def _show_next(manifest: Manifest, registration: Registration, running: list[Reachable]) -> None:
    for one in running:
        if one.runtime == manifest.id:
            _show_running(one)
    print()
    print(f"Start each session of {manifest.title} with its own name, in its own terminal:")
    for name in ("frontend", "backend"):
        # Without flags this works for every session; a channel works only for accounts that have channels.
        print(f"  {registration.launch(name, flags=False)}")
    print('Say to frontend "ask backend which port it listens on", or type: agentbus send backend "hello"')
    print("If a message does not arrive: agentbus doctor backend")
    if registration.unattended():
        print(registration.unattended()[:1].upper() + registration.unattended()[1:] + ".")


def _reachable() -> list[Reachable]:
    """The running sessions that have not joined; those that run, where there is no bus. Makes no home. [MOD-3]"""
    try:
        settings = config.load()
        if not (settings.home / config.HOME_FILES[0]).exists():
            return registry.running(settings)
        with bus_and_settings() as (bus, _settings):
            return bus.reachable()
    except AgentbusError as error:
        # The registration is done, and which sessions run is only said.
        output.say(f"agentbus cannot tell which sessions run ({error})")
        return []


def _show_running(one: Reachable) -> None:
    """What a session that runs already can do without a restart. [REACH-4]"""
    held = one.held()
    can = f"is not posted to ({one_line(held)})" if held else "receives without a restart"
    print(f'The running session "{one.name}" in {one_line(one.cwd)} {can}; to have the tools it has to be restarted.')


def enable(module: str) -> None:
    """Register one adapter. Raises InvalidRequest when no adapter has that id, and BrokenSetup as `install` does."""
    _enable(registry.registration(registry.manifest(module)))


def _enable(registration: Registration) -> None:
    try:
        said = registration.enable()
    except BrokenSetup:
        # For an installation that will not stay, there is no command to type by hand either.
        with suppress(BrokenSetup, OutputFailed):
            print("\n".join(registration.by_hand()), flush=True)
        raise
    with reported():
        print("\n".join(said))


def disable(module: str) -> None:
    """End the registration of one adapter. Raises as `enable` does."""
    said = registry.registration(registry.manifest(module)).disable()
    with reported():
        print("\n".join(said))


def launch(module: str, name: str | None) -> None:
    """Print the command that starts a session, and nothing else on stdout. Raises as `enable`, also for a bad name."""
    manifest = registry.manifest(module)
    registration = registry.registration(manifest)
    print(registration.launch(name), flush=True)
    stands = registration.registered()
    if stands.standing is not Standing.ENABLED:
        remedy = f" ({stands.remedy})" if stands.remedy else ""
        output.say(f"{module} is {stands.standing.value}: {stands.seen}{remedy}")
    if manifest.client and shutil.which(manifest.client) is None:
        output.say(f"{manifest.client} is not on PATH")
    if registration.unattended():
        output.say(registration.unattended())


def show(*, as_json: bool) -> int:
    """Show the adapters and the standing of each. Return 1 when one of them is broken."""
    loaded, failures = _load()
    out = output.console()
    for manifest, registration in loaded:
        stands = registration.registered()
        if as_json:
            row = {"id": manifest.id, "title": manifest.title, "standing": stands.standing.value}
            output.json_line({**row, "seen": stands.seen, "remedy": stands.remedy or None})
            continue
        text = Text(f"{manifest.id}  {manifest.title}: ")
        text.append(stands.standing.value, _STYLES.get(stands.standing, "yellow"))
        out.print(text)
        out.print(f"  {manifest.summary}")
        out.print(f"  {escaped(stands.seen)}")
        if stands.remedy:
            out.print(f"  fix it: {escaped(stands.remedy)}")
    for module, failure in failures:
        if as_json:
            output.json_line({"id": module, "title": None, "standing": "broken", "seen": str(failure), "remedy": None})
        else:
            out.print(Text(f"{module}: ").append("broken", "red").append(f"\n  {escaped(str(failure))}"))
    return 1 if failures else 0


# -- uninstall ---------------------------------------------------------------------------------------------


def uninstall(*, keep_mail: bool, force: bool) -> None:
    """Remove the registrations, then our files in the home, and print what was removed. [UNINST-1], [UNINST-2]

    Raises Refused while sessions are online, unless `force`; then nothing is changed. Raises BrokenSetup when a
    registration cannot be removed; then the mail is still there.
    """
    settings = config.load()
    home = settings.home
    config.check_private(home, is_folder=True)
    live, waiting = _standing(home)
    if live and not force:
        names = ", ".join("the link" if peer.name == LINK_NAME else peer.name for peer in live)
        raise Refused(
            f"{len(live)} {'session is' if len(live) == 1 else 'sessions are'} online ({names}), nothing was removed",
            hint="end them first, or use --force",
        )
    for manifest, registration in _modules():
        if not manifest.client:
            continue  # it is not known where such an adapter is registered
        if shutil.which(manifest.client) is None and registration.registered().standing is Standing.DISABLED:
            continue
        said = registration.disable()
        with reported():
            print("\n".join(said))
    removed = list(_remove(settings, keep_mail=keep_mail))
    with reported():
        _show_removed(settings, removed, live, waiting, keep_mail=keep_mail)


def _show_removed(
    settings: config.Settings, removed: list[Path], live: list[Peer], waiting: int, *, keep_mail: bool
) -> None:
    home = settings.home
    for path in removed:
        lost = f" ({waiting:,} {'message' if waiting == 1 else 'messages'} waited in it)" if waiting else ""
        print(f"removed {path}{lost if path.name == config.HOME_FILES[0] else ''}")
    if not removed:
        print(f"nothing to remove in {home}")
    if keep_mail and (home / "bus.db").exists():
        print(f"kept {home / 'bus.db'}: mailboxes and history")
    left = list(_left(settings)) if home.exists() else []
    if left:
        more = f" and {len(left) - _MOST_LEFT:,} more" if len(left) > _MOST_LEFT else ""
        shown = ", ".join(map(one_line, left[:_MOST_LEFT]))
        print(f"kept {home}: it holds files that are not from agentbus ({shown}{more})")
    if live:
        print("sessions are still running: until you end them, they create a new, empty bus when they need one")
    print("to remove the program itself: pipx uninstall agentbus-local, or uv tool uninstall agentbus-local")


def _standing(home: Path) -> tuple[list[Peer], int]:
    """The peers that are online, and the number of pending messages."""
    if not (home / "bus.db").exists():
        return [], 0
    try:
        with bus_and_settings() as (bus, _settings):
            link = bus.store.link()
            return [*bus.peers(), *([link] if link else [])], sum(bus.store.queries.waiting().values())
    except AgentbusError as error:
        # The database is broken, newer, or belongs to another program, so the online peers are not known. Go on: this
        # database can be the very thing that the user wants to remove.
        output.say(f"agentbus cannot tell which sessions are online ({error})")
        return [], 0


def _folders(settings: config.Settings) -> Iterator[tuple[Path, Callable[[], Iterable[str]]]]:
    """Each folder in the home that is ours, with the function that lists our files in it."""
    presence = Presence(settings.home)
    yield presence.folder, presence.leftovers
    triggers = registry.Triggers(settings)
    for trigger in (*triggers.values(), triggers.watchers.trigger()):
        if trigger.folder is not None:
            yield settings.home / trigger.folder, trigger.leftovers
    for manifest in registry.manifests()[0]:
        for folder in (settings.home / name for name in manifest.folders):
            yield folder, partial(registry.leftovers, manifest, folder)


def _remove(settings: config.Settings, *, keep_mail: bool) -> Iterator[Path]:
    """Delete our files in the home, and the home itself if nothing is left in it. Yield each path that was deleted."""
    home = settings.home
    if not keep_mail:
        database = home / config.HOME_FILES[0]
        for path in (*(home / name for name in (*config.HOME_FILES, _JOURNAL)), *files.leftovers(database)):
            yield from _unlink(path)
    for name in config.LINK_FILES:
        yield from _unlink(home / name)
    for folder, names in _folders(settings):
        # Do not follow a symlink: the files behind it are not ours.
        if folder.is_symlink() or not folder.is_dir():
            continue
        for name in sorted(names()):
            yield from _unlink(folder / name)
        with suppress(OSError):  # the folder holds something else, and stays
            folder.rmdir()
            yield folder
    with suppress(OSError):
        home.rmdir()
        yield home


def _left(settings: config.Settings) -> Iterator[str]:
    """What is in the home and in our folders of it beside the database, as paths from the home."""
    ours = registry.folders(settings)
    for entry in sorted(settings.home.iterdir()):
        if entry.name in config.HOME_FILES:
            continue
        names: list[str] = []
        if entry.name in ours and entry.is_dir() and not entry.is_symlink():
            with suppress(OSError):  # it cannot be read: then it is named itself
                names = sorted(os.listdir(entry))
        yield from (f"{entry.name}/{name}" for name in names) if names else (entry.name,)


def _unlink(path: Path) -> Iterator[Path]:
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
            path.unlink()
            yield path
    except FileNotFoundError:
        return
    except OSError as error:
        raise BrokenSetup(
            f"{path} cannot be removed ({error.strerror})", hint=config.unwritable(path, error)
        ) from error
