"""Which policy version `deskrl eval` evaluates: that which its replicas tell. Against doubles that tell one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from ports_kit import free_ports

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.evaluation.play import served_version
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Serves a step of one lineage."""

    def __init__(self, step: int) -> None:
        self._version = common_pb2.PolicyVersion(lineage="initial", step=step)

    def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        """Tell it."""
        return inference_pb2.GetModelInfoResponse(version=self._version)


Serve = Callable[..., RunConfig]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Replicas that serve these steps, and the configuration that names them."""
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


def test_it_is_what_all_replicas_serve(serve: Serve) -> None:
    assert served_version(serve(0, 0)) == "initial/0"


def test_replicas_of_several_versions_are_no_one_policy(serve: Serve) -> None:
    with pytest.raises(UserError, match="the replicas serve initial/0, initial/4: no one policy; end what else"):
        served_version(serve(4, 0))


def test_somebody_elses_server_tells_none(serve: Serve) -> None:
    assert served_version(serve()) is None
