"""The replay process: opens the store, listens, serves until told to stop. Knows how the parts are put together."""

from __future__ import annotations

import asyncio
import logging

from deskrl.core import allocator, lifetime, rpc
from deskrl.core.config import RunConfig
from deskrl.core.exposition import expose
from deskrl.core.runfolder import RunFolder
from deskrl.proto.v1 import directory_pb2_grpc, replay_pb2_grpc, rollout_pb2_grpc
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.directory_service import DirectoryServicer
from deskrl.replay.metrics import Metrics
from deskrl.replay.replay_service import ReplayServicer
from deskrl.replay.rollout_service import RolloutServicer
from deskrl.replay.store import Store

_log = logging.getLogger("deskrl.replay")

SERVICES = tuple(f"deskrl.proto.v1.{name}Service" for name in ("Rollout", "Replay", "Directory"))
_STOP_GRACE_S = 2.0


def run(config: RunConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        UserError: the address is taken, or the store is damaged, not ours or in use.
    """
    lifetime.die_with_parent()
    allocator.keep_freed_memory()
    stop = lifetime.stop_event()
    metrics = Metrics()
    store = Store(RunFolder(config.folder).replay, config.replay.max_bytes, metrics.committed)
    try:
        asyncio.run(_serve(config, store, metrics, stop))
    finally:
        store.close()
    return 0


async def _serve(config: RunConfig, store: Store, metrics: Metrics, stop: lifetime.StopEvent) -> None:
    coordinator = Coordinator(config, store, metrics)
    server = rpc.make_server()
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(coordinator), server)
    replay_pb2_grpc.add_ReplayServiceServicer_to_server(ReplayServicer(coordinator), server)
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(), server)
    await coordinator.open()
    expose(config.security.metrics_host, config.replay.metrics_port, "replay.metrics_port", metrics.registry)
    await rpc.start_server(server, config.replay.listen_address, SERVICES)
    _log.info("serving %s on %s", store.path, config.replay.listen_address)
    serving = asyncio.create_task(coordinator.serve())
    stopping = asyncio.create_task(stop.wait_async())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()  # raises what it died of
    finally:
        coordinator.close()
        await server.stop(_STOP_GRACE_S)
        for task in (serving, stopping):
            task.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
