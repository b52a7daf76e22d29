"""Replay process: opens the store, serves the gRPC services, and shuts down gracefully."""

from __future__ import annotations

import asyncio
import gc
import logging

from deskrl.core import malloc_tuning, process_lifecycle, rpc
from deskrl.core.config import RunConfig
from deskrl.core.metrics_server import serve_metrics
from deskrl.proto.v1 import directory_pb2_grpc, replay_pb2_grpc, rollout_pb2_grpc
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.directory_service import DirectoryServicer
from deskrl.replay.metrics import ReplayMetrics
from deskrl.replay.replay_service import ReplayServicer
from deskrl.replay.rollout_service import RolloutServicer
from deskrl.replay.store import Store
from deskrl.replay.store_folder import open_folder

_log = logging.getLogger(__name__)

SERVICES = tuple(f"deskrl.proto.v1.{name}Service" for name in ("Rollout", "Replay", "Directory"))
_STOP_GRACE_S = 2.0
_TRIM_INTERVAL_S = 10.0
"""Time between two returns of freed memory to the kernel."""


def run(config: RunConfig) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status.

    Raises:
        UserError: the address is in use, or the store is damaged, in use, or not readable by this version; or the
            store is found damaged while it is served.
    """
    process_lifecycle.die_with_parent()
    malloc_tuning.keep_freed_memory()
    malloc_tuning.use_one_arena()
    stop = process_lifecycle.stop_event()
    metrics = ReplayMetrics()
    store = Store(
        open_folder(config),
        config.replay.max_bytes,
        metrics.observe_commit,
        metrics.observe_set_aside,
        config.replay.success_threshold,
    )
    try:
        asyncio.run(_serve(config, store, metrics, stop))
    finally:
        store.close()
    return 0


async def _serve(config: RunConfig, store: Store, metrics: ReplayMetrics, stop: process_lifecycle.StopEvent) -> None:
    coordinator = Coordinator(config, store, metrics)
    server = rpc.make_server()
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(coordinator), server)
    replay_pb2_grpc.add_ReplayServiceServicer_to_server(ReplayServicer(coordinator), server)
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(), server)
    await coordinator.open()
    serve_metrics(config.security.metrics_host, config.replay.metrics_port, "replay.metrics_port", metrics.registry)
    await rpc.start_server(server, config.replay.listen_address, SERVICES)
    _log.info("serving %s on %s", store.path, config.replay.listen_address)
    serving = asyncio.create_task(coordinator.serve())
    stopping = asyncio.create_task(stop.wait_async())
    trimming = asyncio.create_task(_return_freed_memory())
    failing = asyncio.wrap_future(store.failure)
    try:
        await asyncio.wait([serving, stopping, failing], return_when=asyncio.FIRST_COMPLETED)
        for ended in (failing, serving):
            if ended.done():
                ended.result()  # raises the error that ended it
    finally:
        coordinator.close()
        await server.stop(_STOP_GRACE_S)
        for task in (serving, stopping, trimming, failing):
            task.cancel()
        await asyncio.gather(serving, stopping, trimming, failing, return_exceptions=True)


async def _return_freed_memory() -> None:
    """Return freed memory at intervals: kept between two bursts of messages it is useful, kept for hours it is not."""
    gc.freeze()  # what has been imported stays, and need not be visited by each collection
    while True:
        await asyncio.sleep(_TRIM_INTERVAL_S)
        await asyncio.to_thread(malloc_tuning.return_freed_memory)
