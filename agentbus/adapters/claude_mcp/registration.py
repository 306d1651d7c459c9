"""The adapter's registration with Claude Code: read from Claude's own files, changed only through `claude mcp`.

Beside it stands a folder of ours, with the code that Claude Code loads from there: the server works without. Knows the
command line and the files of Claude Code, as recorded with 2.1.331, but not the bus. Implements [REG-1] to [REG-5],
[MOD-11].
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentbus.adapters.claude_mcp import plugin, twins
from agentbus.adapters.claude_mcp.records import config_folder, state_file
from agentbus.adapters.mcp.extension_folder import ExtensionFolder
from agentbus.adapters.mcp.registration import (
    Unreadable,
    check_command,
    command_of,
    is_same,
    launch_line,
    paste,
    read_object,
    run_mcp,
    servers,
    strings,
    version_of,
)
from agentbus.core.adapter import Manifest, Registered, Registration, Standing, own_command
from agentbus.core.bus import PULL
from agentbus.core.config import working_folder
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer

__all__ = ["ClaudeRegistration", "registration"]

# `claude mcp` takes 0.3 to 0.6 s. If it has not answered after this time, it never will.
_PATIENCE_S = 15.0
# The first Claude Code that has channels.
_LEAST_VERSION = (2, 1, 80)


def registration(manifest: Manifest) -> Registration:
    """The registration of the adapter that `manifest` describes."""
    return ClaudeRegistration(manifest)


class ClaudeRegistration:
    """See Registration.

    Entries for the folder `cwd` take precedence over the user's. `patience_s` is the time limit for one `claude`.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        cwd: Path | None = None,
        own: Callable[[], list[str]] = own_command,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._manifest = manifest
        # Without a folder (it was removed, say) there is none whose entries could take precedence.
        self._cwd = cwd or (Path(working_folder()) if working_folder() else None)
        self._own = own
        self._patience_s = patience_s
        self._name = manifest.server_name
        self._module = ExtensionFolder(
            manifest,
            where=lambda: plugin.folder().parent,
            main=plugin.MAIN,
            make=plugin.files,
            tried=_LEAST_VERSION,
            update="claude update",
            own=own,
        )

    # -- its state -----------------------------------------------------------------------------------------

    def registered(self) -> Registered:
        """The state of the registration, according to Claude's own files. Never raises. [REG-3]"""
        try:
            state = self._state()
            entry = servers(state).get(self._name)
            shadow = self._shadow(state)
        except Unreadable as error:
            return Registered(Standing.UNKNOWN, str(error), "start claude once: it says what is wrong with that file")
        except BrokenSetup as error:  # no home folder, so it cannot be told where that file is
            return Registered(Standing.UNKNOWN, str(error.args[0]), error.hint or "")
        if shadow is not None:
            return shadow
        if entry is None and self._has_module:
            return Registered(Standing.STALE, f"only {plugin.folder()} is there, without the server", self._mend)
        if entry is None:
            return Registered(Standing.DISABLED, f"not registered in {state_file()}", self._mend)
        command = command_of(entry)
        try:
            is_own = is_same(command, self._wanted())
        except BrokenSetup as error:
            return Registered(Standing.STALE, str(error))
        if is_own:
            return Registered(Standing.ENABLED, f"registered for all projects as {shlex.join(command)}")
        if shutil.which(command[0] if command else "") is None:
            seen = f"registered as {shlex.join(command)}, which does not exist or cannot be run"
        else:
            seen = f"registered as {shlex.join(command)}, but this agentbus is {shlex.join(self._wanted())}"
        return Registered(Standing.STALE, seen, self._mend)

    @property
    def _has_module(self) -> bool:
        """Whether the folder with our module is there, as this agentbus writes it or not."""
        return self._module.registered().standing in (Standing.ENABLED, Standing.STALE)

    @property
    def _mend(self) -> str:
        return f"agentbus enable {self._manifest.id}"

    def _wanted(self) -> list[str]:
        return [*self._own(), *self._manifest.serve]

    def _state(self) -> dict[str, Any]:
        return read_object(state_file())

    def _projects(self, state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What Claude keeps for our folder: under its path, or under that of the root of its git repository."""
        projects = state.get("projects")
        if not isinstance(projects, dict):
            return
        roots = () if self._cwd is None else (self._cwd, *_git_roots(self._cwd))
        for folder in dict.fromkeys(roots):
            project = projects.get(str(folder))
            if isinstance(project, dict):
                yield str(folder), project

    def _shadow(self, state: dict[str, Any]) -> Registered | None:
        """The entry that takes precedence over the user's in this folder, unless it runs this same agentbus."""
        approved: set[str] = set()
        for folder, project in self._projects(state):
            if self._name in strings(project.get("disabledMcpServers")):
                return Registered(
                    Standing.SHADOWED,
                    f"switched off in {folder}",
                    f"in a session there: /mcp, then enable {self._name}",
                )
            entry = servers(project).get(self._name)
            if entry is not None and not self._is_own(entry):
                seen = f"an entry for the folder {folder} overrides it: {shlex.join(command_of(entry))}"
                remedy = f"cd {shlex.quote(folder)} && claude mcp remove {self._name} -s local"
                return Registered(Standing.SHADOWED, seen, remedy)
            approved |= strings(project.get("enabledMcpjsonServers"))
        for folder_path in () if self._cwd is None else (self._cwd, *self._cwd.parents):
            entry = servers(read_object(folder_path / ".mcp.json")).get(self._name)
            if entry is not None and self._name in approved and not self._is_own(entry):
                seen = f"{folder_path / '.mcp.json'} overrides it: {shlex.join(command_of(entry))}"
                remedy = f"cd {shlex.quote(str(folder_path))} && claude mcp remove {self._name} -s project"
                return Registered(Standing.SHADOWED, seen, remedy)
        return None

    def _is_own(self, entry: dict[str, Any]) -> bool:
        """Whether an entry runs this agentbus, be it by the script beside the interpreter."""
        try:
            wanted = self._wanted()
        except BrokenSetup:
            return False
        script = [os.path.join(os.path.dirname(wanted[0]), "agentbus"), *self._manifest.serve]
        return is_same(command_of(entry), wanted) or is_same(command_of(entry), script)

    # -- changing it ---------------------------------------------------------------------------------------

    def enable(self) -> list[str]:
        """Register the adapter for all projects of the user. See Registration. [REG-1], [REG-2]"""
        wanted = self._wanted()
        entry, old = self._entry(wanted), self._user_entry()
        is_same_command = old is not None and is_same(command_of(old), wanted)
        if old is not None and is_same_command and not _loads_all(old):
            added = self._put_module()
            kept = f"{self._name} is already registered with Claude Code{'' if added else ', nothing was changed'}"
            return [kept, *added, *self._shadow_notes(), *self._twin_notes()]
        if old is not None:
            entry["env"] = old.get("env", {})  # keep what the user has set there
            self._mcp("remove", "-s", "user", self._name)
        try:
            self._add(entry)
        except BrokenSetup:
            if old is not None:
                self._add(old)
            raise
        mended = "" if old is None else f", in place of {shlex.join(command_of(old))}"
        if is_same_command:
            mended = ", without alwaysLoad: sessions that start now load only the tools that an answer needs"
        return [
            f"registered {self._name} with Claude Code for all projects{mended}",
            *self._put_module(),
            *self._shadow_notes(),
            *self._twin_notes(),
        ]

    def _put_module(self) -> list[str]:
        """Put our module in place. What keeps it from that is said: without it, messages go into the inbox. [MOD-11]"""
        if self._module.registered().standing is Standing.ENABLED:
            return []
        try:
            return self._module.enable()
        except BrokenSetup as error:
            return [f"but without its module, so that messages go into the inbox of a session: {error}"]

    def _add(self, entry: dict[str, Any]) -> None:
        self._mcp("add-json", "-s", "user", self._name, json.dumps(entry))
        if self._user_entry() is None:
            raise BrokenSetup(
                f"claude mcp add-json reported success, but {state_file()} has no entry {self._name}",
                hint="look at it with claude mcp list",
            )

    def disable(self) -> list[str]:
        """End the registration. See Registration. [REG-2], [MOD-11]"""
        done = self._module.disable() if self._has_module else []
        if self._user_entry() is None:
            return done or [f"{self._name} is not registered with Claude Code, nothing to do there"]
        self._mcp("remove", "-s", "user", self._name)
        return [f"removed {self._name} from Claude Code; running sessions keep it until they end", *done]

    def by_hand(self) -> list[str]:
        """The command to type if `claude` is there, and the text to paste for another MCP client. [REG-4]"""
        entry = self._entry(self._wanted())
        typed = shlex.join(["claude", "mcp", "add-json", "-s", "user", self._name, json.dumps(entry)])
        return ["To register it with Claude Code yourself, run:", f"  {typed}", *paste(self._name, self._wanted())]

    def launch(self, name: str | None, *, flags: bool = True) -> str:
        """See Registration. Raises InvalidRequest for a bad name."""
        return launch_line([self._manifest.client, *(self._manifest.launch_flags if flags else ())], name)

    @staticmethod
    def _entry(command: Sequence[str]) -> dict[str, Any]:
        # No alwaysLoad: each tool says itself whether it is loaded at once. [TOOL-6]
        return {"type": "stdio", "command": command[0], "args": list(command[1:]), "env": {}}

    def _user_entry(self) -> dict[str, Any] | None:
        try:
            return servers(self._state()).get(self._name)
        except Unreadable as error:
            raise BrokenSetup(str(error), hint="start claude once: it says what is wrong with that file") from error

    def _shadow_notes(self) -> list[str]:
        found = self.registered()
        return [f"but {found.seen}; {found.remedy}"] if found.standing is Standing.SHADOWED else []

    def _twin_notes(self) -> list[str]:
        """Says that agentbus is registered more than once; empty if it is not. [TWIN-2]"""
        found = twins.started_by(self._cwd)
        # Entries of one name override each other. A plugin comes beside them.
        if len(found) < 2 or not any(one.is_plugin for one in found):
            return []
        both = "; ".join(f"{one.by}: {one.remove}" for one in found)
        return [f"but a session starts it {len(found)} times, and only one is a peer; remove one of ({both})"]

    def _mcp(self, *arguments: str) -> None:
        run_mcp("claude", arguments, self._patience_s)

    def unattended(self) -> str:
        """See Registration. [MOD-4]"""
        return (
            "unattended, a session waits in the permission dialog of its own reply: allow its tools with "
            f'--allowedTools {self._rule}, or "{self._rule}" under permissions.allow in settings.json. '
            "It may then send to every name without being asked, and no more than that"
        )

    @property
    def _rule(self) -> str:
        return f"mcp__{self._name}"  # all tools of that server

    # -- what doctor reports -------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """See Registration. [DOCTOR-4]"""
        stands = self.registered()
        version = ""
        if shutil.which("claude") is None:
            found = [
                Finding("client", Level.NOTE, "claude is not on PATH", "install Claude Code, if you want to use it")
            ]
            is_wrong = stands.standing not in (Standing.ENABLED, Standing.DISABLED)
        else:
            told = version_of("claude", self._patience_s)
            found = [told if isinstance(told, Finding) else _judged(*told)]
            version = "" if isinstance(told, Finding) else told[1]
            is_wrong = stands.standing is not Standing.ENABLED
        level = Level.WRONG if is_wrong else Level.OK if stands.standing is Standing.ENABLED else Level.NOTE
        found.append(Finding("registration", level, f"{self._manifest.id}: {stands.seen}", stands.remedy))
        found += [Finding("registration", Level.NOTE, note.removeprefix("but "), "") for note in self._twin_notes()]
        if stands.standing is Standing.ENABLED:
            found.append(self._permission())
            entry = servers(self._state()).get(self._name) or {}
            if _loads_all(entry):
                seen = "the entry has alwaysLoad: all tools are in each request of a model, in the place of two"
                found.append(Finding("registration", Level.NOTE, seen, self._mend))
            command = command_of(entry)
            found.append(check_command("Claude Code", command, len(self._manifest.serve), self._mend))
            found.append(self._plugin(version))
        return found

    def _plugin(self, version: str) -> Finding:
        """Whether sessions have our module, as far as files and the version of Claude Code say. [MOD-11]"""
        stands = self._module.registered()
        if stands.standing is not Standing.ENABLED:
            seen = f"{stands.seen}: messages go into the inbox of a session"
            return Finding("plugin", Level.NOTE, seen, stands.remedy or self._mend)
        why = plugin.why_not((), version, str(self._cwd or ""))
        if why:
            return Finding("plugin", Level.NOTE, f"{why}: messages go into the inbox of a session")
        return Finding("plugin", Level.OK, f"{plugin.folder()} holds the module that brings messages into a session")

    def _permission(self) -> Finding:
        """Whether the user's settings allow our tools; what a project or a flag allows cannot be seen. [MOD-4]"""
        settings = config_folder() / "settings.json"
        try:
            permissions = read_object(settings).get("permissions")
        except Unreadable:
            permissions = None
        allowed = strings(permissions.get("allow")) if isinstance(permissions, dict) else set()
        if allowed & {self._rule, f"{self._rule}__*"}:
            return Finding("permission", Level.OK, f"{settings} allows {self._rule}: a session can answer unattended")
        remedy = (
            f'for unattended sessions: --allowedTools {self._rule}, or "{self._rule}" under permissions.allow there'
        )
        seen = f"{settings} does not allow {self._rule}: unattended, a session waits in the dialog of its own reply"
        return Finding("permission", Level.NOTE, seen, remedy)

    def delivery(self, peer: Peer) -> Finding:
        """See Registration. A session with neither the channel nor an inbox is not what the user wants. [VOID-1]"""
        seen = f'"{peer.name}" receives by {peer.receives}'
        if peer.delivery != PULL:
            is_sure = not peer.delivery.endswith("?")
            return Finding(
                "delivery", Level.OK if is_sure else Level.NOTE, seen, "" if is_sure else "it can call check_messages"
            )
        if "AGENTBUS_DELIVERY" in peer.delivery_reason:
            seen += "; it reads when it calls check_messages"
            return Finding(
                "delivery", Level.NOTE, seen, "if you did not choose that: start it without AGENTBUS_DELIVERY"
            )
        if "AGENTBUS_BYPASS" in peer.delivery_reason:
            seen += "; it reads when it calls check_messages"
            remedy = "leave that mode; or start it with AGENTBUS_BYPASS=deliver: what a peer asks for then runs unasked"
            return Finding("delivery", Level.NOTE, seen, remedy)
        seen += "; nothing is pushed, its model has to call check_messages"
        remedy = f"end that session, and start it with: {self.launch(peer.name)}"
        return Finding("delivery", Level.WRONG, seen, remedy)

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:
        """See Registration. Only `claude` knows whether an account has channels."""
        if peer.delivery != "channel":
            return None
        seen = "agentbus cannot see whether the account has channels; without them, pushed messages are not shown"
        if delivered and not read:
            seen += f"; {delivered:,} delivered, not one is known to be read"
        remedy = "if the session said at its start that channels are not available, start it with: "
        return Finding("gate", Level.NOTE, seen, remedy + self.launch(peer.name, flags=False))


def _judged(where: str, version: str, numbers: tuple[int, ...]) -> Finding:
    least = ".".join(map(str, _LEAST_VERSION))
    if numbers < _LEAST_VERSION:
        return Finding("client", Level.WRONG, f"{where} is version {version}, channels need {least}", "claude update")
    return Finding("client", Level.OK, f"{where} is version {version} (channels need {least})")


def _loads_all(entry: dict[str, Any]) -> bool:
    """Whether an entry loads every tool at once, as ours did before 0.2. That stands above what a tool says."""
    return entry.get("alwaysLoad") is True


def _git_roots(folder: Path) -> Iterator[Path]:
    """The root of the repository that `folder` is in. For a linked work tree, also the root of the main work tree."""
    for one in (folder, *folder.parents):
        dot_git = one / ".git"
        if dot_git.is_file():
            # gitrepository-layout(5): this file says where the repository is.
            try:
                _, _, named = dot_git.read_text(encoding="utf-8").partition("gitdir: ")
            except (OSError, ValueError):
                return
            parts = (one / named.strip()).parts
            if "worktrees" in parts:
                yield Path(*parts[: parts.index("worktrees")]).parent
        if dot_git.exists():
            yield one
            return
