"""The delivery that pushes nothing: mail stays pending until check_messages asks for it. Implements [VOID-1]."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from agentbus.core.bus import PULL
from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt

__all__ = ["PullDelivery"]


class PullDelivery:
    """Never ready, so a pump with it drains nothing and only sleeps."""

    carrier = PULL

    async def ready(self) -> None:
        """Never returns."""
        await anyio.sleep_forever()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Raises DeliveryFailed: there is no way to push."""
        raise DeliveryFailed(f"nothing can be pushed to this session, {len(batch)} messages wait")
