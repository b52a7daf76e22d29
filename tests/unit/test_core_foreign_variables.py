"""Environment variables that engines would misread: which are dropped, kept or rejected."""

from __future__ import annotations

import pytest

from deskrl.core.errors import UserError
from deskrl.core.foreign_variables import check_engine_variables, drop_foreign_variables

KUBERNETES = {
    "VLLM_PORT": "tcp://10.96.3.7:8000",
    "VLLM_SERVICE_HOST": "10.96.3.7",
    "VLLM_SERVICE_PORT": "8000",
    "VLLM_SERVICE_PORT_HTTP": "8000",
    "VLLM_PORT_8000_TCP": "tcp://10.96.3.7:8000",
    "VLLM_PORT_8000_TCP_PROTO": "tcp",
    "VLLM_PORT_8000_TCP_ADDR": "10.96.3.7",
    "VLLM_ROUTER_PORT": "tcp://10.96.3.8:80",
    "VLLM_ROUTER_SERVICE_HOST": "10.96.3.8",
    "MASTER_PORT_29500_TCP": "tcp://10.96.3.9:29500",
    "MASTER_SERVICE_HOST": "10.96.3.9",
}
"""Variables of Services named vllm, vllm-router and master."""
LAUNCHER = {
    **{"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
    **{"PET_NNODES": "4", "PET_MASTER_ADDR": "job-master-0", "PET_RDZV_BACKEND": "c10d"},
}
"""Variables that Kubeflow's PyTorchJob sets."""
OWN = {
    **{"VLLM_PORT": "8123", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_KVCACHE_SPACE": "4", "NCCL_SOCKET_IFNAME": "eth0"},
    **{"KUBERNETES_SERVICE_HOST": "10.96.0.1", "REPLAY_PORT": "tcp://10.0.0.1:1", "http_proxy": "http://proxy:3128"},
    **{"PETS": "2", "DESKRL_SEED": "3", "SLURM_PROCID": "0"},
}


def test_variables_of_kubernetes_services_are_dropped() -> None:
    environment = KUBERNETES | OWN | {"VLLM_PORT": KUBERNETES["VLLM_PORT"]}
    assert drop_foreign_variables(environment) == sorted(KUBERNETES)
    assert environment == {name: value for name, value in OWN.items() if name != "VLLM_PORT"}


def test_variables_that_the_user_sets_for_engines_are_kept() -> None:
    environment = dict(OWN)
    assert drop_foreign_variables(environment) == []
    assert environment == OWN
    check_engine_variables(environment)


def test_ranks_of_a_job_launcher_are_dropped() -> None:
    environment = LAUNCHER | OWN
    assert drop_foreign_variables(environment) == sorted(LAUNCHER)


def test_a_rank_that_torchrun_started_keeps_its_variables() -> None:
    environment = LAUNCHER | {"TORCHELASTIC_RUN_ID": "none"}
    assert drop_foreign_variables(environment) == []
    assert environment["RANK"] == "1"


@pytest.mark.parametrize("value", ["http://vllm:8000", "0", "65536", "eight", "", "8000 "])
def test_a_port_that_the_engine_would_not_accept_is_rejected_by_name(value: str) -> None:
    with pytest.raises(UserError, match=r"VLLM_PORT is .*, not a port number .hint: unset VLLM_PORT"):
        check_engine_variables({"VLLM_PORT": value})
