"""The adapter's registration with Codex: read from its config.toml, changed only by Codex itself.

`codex mcp add` replaces an entry whole, without a word. So what the user has set in an entry of ours is put back behind
it, and an entry of somebody else's is remembered and put back by `disable`: both through `codex app-server`, which
writes single values. Knows the command line and the file of Codex, as recorded with 0.169, but not the bus. Implements
[REG-1] to [REG-5], [CODEX-10].
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentbus.adapters.codex.app_server import codex_home
from agentbus.adapters.codex.queue import CARRIER as QUEUE
from agentbus.adapters.mcp.registration import (
    Unreadable,
    check_command,
    command_of,
    is_same,
    launch_line,
    paste,
    run_mcp,
    version_of,
)
from agentbus.core import config
from agentbus.core.adapter import Manifest, Registered, Registration, Standing, own_command
from agentbus.core.bus import PULL
from agentbus.core.config import other_program, prepare_folder, working_folder
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer

__all__ = ["CodexRegistration", "registration"]

# `codex mcp` takes 0.03 s.
_PATIENCE_S = 15.0
# From 0.157 on, a session starts the app server that messages go in through.
_APP_SERVER_VERSION = (0, 157, 0)
_SERVE = ["serve", "codex"]
# What `codex mcp add` sets. Everything else in an entry is the user's.
_SET_BY_ADD = {"command", "args", "env", "url"}
_REPLACED = "replaced.json"


def registration(manifest: Manifest) -> Registration:
    """The registration of the adapter that `manifest` describes."""
    return CodexRegistration(manifest)


class CodexRegistration:
    """See Registration. A trusted project's entries take precedence over the user's in `cwd`."""

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

    @property
    def _file(self) -> Path:
        """Codex's settings. Raises BrokenSetup as `codex_home` does."""
        return codex_home({name: other_program(name) for name in ("CODEX_HOME", "HOME")}) / "config.toml"

    # -- its state -----------------------------------------------------------------------------------------

    def registered(self) -> Registered:
        """The state of the registration, according to Codex's own files. Never raises. [REG-3]"""
        try:
            state = _read(self._file)
            entry = _entry(state, self._name)
            shadow = self._shadow(state)
        except Unreadable as error:
            return Registered(Standing.UNKNOWN, str(error), "start codex once: it says what is wrong with that file")
        except BrokenSetup as error:
            return Registered(Standing.UNKNOWN, str(error))
        if shadow is not None:
            return shadow
        if entry is None:
            return Registered(Standing.DISABLED, f"not registered in {self._file}", self._mend)
        command = command_of(entry)
        try:
            is_own = is_same(command, self._wanted())
        except BrokenSetup as error:
            return Registered(Standing.STALE, str(error))
        if entry.get("enabled") is False:
            seen = f"switched off in {self._file} (enabled = false)"
            return Registered(Standing.SHADOWED, seen, f"remove that line under [mcp_servers.{self._name}]")
        if is_own:
            return Registered(Standing.ENABLED, f"registered for all projects as {shlex.join(command)}")
        seen = f"registered as {shlex.join(command)}, "
        is_there = shutil.which(command[0]) is not None
        seen += f"but this agentbus is {shlex.join(self._wanted())}" if is_there else "which cannot be run"
        return Registered(Standing.STALE, seen, self._mend)

    @property
    def _mend(self) -> str:
        return f"agentbus enable {self._manifest.id}"

    def _wanted(self) -> list[str]:
        return [*self._own(), *self._manifest.serve]

    def _shadow(self, state: dict[str, Any]) -> Registered | None:
        """The entry of a trusted project that takes precedence in our folder, unless it runs this same agentbus."""
        projects = state.get("projects")
        for folder in (self._cwd, *self._cwd.parents) if self._cwd is not None else ():
            about = projects.get(str(folder)) if isinstance(projects, dict) else None
            path = folder / ".codex" / "config.toml"
            if not isinstance(about, dict) or about.get("trust_level") != "trusted" or path == self._file:
                continue
            entry = _entry(_read(path), self._name)
            if entry is not None and not is_same(command_of(entry), self._wanted()):
                seen = f"{path} overrides it: {shlex.join(command_of(entry))}"
                return Registered(Standing.SHADOWED, seen, f"remove [mcp_servers.{self._name}] there")
        return None

    # -- changing it ---------------------------------------------------------------------------------------

    def enable(self) -> list[str]:
        """Register the adapter for all projects of the user. See Registration. [REG-1], [REG-2]"""
        wanted, old = self._wanted(), self._user_entry()
        asked = other_program("AGENTBUS_HOME")
        home = {"AGENTBUS_HOME": str(config.load().home)} if asked else {}
        kept = old.get("env") if old is not None and _is_ours(old) else None
        environment = {**(kept if isinstance(kept, dict) else {}), **home}
        if old is not None and is_same(command_of(old), wanted) and environment == old.get("env", {}):
            said = f"{self._name} is already registered with Codex, nothing was changed"
            return [said, *self._shadow_notes()]
        if old is not None and not _is_ours(old):
            self._remember(old)
        variables = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        self._mcp("add", self._name, *variables, "--", *wanted)
        if old is not None and _is_ours(old):
            for key in old.keys() - _SET_BY_ADD:
                self._write(f"mcp_servers.{self._name}.{key}", old[key])
        if self._user_entry() is None:
            raise BrokenSetup(
                f"codex mcp add reported success, but {self._file} has no entry {self._name}",
                hint="look at it with codex mcp list",
            )
        mended = "" if old is None else f", in place of {shlex.join(command_of(old))}"
        return [f"registered {self._name} with Codex for all projects{mended}", *self._shadow_notes()]

    def disable(self) -> list[str]:
        """End the registration, and put back what it had replaced. See Registration. [REG-2]"""
        if self._user_entry() is None:
            return [f"{self._name} is not registered with Codex, nothing to do there"]
        self._mcp("remove", self._name)
        said = [f"removed {self._name} from Codex; running sessions keep it until they end"]
        with suppress(FileNotFoundError):
            before = json.loads(self._replaced.read_text(encoding="utf-8"))
            self._write(f"mcp_servers.{self._name}", before)
            self._replaced.unlink()
            said.append(f"put back the entry that was there before: {shlex.join(command_of(before))}")
        return said

    def by_hand(self) -> list[str]:
        """The command to type if `codex` is there, and the text to paste for another MCP client. [REG-4]"""
        typed = shlex.join(["codex", "mcp", "add", self._name, "--", *self._wanted()])
        return ["To register it with Codex yourself, run:", f"  {typed}", *paste(self._name, self._wanted())]

    def launch(self, name: str | None, *, flags: bool = True) -> str:  # noqa: ARG002 - the port's; it needs none
        """See Registration. Raises InvalidRequest for a bad name."""
        return launch_line([self._manifest.client], name)

    def unattended(self) -> str:
        """Empty: Codex asks nobody before it runs our tools, as they say what they do. [TOOL-5]"""
        return ""

    def _user_entry(self) -> dict[str, Any] | None:
        try:
            return _entry(_read(self._file), self._name)
        except Unreadable as error:
            raise BrokenSetup(str(error), hint="start codex once: it says what is wrong with that file") from error

    @property
    def _replaced(self) -> Path:
        return config.load().home / self._manifest.folder / _REPLACED

    def _remember(self, entry: dict[str, Any]) -> None:
        path = self._replaced
        prepare_folder(path.parent.parent)
        prepare_folder(path.parent)
        path.write_text(json.dumps(entry), encoding="utf-8")

    def _shadow_notes(self) -> list[str]:
        found = self.registered()
        return [f"but {found.seen}; {found.remedy}"] if found.standing is Standing.SHADOWED else []

    def _mcp(self, *arguments: str) -> None:
        run_mcp("codex", arguments, self._patience_s)

    def _write(self, key: str, value: Any) -> None:
        """Set one value in the user's configuration, through Codex. Raises BrokenSetup."""
        about = {"clientInfo": {"name": "agentbus", "title": "agentbus", "version": "0"}}
        asked = {"keyPath": key, "value": value, "mergeStrategy": "replace"}
        lines: list[dict[str, Any]] = [
            {"id": 1, "method": "initialize", "params": about},
            {"method": "initialized", "params": {}},
            {"id": 2, "method": "config/value/write", "params": asked},
        ]
        answer = self._answer(lines, 2)
        if "result" not in answer:
            said = answer.get("error", {}).get("message", "no answer")
            raise BrokenSetup(
                f"codex did not put back {key} ({str(said)[:200]})",
                hint=f"set it in {self._file}: {json.dumps(value)[:300]}",
            )

    def _answer(self, lines: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
        """The answer to request `number` of these lines, from an app server of our own; empty if none comes."""
        program = shutil.which("codex")
        if program is None:
            return {}
        with subprocess.Popen(
            [program, "app-server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                child.stdin.flush()
                # It ends when its stdin does, and by then it has answered, or it never will.
                for line in child.stdout:
                    with suppress(ValueError):
                        found = json.loads(line)
                        if isinstance(found, dict) and found.get("id") == number:
                            return found
            finally:
                child.kill()
        return {}

    # -- what doctor reports -------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """See Registration. [DOCTOR-4]"""
        stands = self.registered()
        if shutil.which("codex") is None:
            found = [Finding("client", Level.NOTE, "codex is not on PATH", "install Codex, if you want to use it")]
            if stands.standing is Standing.DISABLED:
                return found
        else:
            found = [self._version()]
        is_wrong = stands.standing in (Standing.STALE, Standing.SHADOWED, Standing.UNKNOWN)
        level = Level.WRONG if is_wrong else Level.OK if stands.standing is Standing.ENABLED else Level.NOTE
        found.append(Finding("registration", level, f"{self._manifest.id}: {stands.seen}", stands.remedy))
        if stands.standing is Standing.ENABLED:
            command = command_of(self._user_entry() or {})
            found.append(check_command("Codex", command, len(self._manifest.serve), self._mend))
            found += self._settings()
        return found

    def _settings(self) -> Iterator[Finding]:
        """What Codex's settings mean for a session. They were readable a moment ago; else there is nothing to say."""
        try:
            state = _read(self._file)
        except Unreadable:
            return
        entry = _entry(state, self._name) or {}
        asking = sorted(_asking(entry))
        if asking:
            seen = f"Codex asks before it uses {', '.join(asking)} of agentbus, and `codex exec` refuses these"
            remedy = f"take approval_mode out of [mcp_servers.{self._name}] in {self._file}: our tools need none"
            yield Finding("permission", Level.NOTE, seen, remedy)
        else:
            yield Finding("permission", Level.OK, "Codex uses the tools of agentbus without a question")
        features = state.get("features")
        if isinstance(features, dict) and features.get("daemon_auto_start") is False:
            seen = (
                f"daemon_auto_start is off in {self._file}: without a running app server, messages are only announced"
            )
            yield Finding("client", Level.NOTE, seen, "set it to true, or the model calls check_messages")
        yield self._sandbox(state)

    def _sandbox(self, state: dict[str, Any]) -> Finding:
        if state.get("sandbox_mode") == "danger-full-access":
            return Finding("sandbox", Level.OK, f"{self._file} turns the sandbox off: shell commands reach the bus")
        seen = "Codex runs shell commands in a sandbox, from which the command agentbus cannot send; its tools can"
        return Finding("sandbox", Level.OK, seen)

    def _version(self) -> Finding:
        found = version_of("codex", self._patience_s)
        if isinstance(found, Finding):
            return found
        where, version, numbers = found
        least = ".".join(map(str, _APP_SERVER_VERSION))
        if numbers < _APP_SERVER_VERSION:
            seen = f"{where} is version {version}; from {least} on, messages go into a running session"
            return Finding("client", Level.NOTE, seen, "update Codex; until then its model calls check_messages")
        return Finding("client", Level.OK, f"{where} is version {version}, with its settings in {self._file.parent}")

    def delivery(self, peer: Peer) -> Finding:
        """See Registration. Without its app server, a session of Codex reads when it calls check_messages."""
        seen = f'"{peer.name}" receives by {peer.receives}'
        if peer.delivery not in (PULL, QUEUE):
            return Finding("delivery", Level.OK, seen)
        remedy = ""
        if "was started with" in peer.delivery_reason:
            remedy = f"end that session, and start it without that option: {self.launch(peer.name)}"
        return Finding("delivery", Level.NOTE, f"{seen}; its model has to call check_messages", remedy)

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:  # noqa: ARG002 - the port's
        """None: what goes into a thread is confirmed."""
        return None


def _read(path: Path) -> dict[str, Any]:
    """What a TOML file holds; empty if there is no file. Raises Unreadable."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from error


def _entry(state: dict[str, Any], name: str) -> dict[str, Any] | None:
    servers = state.get("mcp_servers")
    entry = servers.get(name) if isinstance(servers, dict) else None
    return entry if isinstance(entry, dict) else None


def _asking(entry: dict[str, Any]) -> set[str]:
    """The tools before which Codex asks by what our entry says; "every tool" if that holds for all."""
    tools = entry.get("tools")
    single = {
        name: one.get("approval_mode")
        for name, one in (tools if isinstance(tools, dict) else {}).items()
        if isinstance(one, dict)
    }
    asks = ("prompt", "writes")
    every = {"every tool"} if entry.get("default_tools_approval_mode") in asks else set()
    return every | {str(name) for name, mode in single.items() if mode in asks}


def _is_ours(entry: dict[str, Any]) -> bool:
    """Whether an entry starts agentbus, of whatever installation."""
    command = command_of(entry)
    is_agentbus = os.path.basename(command[0]) == "agentbus" or ("-m", "agentbus") in pairwise(command)
    return is_agentbus and command[-2:-1] == _SERVE[:1]
