"""The adapter's registration with OpenCode: one plugin file of ours, put in place and taken away whole.

OpenCode loads every file in its plugin folder; the file registers the server. So no file of a person is changed. Knows
OpenCode's folders as documented, and its command line as recorded with 1.18.33, but not the bus. Implements [REG-1],
[REG-6], [DOCTOR-4].
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentbus import __version__
from agentbus.adapters.mcp.registration import check_command, check_version, command_of, launch_line, paste
from agentbus.core.adapter import Manifest, Registered, Registration, Standing, own_command
from agentbus.core.bus import PULL
from agentbus.core.config import expanded, other_program
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer

__all__ = ["OpenCodeRegistration", "registration"]

_SOURCE = Path(__file__).with_name("plugin.js")
# The first words of our file. What does not begin so is not ours, and is left alone.
_OURS = "// agentbus "
_COMMAND = re.compile(r"^const COMMAND = (\[.*\]) //", re.MULTILINE)
# `opencode --version` takes 0.5 s.
_PATIENCE_S = 15.0
# The version with which all of this was tried; the hook that proves a reading has been there for longer.
_TRIED_VERSION = (1, 18)
# A comment or a comma too much in a JSONC file; a string is matched first, so that nothing in it counts.
_JSONC = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/|,(?=\s*[}\]])', re.DOTALL)


def registration(manifest: Manifest) -> Registration:
    """The registration of the adapter that `manifest` describes."""
    return OpenCodeRegistration(manifest)


class OpenCodeRegistration:
    """See Registration. `own` is the command that is registered."""

    def __init__(self, manifest: Manifest, *, own: Callable[[], list[str]] = own_command) -> None:
        self._manifest = manifest
        self._own = own

    @property
    def _folder(self) -> Path:
        """The folder of OpenCode's settings. Raises BrokenSetup as `expanded` does."""
        return Path(expanded(other_program("XDG_CONFIG_HOME") or "~/.config", "XDG_CONFIG_HOME"), "opencode")

    @property
    def _file(self) -> Path:
        return self._folder / "plugin" / f"{self._manifest.server_name}.js"

    # -- its state -----------------------------------------------------------------------------------------

    def registered(self) -> Registered:
        """See Registration: whether our file is there, and is the one that this agentbus writes. [REG-6]"""
        try:
            text = self._text()
        except OSError as error:
            return Registered(Standing.UNKNOWN, f"{self._file} cannot be read ({error.strerror})")
        except BrokenSetup as error:
            return Registered(Standing.UNKNOWN, str(error))
        if text is None:
            return Registered(Standing.DISABLED, f"there is no {self._file}", self._mend)
        if not text.startswith(_OURS):
            return Registered(Standing.UNKNOWN, f"{self._file} is not from agentbus", f"look at it: {self._file}")
        try:
            wanted = self._wanted()
        except BrokenSetup as error:
            return Registered(Standing.STALE, str(error))
        command = shlex.join(_command(text))
        if text == wanted:
            return Registered(Standing.ENABLED, f"{self._file} registers it as {command}")
        return Registered(Standing.STALE, f"{self._file} is not what agentbus {__version__} writes", self._mend)

    @property
    def _mend(self) -> str:
        return f"agentbus enable {self._manifest.id}"

    def _text(self) -> str | None:
        """Our file; None if it is not there. Raises OSError."""
        try:
            return self._file.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _wanted(self) -> str:
        """What our file has to be. Raises BrokenSetup as `own_command` does."""
        command = json.dumps([*self._own(), *self._manifest.serve])
        source = _SOURCE.read_text(encoding="utf-8").replace("@VERSION@", __version__, 1)
        return source.replace("const COMMAND = []", f"const COMMAND = {command}", 1)

    # -- changing it ---------------------------------------------------------------------------------------

    def enable(self) -> list[str]:
        """Put our file in place. See Registration. [REG-6]"""
        wanted, text = self._wanted(), self._ours()
        if text == wanted:
            return [f"{self._manifest.server_name} is already registered with OpenCode, nothing was changed"]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._file.with_suffix(".new")  # not a name that OpenCode loads
            beside.write_text(wanted, encoding="utf-8")
            os.replace(beside, self._file)
        except OSError as error:
            raise BrokenSetup(
                f"{self._file} cannot be written ({error.strerror})", hint="see who owns that folder"
            ) from error
        how = "wrote" if text is None else "replaced"
        return [f"{how} {self._file}: every OpenCode that starts from now on has it"]

    def disable(self) -> list[str]:
        """Take our file away. See Registration. [REG-6]"""
        if self._ours() is None:
            return [f"{self._manifest.server_name} is not registered with OpenCode, nothing to do there"]
        try:
            self._file.unlink()
        except OSError as error:
            raise BrokenSetup(
                f"{self._file} cannot be removed ({error.strerror})", hint=f"rm '{self._file}'"
            ) from error
        with suppress(OSError):  # it holds other plugins
            self._file.parent.rmdir()
        return [f"removed {self._file}; running sessions keep it until they end"]

    def _ours(self) -> str | None:
        """Our file; None if there is none. Raises BrokenSetup when something else is there."""
        try:
            text = self._text()
        except OSError as error:
            raise BrokenSetup(
                f"{self._file} cannot be read ({error.strerror})", hint="move it away, and try again"
            ) from error
        if text is not None and not text.startswith(_OURS):
            raise BrokenSetup(
                f"{self._file} is not from agentbus, and was left as it is", hint="move it away, and try again"
            )
        return text

    def by_hand(self) -> list[str]:
        """What to type. A server without the plugin can only pull."""
        command = [*self._own(), *self._manifest.serve]
        typed = shlex.join(["opencode", "mcp", "add", self._manifest.server_name, "--", *command])
        return [
            "Without the plugin, messages are not pushed. To register the tools with OpenCode yourself, run:",
            f"  {typed}",
            *paste(self._manifest.server_name, command),
        ]

    def launch(self, name: str | None, *, flags: bool = True) -> str:
        """See Registration. Raises InvalidRequest for a bad name."""
        return launch_line([self._manifest.client, *(self._manifest.launch_flags if flags else ())], name)

    def unattended(self) -> str:
        """Empty: OpenCode does not ask before it calls a tool of a server."""
        return ""

    # -- what doctor reports -------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """See Registration. [DOCTOR-4], [DOCTOR-7]"""
        stands = self.registered()
        is_there = shutil.which(self._manifest.client) is not None
        if not is_there and stands.standing is Standing.DISABLED:
            return [self._absent()]
        if is_there:
            found = [check_version(self._manifest.client, _PATIENCE_S, _TRIED_VERSION, "opencode upgrade")]
        else:
            found = [self._absent()]
        is_enabled = stands.standing is Standing.ENABLED
        level = Level.OK if is_enabled else Level.WRONG
        found.append(Finding("registration", level, f"{self._manifest.id}: {stands.seen}", stands.remedy))
        entry = self._entry()
        if entry is not None:
            seen = f"{self._folder} has an entry {self._manifest.server_name} of its own ({shlex.join(entry)})"
            remedy = "remove it there: it stands above the plugin's, and nothing is pushed to such a session"
            found.append(Finding("registration", Level.NOTE, seen, remedy))
        if is_enabled:
            command = _command(self._text() or "")
            found.append(check_command("OpenCode", command, len(self._manifest.serve), self._mend))
            found += self._traps()
        return found

    def _absent(self) -> Finding:
        return Finding("client", Level.NOTE, "opencode is not on PATH", "install OpenCode, if you want to use it")

    def _traps(self) -> list[Finding]:
        """What keeps a plugin from being loaded, or makes a start slow. [DOCTOR-7]"""
        found = []
        if not (self._folder / "node_modules" / "@opencode-ai" / "plugin").exists():
            seen = (
                f"{self._folder} has no node_modules/@opencode-ai/plugin: with any plugin, OpenCode waits at its start "
                "until it has installed that, some seconds once, but a minute at every start where no registry answers"
            )
            remedy = f"start opencode once with a network, or: npm install --prefix {self._folder} @opencode-ai/plugin"
            found.append(Finding("plugin", Level.NOTE, seen, remedy))
        if other_program("OPENCODE_PURE"):
            seen = "OPENCODE_PURE is set: OpenCode loads no plugin, so it has neither the tools nor the messages"
            found.append(Finding("plugin", Level.WRONG, seen, "unset OPENCODE_PURE, and start without --pure"))
        return found

    def _entry(self) -> list[str] | None:
        """The command of an entry of our name that the user has made; None if there is none, or none can be read."""
        for name in ("opencode.json", "opencode.jsonc", "config.json"):
            try:
                text = (self._folder / name).read_text(encoding="utf-8")
                servers: Any = json.loads(_JSONC.sub(lambda match: match[1] or "", text)).get("mcp") or {}
                entry = servers.get(self._manifest.server_name)
            except (OSError, ValueError, AttributeError):
                continue  # OpenCode says at its start what is wrong with that file
            if isinstance(entry, dict):
                command = entry.get("command")
                return [str(word) for word in command] if isinstance(command, list) else command_of(entry)
        return None

    def delivery(self, peer: Peer) -> Finding:
        """See Registration."""
        seen = f'"{peer.name}" receives by {peer.receives}'
        if peer.delivery != PULL:
            return Finding("delivery", Level.OK, seen)
        seen += "; its model has to call check_messages"
        if "AGENTBUS_DELIVERY" in peer.delivery_reason or "undo" in peer.delivery_reason:
            return Finding("delivery", Level.NOTE, seen)
        return Finding("delivery", Level.WRONG, seen, f"{self._mend}, then end that session and start it again")

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:  # noqa: ARG002 - the port's
        """None: what the plugin cannot do, it says."""
        return None


def _command(text: str) -> list[str]:
    """The command that our file registers; empty if it cannot be told."""
    found = _COMMAND.search(text)
    try:
        words: Any = json.loads(found[1]) if found is not None else []
    except ValueError:
        return []
    return [str(word) for word in words]
