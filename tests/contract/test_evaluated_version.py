"""`deskrl eval` evaluates the policy version that all its replicas report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from ports_kit import free_ports

from deskrl.analysis.evaluation.evaluation_runner import evaluated_version
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Replica that serves one policy version."""

    def __init__(self, step: int) -> None:
        self._version = common_pb2.PolicyVersion(lineage="initial", step=step)

    def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        """Return the version."""
        return inference_pb2.GetModelInfoResponse(version=self._version)


Serve = Callable[..., RunConfig]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start replicas that serve these versions; returns a configuration with their addresses."""
    servers = []

    def start(*steps: int) -> RunConfig:
        first_port = free_ports(max(1, len(steps)))[0]
        for offset, step in enumerate(steps):
            server = grpc.server(futures.ThreadPoolExecutor(1))
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(Replica(step), server)
            server.add_insecure_port(f"127.0.0.1:{first_port + offset}")
            server.start()
            servers.append(server)
        inference: dict[str, Any] = {"address": f"127.0.0.1:{first_port}", "num_replicas": len(steps)}
        return RunConfig.model_validate({"inference": inference})

    yield start
    for server in servers:
        server.stop(None).wait()


def test_the_evaluated_version_is_the_one_that_all_replicas_serve(serve: Serve) -> None:
    assert evaluated_version(serve(0, 0)) == "initial/0"


def test_replicas_with_different_versions_are_rejected(serve: Serve) -> None:
    with pytest.raises(UserError, match="the replicas serve different policy versions: initial/0, initial/4"):
        evaluated_version(serve(4, 0))


def test_an_external_server_has_no_version(serve: Serve) -> None:
    assert evaluated_version(serve()) is None
