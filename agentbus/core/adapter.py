"""What a module is: its manifest, what can be asked of its registration with a client, and the command it registers.

A module is found by its `module.json`, and nothing of it is imported before it is used. Knows no adapter and no
client. Implements [MOD-1], [MOD-2], [REG-1].
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from agentbus.core import config
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding
from agentbus.core.model import Peer

__all__ = ["Manifest", "Registered", "Registration", "Standing", "Variable", "own_command"]

# Where uv and pipx keep what they run once: gone with the next clean-up of their caches.
_RUN_ONCE = re.compile(r"/uv/(archive|builds|environments)-v\d+/|/\.cache/(uv|pipx)/|/pipx/\.cache/")


def own_command(prefix: str = sys.prefix) -> list[str]:
    """The command that runs this very agentbus, from any folder and with any PATH. [REG-1]

    Raises BrokenSetup for an installation that will not stay.
    """
    if _RUN_ONCE.search(prefix + "/"):
        raise BrokenSetup(
            f"this agentbus was run without installing it ({prefix}) and will not stay",
            hint="install it with `uv tool install` or `pipx install`, then repeat",
        )
    # The script beside the interpreter: where pipx, `uv tool`, a virtual environment and `pip install -e` put it, and
    # where they put it again when they upgrade.
    user = sysconfig.get_preferred_scheme("user")
    is_users = __file__.startswith(sysconfig.get_path("purelib", user) + os.sep)  # by `pip install --user`
    for scheme in (user,) if is_users else (sysconfig.get_default_scheme(),):
        script = os.path.join(sysconfig.get_path("scripts", scheme), "agentbus")
        if os.access(script, os.X_OK):
            return [os.path.abspath(script)]
    return [os.path.abspath(sys.executable), "-m", "agentbus"]


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of an adapter: one of `choices`, by default the first, or a whole number from `low` to `high`."""

    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    default: int = 0

    def read(self, name: str) -> str | int:
        """What the environment says. Raises InvalidRequest, naming the variable, its value and its range. [CONF-1]"""
        if self.choices:
            return config.choice(name, self.choices)
        return config.integer(name, self.default, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter says about itself in its module.json. `entry` and `registration` are `module:function`.

    `client` is the program that the adapter belongs to, empty where that can be any; `server_name` what it is
    registered as there, `serve` the arguments with which the client starts `agentbus`, `launch_flags` what the client
    is started with. `folder_variable` is the client's variable that holds the folder of its project, and `folder` the
    one in the home that the adapter keeps files of its own in; both may be empty. `variables` are the settings that
    belong to the adapter.
    """

    id: str
    title: str
    summary: str
    entry: str
    registration: str
    client: str
    server_name: str
    serve: tuple[str, ...]
    launch_flags: tuple[str, ...]
    folder_variable: str
    folder: str
    variables: Mapping[str, Variable]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Manifest:
        """The manifest that a module.json holds. Raises ValueError, TypeError, KeyError and AttributeError."""
        variables = {
            name: Variable(**{**stated, "choices": tuple(stated.get("choices", ()))})
            for name, stated in fields.get("variables", {}).items()
        }
        lists = {key: tuple(fields[key]) for key in ("serve", "launch_flags")}
        manifest = cls(**{"folder_variable": "", "folder": "", **fields, **lists, "variables": variables})
        texts = [value for key, value in fields.items() if key not in (*lists, "variables")]
        if not all(isinstance(value, str) for value in (*texts, *manifest.serve, *manifest.launch_flags)):
            raise ValueError("what should be text is not")
        if not (":" in manifest.entry and ":" in manifest.registration):
            raise ValueError("entry and registration are module:function")
        return manifest

    def word(self, variable: str) -> str:
        """What a variable with choices says. Raises InvalidRequest."""
        return str(self.variables[variable].read(variable))

    def number(self, variable: str) -> int:
        """What a variable with a range says. Raises InvalidRequest."""
        return int(self.variables[variable].read(variable))


class Standing(Enum):
    """How a module stands with its client. [MOD-2]"""

    ENABLED = "enabled"
    DISABLED = "not enabled"
    STALE = "stale"  # registered, with another command than that of this agentbus
    SHADOWED = "shadowed"  # an entry of the same name, for this folder alone, stands above the one of the user
    UNKNOWN = "unknown"  # the client's file cannot be read


@dataclass(frozen=True, slots=True)
class Registered:
    """How a module stands, in one sentence without a full stop, and the command that mends it where that is needed."""

    standing: Standing
    seen: str
    remedy: str = ""


class Registration(Protocol):
    """What can be asked of a module's registration. Made by the function that its manifest names, for that manifest.

    Nothing is asked of the client but by `enable`, `disable` and `findings`, each of which may take some seconds.
    """

    def registered(self) -> Registered:
        """How the module stands, by the client's own files. Never raises."""

    def enable(self) -> list[str]:
        """Register the module, or mend its registration; say what was done, a sentence each.

        Doing it again changes nothing. Raises BrokenSetup when the client is not there or does not do it, with what
        to type or to paste instead.
        """

    def disable(self) -> list[str]:
        """End the registration; say what was done, a sentence each. Raises as `enable` does."""

    def by_hand(self) -> list[str]:
        """What to do where `enable` cannot, a line each. Raises BrokenSetup as `own_command` does."""

    def launch(self, name: str | None, *, flags: bool = True) -> str:
        """The shell command that starts the client as `name`, with what this module can make use of if `flags`.

        Raises InvalidRequest for a bad name.
        """

    def findings(self) -> list[Finding]:
        """What `doctor` says about the client and the registration. Never raises."""

    def delivery(self, peer: Peer) -> Finding:
        """What `doctor` says about how a live session of this adapter receives, as a finding `delivery`. Never raises.

        Whether a session to which nothing is pushed is wrong, or just as its client is, the adapter knows.
        """

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:
        """What `doctor PEER` says about a gate of the client that cannot be seen from here; None where there is none.

        `delivered` and `read` count the messages of the peer's mailbox that are in these states. Never raises.
        """
