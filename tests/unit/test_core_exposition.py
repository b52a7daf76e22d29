"""What a role shows of itself to Prometheus."""

from __future__ import annotations

import socket

import pytest

from deskrl.core.errors import UserError
from deskrl.core.exposition import expose


def test_a_taken_port_is_refused_with_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"metrics port 127.0.0.1:{port} cannot be listened on") as refusal:
            expose("127.0.0.1", port, "learner.metrics_port")
    assert refusal.value.mend == "set learner.metrics_port to a free port"
