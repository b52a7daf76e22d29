"""Prometheus endpoint of a role."""

from __future__ import annotations

import socket

import pytest
from ports_kit import free_port
from prometheus_client import CollectorRegistry

from deskrl.analysis.top import scrape as scrape_module
from deskrl.core import rpc
from deskrl.core.errors import UserError
from deskrl.core.metrics_server import serve_metrics
from deskrl.core.run_identity import RunIdentity


def test_the_error_for_a_port_in_use_names_its_configuration_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"learner.metrics_port: cannot listen on 127.0.0.1:{port}") as refusal:
            serve_metrics("127.0.0.1", port, "learner.metrics_port")
    assert refusal.value.hint == "set learner.metrics_port to a free port"


def test_metrics_name_the_run_of_their_process() -> None:
    registry, port = CollectorRegistry(), free_port()
    run = RunIdentity("mine", "a" * 32, "machine")
    rpc.set_run(run)
    try:
        serve_metrics("127.0.0.1", port, "learner.metrics_port", registry)
    finally:
        rpc.set_run(None)
    (scrape,) = scrape_module.read_all([f"127.0.0.1:{port}"]).values()
    assert scrape_module.is_of_run(scrape, run)
    assert not scrape_module.is_of_run(scrape, RunIdentity("mine", "b" * 32, "machine"))
    assert scrape_module.is_of_run({}, run), "a process of an older version names no run"
