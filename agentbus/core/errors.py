"""Every error that agentbus raises on purpose, sorted by who has to act.

Knows nothing about the rest of the package. An error is one sentence that names the value, the limit and what to do
about it. Its class decides the exit code of the command line. Implements [ERR-1], [ERR-2].
"""

from __future__ import annotations

__all__ = [
    "AgentbusError",
    "BrokenSetup",
    "Busy",
    "DamagedIndex",
    "DeliveryClosed",
    "DeliveryFailed",
    "DeliveryWaited",
    "InvalidRequest",
    "MailboxFull",
    "Refused",
    "RelayDown",
    "RelayRefused",
    "TryAgain",
]


class AgentbusError(Exception):
    """Something went wrong in agentbus."""

    exit_code = 1

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}: {self.hint}" if self.hint else message


class InvalidRequest(AgentbusError):
    """The request itself is invalid; repeating it will not help."""

    exit_code = 2


class BrokenSetup(AgentbusError):
    """The home folder, the database or the environment cannot be used; a person has to fix it."""


class DamagedIndex(BrokenSetup):
    """The index of the search is damaged. The messages are not in it, so it can be made anew."""


class Refused(AgentbusError):
    """The bus is healthy and says no, for a reason that the message names."""


class TryAgain(AgentbusError):
    """Nothing is wrong with the request; later it will succeed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits(3)


class Busy(TryAgain):
    """Another process is writing to the mailbox."""


class MailboxFull(TryAgain):
    """The recipient has too many pending messages."""


class RelayDown(TryAgain):
    """The line to other machines is not there now; it is worth trying again."""


class RelayRefused(Refused):
    """What carries messages to other machines does not let this one in; a person has to do something."""


class DeliveryFailed(AgentbusError):
    """The delivery handed nothing over; it can be tried again."""


class DeliveryWaited(DeliveryFailed):
    """It handed nothing over, because it had to wait for the far end, which can take something now: read anew."""


class DeliveryClosed(AgentbusError):
    """The far end of a delivery is gone for good."""
