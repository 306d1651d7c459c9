"""What a module is: its manifest, what can be asked of its registration with a client, and the command it registers.

A module is found by its `module.json`, and nothing of it is imported before it is used. Knows no adapter and no
client. Implements [MOD-1], [MOD-2], [REG-1].
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding

__all__ = ["Manifest", "Registered", "Registration", "Standing", "own_command"]

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
class Manifest:
    """What an adapter says of itself in its module.json. `entry` and `registration` are `module:function`.

    `client` is the program that the module belongs to, `server_name` what it is registered as there, `serve` the
    arguments with which the client starts `agentbus`, `launch_flags` what the client is started with.
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
        """What `doctor` says of the client and the registration. Never raises."""
