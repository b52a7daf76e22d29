"""Environment variables set by other systems under names that engines read: Kubernetes services and job launchers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, MutableMapping

from deskrl.core.errors import UserError

_log = logging.getLogger(__name__)

_ENGINES = "VLLM|MASTER|NCCL|TORCH|RAY"
_SERVICE = re.compile(rf"({_ENGINES})_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_[0-9]+_(TCP|UDP|SCTP)\w*)")
"""Variables that Kubernetes sets in every pod for a Service named like an engine, such as `vllm` or `master`."""
_SERVICE_PORT = re.compile(rf"({_ENGINES})_(\w+_)?PORT")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
_RANK_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"})
_MASTER_VARIABLES = frozenset({"MASTER_ADDR", "MASTER_PORT"})
_TORCHRUN_OPTION = "PET_"
"""Prefix of the variables from which torchrun takes the defaults of its options."""
_RANK_MARK = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun sets for its ranks."""
_ENGINE_PORTS = ("VLLM_PORT", "VLLM_DP_MASTER_PORT", "VLLM_NIXL_SIDE_CHANNEL_PORT")


def drop_foreign_variables(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Remove variables that engines would misread as their own settings; return their names.

    These are the addresses of Kubernetes services, and the ranks and torchrun options of a job launcher (Kubeflow)
    that started this process: deskrl starts its own ranks. A rank that torchrun started keeps its variables.
    """
    foreign = [name for name, value in environment.items() if _is_service(name, value)]
    if _RANK_MARK not in environment:
        launcher = _RANK_VARIABLES | _MASTER_VARIABLES
        foreign += [name for name in environment if name in launcher or name.startswith(_TORCHRUN_OPTION)]
    dropped = sorted(set(foreign))
    for name in dropped:
        del environment[name]
    if dropped:
        _log.warning("ignored environment variables of another system: %s", ", ".join(dropped))
    return dropped


def check_engine_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for a variable that an engine would not accept."""
    for name in _ENGINE_PORTS:
        value = environment.get(name)
        if value is not None and not (re.fullmatch(r"[0-9]{1,5}", value) and 1 <= int(value) <= 65535):
            raise UserError(f"the environment variable {name} is {value!r}, not a port number", f"unset {name}")


def _is_service(name: str, value: str) -> bool:
    is_url = _SERVICE_PORT.fullmatch(name) is not None and _SERVICE_URL.match(value) is not None
    return is_url or _SERVICE.fullmatch(name) is not None
