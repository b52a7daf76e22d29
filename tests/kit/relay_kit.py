"""TCP relay between a client and a server, which counts the bytes."""

from __future__ import annotations

import asyncio
import threading

_CHUNK_BYTES = 1024**2


class Relay:
    """Forwards connections to a port of this machine and counts the bytes of both directions.

    Args:
        target: address of the server, as host:port.
    """

    def __init__(self, target: str) -> None:
        self.num_bytes = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._target_port = int(target.rpartition(":")[2])
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._listening = threading.Event()
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        self._listening.wait()

    @property
    def address(self) -> str:
        """Address of the relay, as host:port."""
        return f"127.0.0.1:{self._port}"

    def close(self) -> None:
        """Close all connections and stop."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._closed.wait()
        server.close()
        self._reset()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    def _reset(self) -> None:
        """Abort all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # no server listens there: close the connection, as a refused one would be
            writer.close()
            return
        if self._closed.is_set():
            writer.transport.abort()
            target_writer.transport.abort()
            return
        await asyncio.gather(self._forward(reader, target_writer), self._forward(target_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self.num_bytes += len(data)
                writer.write(await self._transform(data))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _transform(self, data: bytes) -> bytes:
        """Return the bytes to forward for received bytes; overridden by relays that inject faults."""
        return data
