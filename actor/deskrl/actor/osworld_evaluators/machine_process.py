"""Machine process: one call of desktop-env's manager and provider of virtual machines, in that package's environment.

Reads one line of JSON from standard input and writes one line to standard output:

    {"provider": "aws", "region": "us-east-1", "operation": "revert", "machine": "i-1", "snapshot": "ami-2",
     "screen_size": [1920, 1080]}
    {"machine": "i-3"}  or  {"missing_module": "boto3"}  or  {"fault": "reason"}

| operation | calls | response |
| --- | --- | --- |
| check | the constructors of manager and provider | `{}` |
| create | `get_vm_path` | `machine` |
| start | `start_emulator`, `get_ip_address` | `machine`, `address` of the guest server |
| revert | `revert_to_snapshot` | `machine`, possibly another one |
| stop | `stop_emulator` | `{}` |

This file is started by its path and imports nothing from deskrl. SIGTERM, which also comes when the actor has ended,
must leave no machine behind whose name nobody knows: `create` and `revert` then finish, within 5 minutes, stop the
machine and respond `{"stopped": true}`. (While a cloud creates a machine, desktop-env's own handler terminates it.)
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_FINISH_TIMEOUT_S = 300
_GUEST_PORT = 5000
_MAX_FAULT_CHARACTERS = 500
_OS_TYPE = "Ubuntu"
_PROVIDERS_OF_LISTED_MACHINES = {"azure": "AzureProvider", "virtualbox": "VirtualBoxProvider"}

_is_terminated = False


def main() -> None:
    """Respond to one request."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of providers must not mix with the response
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    request = json.loads(sys.stdin.readline())
    if request["operation"] in ("create", "revert"):
        signal.signal(signal.SIGTERM, _terminate_later)
    try:
        response = _respond(request)
    except ImportError as error:
        response = {"missing_module": error.name or str(error)}
    except Exception as error:  # the providers raise whatever their clouds' packages raise
        text = " ".join(str(error).split()) or "no message"
        response = {"fault": f"{type(error).__name__}: {text}"[:_MAX_FAULT_CHARACTERS]}
    try:
        responses.write(json.dumps(response) + "\n")
        responses.flush()
    except BrokenPipeError:  # the actor has ended
        os._exit(1)


def _terminate_later(_signal: int, _frame: Any) -> None:
    global _is_terminated
    _is_terminated = True
    signal.alarm(_FINISH_TIMEOUT_S)


def _respond(request: dict[str, Any]) -> dict[str, Any]:
    region, machine = request["region"] or None, request["machine"]
    manager, provider = _manager_and_provider(request["provider"], region)
    match request["operation"]:
        case "create":
            size = tuple(request["screen_size"])
            regions = {"region": region} if region else {}
            return _created(provider, manager.get_vm_path(os_type=_OS_TYPE, screen_size=size, **regions))
        case "start":
            provider.start_emulator(machine, True, _OS_TYPE)
            host, *ports = provider.get_ip_address(machine).split(":")
            if not host:
                raise RuntimeError(f"{machine} has no address")
            return {"machine": machine, "address": [host, int(ports[0]) if ports else _GUEST_PORT]}
        case "revert":
            return _created(provider, provider.revert_to_snapshot(machine, request["snapshot"]) or machine)
        case "stop":
            provider.stop_emulator(machine)
    return {}


def _manager_and_provider(name: str, region: str | None) -> tuple[Any, Any]:
    """Return the objects of desktop-env's factory; without a manager for providers that create no machines.

    The manager of Azure has an abstract method, so that the factory raises TypeError.
    """
    if name in _PROVIDERS_OF_LISTED_MACHINES:
        module = importlib.import_module(f"desktop_env.providers.{name}.provider")
        return None, getattr(module, _PROVIDERS_OF_LISTED_MACHINES[name])(region)
    from desktop_env.providers import create_vm_manager_and_provider

    manager_and_provider: tuple[Any, Any] = create_vm_manager_and_provider(name, region)
    return manager_and_provider


def _created(provider: Any, machine: str) -> dict[str, Any]:
    """Return the response with a machine that nobody else knows yet."""
    if not _is_terminated:
        return {"machine": machine}
    provider.stop_emulator(machine)
    return {"stopped": True}


if __name__ == "__main__":
    main()
