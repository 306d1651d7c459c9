"""What the registrations of MCP clients share: reading `mcpServers` from JSON, comparing commands, running programs.

Knows no client. Implements [REG-1], [REG-4], [REG-5].
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentbus import __version__
from agentbus.core.adapter import Manifest, Registered, Standing, own_command
from agentbus.core.bus import PULL
from agentbus.core.errors import BrokenSetup, InvalidRequest
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer
from agentbus.core.names import session_name

__all__ = [
    "ByHand",
    "Unreadable",
    "check_command",
    "check_version",
    "command_of",
    "is_same",
    "launch_line",
    "paste",
    "read_object",
    "run_mcp",
    "run_program",
    "servers",
    "strings",
    "version_of",
]

# An agentbus command answers `--version` in 0.05 s.
_OWN_PATIENCE_S = 10.0


class ByHand:
    """The registration of an adapter whose client is not known: it says what to paste. See Registration."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def registered(self) -> Registered:
        """Always unknown: agentbus cannot see the state of this registration."""
        remedy = f"agentbus enable {self._manifest.id} prints what to paste into its configuration"
        return Registered(Standing.UNKNOWN, "agentbus cannot see which clients start it", remedy)

    def enable(self) -> list[str]:
        """Say what to paste. Raises BrokenSetup as `own_command` does."""
        return self.by_hand()

    def disable(self) -> list[str]:
        """Say what to remove."""
        return [f"remove the entry {self._manifest.server_name} from the configuration of your client"]

    def by_hand(self) -> list[str]:
        """What to paste, a line each. Raises BrokenSetup as `own_command` does."""
        return paste(self._manifest.server_name, [*own_command(), *self._manifest.serve])

    def launch(self, name: str | None, *, flags: bool = True) -> str:  # noqa: ARG002 - the port's
        """Raises InvalidRequest: agentbus does not know how the client is started."""
        raise InvalidRequest(
            f"agentbus does not know how to start the client of {self._manifest.id}",
            hint=f"start it as usual, with AGENTBUS_NAME={session_name(name or 'NAME')} in its environment",
        )

    def unattended(self) -> str:
        """Empty: it is not known what such a client asks."""
        return ""

    def findings(self) -> list[Finding]:
        """Empty: agentbus cannot see the registration, so it cannot judge it."""
        return []

    def delivery(self, peer: Peer) -> Finding:
        """Such a client receives by pull. That is normal: there is nothing to mend."""
        seen = f'"{peer.name}" receives by {peer.receives}'
        if peer.delivery != PULL:
            return Finding("delivery", Level.OK, seen)
        return Finding("delivery", Level.NOTE, f"{seen}; its model has to call check_messages")

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:  # noqa: ARG002 - the port's
        """None: no gate is known."""
        return None


class Unreadable(Exception):
    """A client's file is there, but agentbus cannot understand it."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises Unreadable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise Unreadable(f"{path} is not a JSON object")
    return found


def servers(of: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries under `mcpServers`, by name. Values that are not entries are left out."""
    found = of.get("mcpServers")
    if not isinstance(found, dict):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def strings(value: object) -> set[str]:
    """The strings in a list; an empty set if `value` is not a list."""
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()


def command_of(entry: dict[str, Any]) -> list[str]:
    """The command line of an entry; its URL if it has no command."""
    arguments = entry.get("args")
    words = [entry.get("command") or entry.get("url") or "", *(arguments if isinstance(arguments, list) else [])]
    return [str(word) for word in words]


def is_same(command: list[str], wanted: list[str]) -> bool:
    """Whether both run the same program with the same arguments.

    A name on PATH, or a link to the program, counts as its path.
    """
    if command == wanted:
        return True
    found = shutil.which(command[0])
    # Not if an interpreter runs agentbus: a virtual environment's interpreter is a link to one that does not have it.
    is_script = len(command) == len(wanted) and command[1:] == wanted[1:] and "-m" not in command
    return is_script and found is not None and os.path.realpath(found) == os.path.realpath(wanted[0])


def paste(server_name: str, command: Sequence[str]) -> list[str]:
    """What to paste into the configuration of any MCP client, a line each. [REG-4]"""
    pasted = {"mcpServers": {server_name: {"command": command[0], "args": list(command[1:])}}}
    return [
        "For any other MCP client, paste this into its configuration:",
        *("  " + line for line in json.dumps(pasted, indent=2).splitlines()),
    ]


def launch_line(words: Sequence[str], name: str | None) -> str:
    """The shell command that starts a client as `name`. Raises InvalidRequest for a bad name."""
    return (f"AGENTBUS_NAME={shlex.quote(session_name(name))} " if name is not None else "") + shlex.join(words)


def run_program(command: Sequence[str], patience_s: float) -> tuple[int, str]:
    """Run a program to its end. Returns its exit code and its output. Raises BrokenSetup. [REG-5]"""
    program = shutil.which(command[0])
    if program is None:
        raise BrokenSetup(
            f"{command[0]} is not on PATH, nothing was changed",
            hint=f"run this where it is on PATH: {shlex.join(command)}",
        )
    # It gets its own session, so that processes that it starts end with it and cannot hold our pipe open.
    with subprocess.Popen(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            raise BrokenSetup(
                f"{shlex.join(command)[:100]} did not end within {patience_s:g} s and was stopped",
                hint="run it yourself to see why",
            ) from None
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, output.decode(errors="replace")


def run_mcp(client: str, arguments: Sequence[str], patience_s: float) -> None:
    """Run the `mcp` command of a client. Raises BrokenSetup, with the last line that it has said. [REG-5]"""
    command = [client, "mcp", *arguments]
    code, output = run_program(command, patience_s)
    if code:
        said = output.strip().splitlines()[-1:] or ["no output"]
        raise BrokenSetup(
            f"{client} mcp {arguments[0]} failed with exit code {code} ({said[0][:300]})",
            hint=f"run it yourself to see why: {shlex.join(command)}",
        )


def version_of(client: str, patience_s: float) -> Finding | tuple[str, str, tuple[int, ...]]:
    """Where a client is, and its version as text and as numbers; a finding if it does not say that."""
    remedy = f"run {client} --version to see why"
    try:
        _, output = run_program([client, "--version"], patience_s)
    except (BrokenSetup, OSError) as error:
        return Finding("client", Level.WRONG, str(error), remedy)
    where, numbers = shutil.which(client), re.search(r"(\d+)\.(\d+)\.(\d+)", output)
    if numbers is None:
        return Finding("client", Level.NOTE, f"{where} does not print its version", remedy)
    return str(where), numbers[0], tuple(map(int, numbers.groups()))


def check_version(client: str, patience_s: float, tried: tuple[int, ...], update: str) -> Finding:
    """Whether a client is as new as the one with which agentbus was tried. `update` is what makes it newer."""
    found = version_of(client, patience_s)
    if isinstance(found, Finding):
        return found
    where, version, numbers = found
    least = ".".join(map(str, tried))
    if numbers[: len(tried)] < tried:
        return Finding("client", Level.NOTE, f"{where} is version {version}; agentbus was tried with {least}", update)
    return Finding("client", Level.OK, f"{where} is version {version} (tried with {least})")


def check_command(client: str, command: Sequence[str], serve_words: int, mend: str) -> Finding:
    """Whether the registered command runs, and is this agentbus. The last `serve_words` words make it serve.

    [DOCTOR-4]
    """
    asked = [*command[:-serve_words], "--version"]
    try:
        code, output = run_program(asked, _OWN_PATIENCE_S)
    except (BrokenSetup, OSError) as error:
        return Finding("command", Level.WRONG, str(error), mend)
    if code or not output.startswith("agentbus "):
        said = output.strip().splitlines()[-1:] or ["no output"]
        return Finding("command", Level.WRONG, f"{shlex.join(asked)} fails: {said[0][:200]}", mend)
    version = output.split()[1]
    if version != __version__:
        seen = f"{client} starts agentbus {version}, but this is agentbus {__version__}"
        return Finding("command", Level.NOTE, seen, mend)
    return Finding("command", Level.OK, f"{client} starts agentbus {version}, and it runs")
