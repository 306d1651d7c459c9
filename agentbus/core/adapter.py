"""Describes an adapter: its manifest, its registration with a client, and the command that it registers.

An adapter is found by its `module.json`, and nothing in it is imported before it is used. Knows no adapter by
name, and no client. Implements [MOD-1], [MOD-2], [REG-1].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from agentbus.core import config
from agentbus.core.errors import BrokenSetup
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any, Protocol

    from agentbus.core.findings import Finding
    from agentbus.core.model import Envelope, Peer
    from agentbus.core.process import Process
else:
    Protocol = object

__all__ = ["Manifest", "Reachable", "Registered", "Registration", "Standing", "Variable", "own_command"]

# Where uv and pipx keep programs that they run once: the next clean-up of their caches removes them.
_RUN_ONCE = r"/uv/(archive|builds|environments)-v\d+/|/\.cache/(uv|pipx)/|/pipx/\.cache/"


def own_command(prefix: str = sys.prefix) -> list[str]:
    """The command that runs this installation of agentbus, from any folder and in any environment. [REG-1], [ISO-1]

    Raises BrokenSetup for an installation that will not stay.
    """
    import re  # takes 2 ms, and a send that looks for running sessions does not need it

    if re.search(_RUN_ONCE, prefix + "/"):
        raise BrokenSetup(
            f"agentbus is not installed: it runs from a temporary folder ({prefix})",
            hint="install it with `uv tool install` or `pipx install`, then try again",
        )
    # The interpreter of the installation, which stays where it is when pipx, `uv tool` or pip upgrade. -E: without the
    # PYTHON* variables of whoever starts it. -P: without the working folder. Not -I, which would leave out what
    # `pip install --user` has installed.
    return [os.path.abspath(sys.executable), "-E", "-P", "-m", "agentbus"]


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of an adapter: one of `choices`, by default the first, or a whole number from `low` to `high`."""

    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    default: int = 0

    def read(self, name: str) -> str | int:
        """The value that is set. Raises InvalidRequest, naming the variable, its value and its range. [CONF-1]"""
        if self.choices:
            return config.choice(name, self.choices)
        return config.integer(name, self.default, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter says about itself in its module.json. `entry` and `registration` are `module:function`.

    `client` is the program that the adapter belongs to, empty if it can be any. `server_name` is the name of the
    registration there, `serve` the arguments with which the client starts `agentbus`, and `launch_flags` the arguments
    with which the client is started. `folder_variable` is the client's variable that holds the folder of its project.
    `folder` is the folder in the home in which the adapter keeps its own files, or several with a space between them.
    Both can be empty. `variables` are the
    settings that belong to the adapter. `record`, as `module:function`, reads what its client recorded of a session
    that has ended, at a place that the adapter has named; empty if it keeps no record. `leftovers`, as
    `module:function`, gets `folder` and returns the names in it that are the adapter's own; empty if none are.
    `activity`, as `module:function`, gets the agent process of a session and returns "busy" or "idle" as the client
    itself tells it just now, or "" if it does not; empty if the client never does.
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
    record: str = ""
    leftovers: str = ""
    activity: str = ""

    @property
    def folders(self) -> list[str]:
        """The folders in the home in which the adapter keeps its own files."""
        return self.folder.split()

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
            raise ValueError("a value that must be text is not text")
        if not (":" in manifest.entry and ":" in manifest.registration):
            raise ValueError("entry and registration must have the form module:function")
        return manifest

    def word(self, variable: str) -> str:
        """The value of a variable with choices. Raises InvalidRequest."""
        return str(self.variables[variable].read(variable))

    def number(self, variable: str) -> int:
        """The value of a variable with a range. Raises InvalidRequest."""
        return int(self.variables[variable].read(variable))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachable:
    """A session that its client runs, with its name there, and how it takes a post without a server of ours.

    An adapter whose client says which sessions run has a `reach.py`. In it, `sessions(home, name)` returns them, or
    those called `name` if that is not None.
    `session` is what its client calls it, and `place` where the client records what its model was given; "" if nowhere.
    `held` says why its client would not give a post to its model just now; "" if it would. `post` posts the first of a
    batch once and returns how many; it raises DeliveryFailed, and then nothing was posted. Neither waits.
    """

    name: str
    host: Process
    session: str
    runtime: str
    cwd: str
    place: str
    held: Callable[[], str]
    post: Callable[[Sequence[Envelope]], int]


class Standing(Enum):
    """The state of an adapter's registration with its client. [MOD-2]"""

    ENABLED = "enabled"
    DISABLED = "not enabled"
    STALE = "stale"  # registered, but not with the command of this agentbus
    SHADOWED = "shadowed"  # an entry of the same name, for this folder alone, takes precedence over the user's
    UNKNOWN = "unknown"  # the client's file cannot be read


@dataclass(frozen=True, slots=True)
class Registered:
    """The state of a registration, in one sentence without a full stop, and the command that fixes it if needed."""

    standing: Standing
    seen: str
    remedy: str = ""


class Registration(Protocol):
    """The registration of one adapter. The function that the manifest names makes it, for that manifest.

    Only `enable`, `disable` and `findings` ask the client. Each of them can take some seconds.
    """

    def registered(self) -> Registered:
        """The state of the registration, from the client's own files. Never raises."""

    def enable(self) -> list[str]:
        """Register the adapter, or repair its registration. Return what was done, a sentence each.

        Doing it again changes nothing. Raises BrokenSetup when the client is not there or does not do it. The error
        says what to type or to paste instead.
        """

    def disable(self) -> list[str]:
        """End the registration. Return what was done, a sentence each. Raises as `enable` does."""

    def by_hand(self) -> list[str]:
        """What to do by hand when `enable` cannot do it, a line each. Raises BrokenSetup as `own_command` does."""

    def launch(self, name: str | None, *, flags: bool = True) -> str:
        """The shell command that starts the client as `name`, with the flags that this adapter can use if `flags`.

        Raises InvalidRequest for a bad name.
        """

    def unattended(self) -> str:
        """What a session without a person needs to answer, in one sentence; "" if nothing is known. [MOD-4]"""

    def findings(self) -> list[Finding]:
        """What `doctor` says about the client and the registration. Never raises."""

    def delivery(self, peer: Peer) -> Finding:
        """What `doctor` says about how a live session of this adapter receives, as a finding `delivery`. Never raises.

        If nothing is pushed to a session, the adapter knows whether that is wrong or normal for its client.
        """

    def gate(self, peer: Peer, *, delivered: int, read: int) -> Finding | None:
        """What `doctor PEER` says about a gate of the client that agentbus cannot see; None if there is no such gate.

        `delivered` and `read` count the messages of the peer's mailbox that are in these states. Never raises.
        """
