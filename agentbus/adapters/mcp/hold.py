"""A delivery that hands nothing over while an adapter has a reason to hold the messages back.

Knows neither the client nor the reason. The messages stay pending meanwhile, and `check_messages` returns them.
Implements [BYPASS-2].
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt

__all__ = ["HeldDelivery"]

# How often the reason is looked at while nothing is sent, so that `peers` follows a change: as often as the safety poll
# of a drain.
_LOOK_S = 3.0


class HeldDelivery:
    """Hands over through `inner`, and nothing while `why()` gives a reason. `why` is asked before each handing over.

    `report` is called with the reason when that is another than at the start, or than the last one; with "" when the
    delivery can be used.
    """

    def __init__(self, inner: Delivery, why: Callable[[], str], report: Callable[[str], Awaitable[None]]) -> None:
        self._inner = inner
        self._why = why
        self._report = report
        self._held = why()
        self._reporting = anyio.Lock()

    @property
    def carrier(self) -> str:
        """That of the inner delivery."""
        return self._inner.carrier

    @property
    def trouble(self) -> str:
        """Why messages were held back at the last look, or what troubles the inner delivery."""
        # Asked for each result of a tool, so it is no look of its own: `why` reads files.
        return self._held or self._inner.trouble

    async def ready(self) -> None:
        """Wait for the inner delivery."""
        await self._inner.ready()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first of `batch`. Raises DeliveryFailed while messages are held back."""
        held = await self._look()
        if held:
            raise DeliveryFailed(held)
        return await self._inner.deliver(batch)

    async def watch(self) -> None:
        """Report each change, also while no message comes. Runs until cancelled."""
        while True:
            await self._look()
            await anyio.sleep(_LOOK_S)

    async def _look(self) -> str:
        held = self._why()
        if held != self._held:
            async with self._reporting:
                if held != self._held:
                    self._held = held
                    await self._report(held or self._inner.trouble)
        return held
