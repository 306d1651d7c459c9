"""A registration that is one folder of ours among the extensions of a client, put in place and taken away whole.

For clients that load each folder of their folder for extensions, and document that. No file of a person is changed.
Knows no client: an adapter says where that folder is, and what ours holds. Implements [REG-7].
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from agentbus import __version__
from agentbus.adapters.mcp.registration import (
    Unreadable,
    check_command,
    check_version,
    command_of,
    launch_line,
    paste,
    read_object,
    servers,
)
from agentbus.core.adapter import Manifest, Registered, Standing, own_command
from agentbus.core.bus import HOOK, PULL
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer

__all__ = ["OURS", "ExtensionFolder", "describing"]

# How the description in the first of our files begins. A folder whose first file says something else is not ours.
OURS = "agentbus: "
# A client that runs on Node answers `--version` in 1 to 3 s.
_PATIENCE_S = 15.0


def describing(name: str, command: Sequence[str]) -> str:
    """A main file that registers the server `name`, in the form in which it is read here."""
    described = {
        "name": name,
        "version": __version__,
        "description": f"{OURS}messages between the sessions on this machine",
        "mcpServers": {name: {"command": command[0], "args": list(command[1:])}},
    }
    return json.dumps(described, indent=2) + "\n"


class ExtensionFolder:
    """See Registration. An adapter adds what is particular to its client.

    `where` is the client's folder for extensions; it raises BrokenSetup where that cannot be told. `make` makes our
    files, by their names in our folder, from the command that serves. The first one is `main`.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        where: Callable[[], Path],
        main: str,
        make: Callable[[Sequence[str]], Mapping[str, str]],
        tried: tuple[int, ...],
        update: str,
        own: Callable[[], list[str]] = own_command,
    ) -> None:
        self._manifest = manifest
        self._where = where
        self._main = main
        self._make = make
        self._tried = tried
        self._update = update
        self._own = own

    @property
    def mend(self) -> str:
        """The command that puts our folder in place."""
        return f"agentbus enable {self._manifest.id}"

    # -- its state -----------------------------------------------------------------------------------------

    def registered(self) -> Registered:
        """See Registration: whether our folder is there, and is the one that this agentbus writes. [REG-7]"""
        try:
            folder = self._folder()
            is_there = self._is_ours(folder)
        except BrokenSetup as error:
            return Registered(Standing.UNKNOWN, str(error.args[0]), error.hint or "")
        if not is_there:
            return Registered(Standing.DISABLED, f"there is no {folder}", self.mend)
        try:
            wanted = self._wanted()
        except BrokenSetup as error:
            return Registered(Standing.STALE, str(error))
        if self._differing(folder, wanted):
            return Registered(Standing.STALE, f"{folder} is not what agentbus {__version__} writes", self.mend)
        return Registered(Standing.ENABLED, f"{folder} registers it as {shlex.join(self._command(folder))}")

    def _folder(self) -> Path:
        return self._where() / self._manifest.server_name

    def _wanted(self) -> Mapping[str, str]:
        return self._make([*self._own(), *self._manifest.serve])

    def _is_ours(self, folder: Path) -> bool:
        """Whether our folder is there. Raises BrokenSetup when something else is in its place."""
        if not folder.exists() and not folder.is_symlink():
            return False
        try:
            said = read_object(folder / self._main).get("description")
        except Unreadable as error:
            raise BrokenSetup(str(error), hint=f"move {folder} away, and try again") from error
        if folder.is_symlink() or not isinstance(said, str) or not said.startswith(OURS):
            raise BrokenSetup(
                f"{folder} is not from agentbus, and was left as it is", hint="move it away, and try again"
            )
        return True

    @staticmethod
    def _differing(folder: Path, wanted: Mapping[str, str]) -> list[str]:
        """The names of our files that are not as they have to be."""

        def is_same(name: str, text: str) -> bool:
            try:
                return (folder / name).read_text(encoding="utf-8") == text
            except (OSError, ValueError):
                return False

        return [name for name, text in wanted.items() if not is_same(name, text)]

    def _command(self, folder: Path) -> list[str]:
        """The command that our folder registers; empty if it cannot be told."""
        try:
            entry = servers(read_object(folder / self._main)).get(self._manifest.server_name)
        except Unreadable:
            return []
        return command_of(entry or {})

    # -- changing it ---------------------------------------------------------------------------------------

    def enable(self) -> list[str]:
        """Put our folder in place. See Registration. [REG-7]"""
        folder, wanted = self._folder(), self._wanted()
        was_there = self._is_ours(folder)
        differing = self._differing(folder, wanted)
        if not differing:
            title = self._manifest.title
            return [f"{self._manifest.server_name} is already registered with {title}, nothing was changed"]
        try:
            # The main file comes last: without it there is no extension, and a half-written one is none.
            for name in sorted(differing, key=lambda name: name == self._main):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f".{path.name}.new")
                beside.write_text(wanted[name], encoding="utf-8")
                os.replace(beside, path)
        except OSError as error:
            raise BrokenSetup(
                f"{folder} cannot be written ({error.strerror})", hint="see who owns that folder"
            ) from error
        how = "replaced" if was_there else "wrote"
        return [f"{how} {folder}: every {self._manifest.title} that starts from now on has it"]

    def disable(self) -> list[str]:
        """Take our folder away. See Registration. [REG-7]"""
        folder = self._folder()
        if not self._is_ours(folder):
            return [f"{self._manifest.server_name} is not registered with {self._manifest.title}, nothing to do there"]
        # The names do not depend on the command, so also an installation that will not stay can clear up.
        names = self._make(["agentbus", *self._manifest.serve])
        try:
            for name in sorted(names, key=lambda name: name != self._main):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise BrokenSetup(f"{folder} cannot be removed ({error.strerror})", hint=f"rm -r '{folder}'") from error
        with suppress(OSError):  # what is not empty holds something that is not ours
            for one in sorted({(folder / name).parent for name in names} - {folder}):
                one.rmdir()
            folder.rmdir()
            folder.parent.rmdir()
        done = [f"removed {folder}; running sessions keep it until they end"]
        if folder.exists():
            done.append(f"{folder} stays: it holds what is not from agentbus")
        return done

    def by_hand(self) -> list[str]:
        """What to paste, a line each. Raises BrokenSetup as `own_command` does."""
        return paste(self._manifest.server_name, [*self._own(), *self._manifest.serve])

    def launch(self, name: str | None, *, flags: bool = True) -> str:
        """See Registration. Raises InvalidRequest for a bad name."""
        return launch_line([self._manifest.client, *(self._manifest.launch_flags if flags else ())], name)

    # -- what doctor reports -------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """See Registration. [DOCTOR-4]"""
        stands = self.registered()
        if shutil.which(self._manifest.client) is None:
            seen = f"{self._manifest.client} is not on PATH"
            found = [Finding("client", Level.NOTE, seen, f"install {self._manifest.title}, if you want to use it")]
            if stands.standing is Standing.DISABLED:
                return found
        else:
            found = [check_version(self._manifest.client, _PATIENCE_S, self._tried, self._update)]
        is_enabled = stands.standing is Standing.ENABLED
        level = Level.OK if is_enabled else Level.WRONG
        found.append(Finding("registration", level, f"{self._manifest.id}: {stands.seen}", stands.remedy))
        if is_enabled:
            command = self._command(self._folder())
            found.append(check_command(self._manifest.title, command, len(self._manifest.serve), self.mend))
            found += self.traps()
        return found

    def traps(self) -> list[Finding]:
        """What an adapter adds about the client's settings."""
        return []

    def delivery(self, peer: Peer) -> Finding:
        """See Registration."""
        seen = f'"{peer.name}" receives by {peer.receives}'
        if peer.delivery == PULL:
            return Finding("delivery", Level.NOTE, f"{seen}; its model has to call check_messages")
        return Finding("delivery", Level.NOTE if peer.delivery == HOOK else Level.OK, seen)

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:  # noqa: ARG002 - the port's
        """None: what the client refuses, it says."""
        return None
