"""A relay that a fault can sit on: it delays, holds back, cuts or corrupts what passes. Knows TCP, no cause."""

from __future__ import annotations

import asyncio
from random import Random

from relay import Relay


class FaultyRelay(Relay):
    """Does to every connection what its state says; its methods may be called from any thread.

    Args:
        target: address of the server behind it.
        seed: draws which bytes are corrupted.
    """

    def __init__(self, target: str, seed: int) -> None:
        self._random = Random(seed)
        self._delay_s = 0.0
        self._is_cut = False
        self._corrupts = False
        self._open: asyncio.Event = asyncio.Event()
        self._open.set()
        super().__init__(target)

    def delay(self, delay_s: float) -> None:
        """Pass each chunk on so much later; 0: at once."""
        self._delay_s = delay_s

    def corrupt(self, corrupts: bool) -> None:
        """Change one byte of each chunk, or no more."""
        self._corrupts = corrupts

    def hold(self, holds: bool) -> None:
        """Let nothing through, as a network that is parted: connections stay, and what was sent comes later."""
        self._loop.call_soon_threadsafe(self._open.clear if holds else self._open.set)

    def cut(self, is_cut: bool) -> None:
        """Reset all connections and every new one, or no more."""
        self._is_cut = is_cut
        if is_cut:
            self._loop.call_soon_threadsafe(self._reset)

    def close(self) -> None:
        """Stop; what is held back is let go."""
        self.hold(False)
        super().close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        await super()._connect(reader, writer)

    async def _treat(self, data: bytes) -> bytes:
        await asyncio.sleep(self._delay_s)
        await self._open.wait()
        if not self._corrupts:
            return data
        changed = bytearray(data)
        changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)
