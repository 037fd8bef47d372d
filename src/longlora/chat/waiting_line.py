"""Who may use the model: one at a time, in the order they came, and each knows how many are before."""

import asyncio
from collections.abc import AsyncIterator


class WaitingLine:
    """A line of waiting answers, for one event loop."""

    def __init__(self) -> None:
        self._line: list[asyncio.Event] = []

    def join(self) -> asyncio.Event:
        """A ticket: a place at the end of the line, given back with `leave`."""
        ticket = asyncio.Event()
        self._line.append(ticket)
        return ticket

    async def ahead(self, ticket: asyncio.Event) -> AsyncIterator[int]:
        """How many are before this ticket, at once where there are any, and whenever it changes; ends at its turn."""
        while place := self._line.index(ticket):
            yield place
            ticket.clear()
            await ticket.wait()

    def leave(self, ticket: asyncio.Event) -> None:
        """Give up the place, or the turn."""
        self._line.remove(ticket)
        for other in self._line:
            other.set()
