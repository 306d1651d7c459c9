"""agentbus: a local message bus for AI-agent sessions on one machine.

The public API for Python programs. Names are imported when they are first used: `agentbus send` imports this file too,
and must not wait for an event loop that it does not need.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

    from agentbus.core.asking import NoAnswer
    from agentbus.core.bus import GroupSent, Sent
    from agentbus.core.errors import AgentbusError, BrokenSetup, InvalidRequest, MailboxFull, Refused, TryAgain
    from agentbus.core.model import Envelope, Peer
    from agentbus.member import Member, join

__version__ = "0.2.0"

__all__ = [
    "AgentbusError",
    "BrokenSetup",
    "Envelope",
    "GroupSent",
    "InvalidRequest",
    "MailboxFull",
    "Member",
    "NoAnswer",
    "Peer",
    "Refused",
    "Sent",
    "TryAgain",
    "__version__",
    "join",
]

_HOMES = {
    "Envelope": "agentbus.core.model",
    "GroupSent": "agentbus.core.bus",
    "Member": "agentbus.member",
    "NoAnswer": "agentbus.core.asking",
    "Peer": "agentbus.core.model",
    "Sent": "agentbus.core.bus",
    "join": "agentbus.member",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agentbus' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "agentbus.core.errors")), name)


def __dir__() -> list[str]:
    return __all__
