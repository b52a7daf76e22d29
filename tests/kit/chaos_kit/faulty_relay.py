"""TCP relay that injects network faults: delay, partition, reset and corruption."""

from __future__ import annotations

import asyncio
from random import Random

from relay_kit import Relay


class FaultyRelay(Relay):
    """Relay that applies its current faults to every connection; its methods are thread-safe.

    Args:
        target: address of the server, as host:port.
        seed: seed of the choice of corrupted bytes.
    """

    def __init__(self, target: str, seed: int) -> None:
        self._random = Random(seed)
        self._delay_s = 0.0
        self._resets = False
        self._corrupts = False
        self._open: asyncio.Event = asyncio.Event()
        self._open.set()
        super().__init__(target)

    def set_delay(self, delay_s: float) -> None:
        """Delay each chunk by `delay_s` seconds; 0 disables the delay."""
        self._delay_s = delay_s

    def set_corrupting(self, corrupts: bool) -> None:
        """Enable or disable the corruption of one bit in each chunk."""
        self._corrupts = corrupts

    def set_partitioned(self, is_partitioned: bool) -> None:
        """Enable or disable a partition: connections stay open, and data arrives after the partition."""
        self._loop.call_soon_threadsafe(self._open.clear if is_partitioned else self._open.set)

    def set_resetting(self, resets: bool) -> None:
        """Enable or disable the reset of all present and new connections."""
        self._resets = resets
        if resets:
            self._loop.call_soon_threadsafe(self._reset)

    def close(self) -> None:
        """Forward the data that is held back, and stop."""
        self.set_partitioned(False)
        super().close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._resets:
            writer.transport.abort()
            return
        await super()._connect(reader, writer)

    async def _transform(self, data: bytes) -> bytes:
        await asyncio.sleep(self._delay_s)
        await self._open.wait()
        if not self._corrupts:
            return data
        changed = bytearray(data)
        changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)
