"""Double of desktop-env's factory of providers, whose machines are those of `cloud_machines`.

FAKE_CLOUD_FAULT names a method that raises, or `hang-METHOD` one that takes 2 seconds. Unlike desktop-env's, it has no
handler of signals of its own.
"""

import os
import time
from pathlib import Path
from typing import Any

import cloud_machines


def create_vm_manager_and_provider(provider_name: str, region: str, use_proxy: bool = False) -> tuple[Any, Any]:
    """Return the manager and the provider of a cloud that creates machines."""
    if provider_name == "aliyun":
        raise OSError("ALIYUN_REGION must be set in the environment variables.")
    return _Manager(), CloudProvider()


def _disturb(method: str) -> None:
    fault = os.environ.get("FAKE_CLOUD_FAULT", "")
    if fault == method:
        raise RuntimeError(f"the cloud's answer\nto {method}")
    if fault == f"hang-{method}":
        cloud_machines.log("hang", method)
        time.sleep(2)


class _Manager:
    def get_vm_path(self, os_type: str, screen_size: tuple[int, int], region: str = "") -> str:
        machine = cloud_machines.create(f"{region}-{screen_size[0]}x{screen_size[1]}")
        _disturb("get_vm_path")
        return machine


class CloudProvider:
    def __init__(self, region: str | None = None) -> None:
        pass

    def start_emulator(self, path_to_vm: str, headless: bool, os_type: str) -> None:
        _disturb("start_emulator")
        cloud_machines.start(Path(path_to_vm).stem)

    def get_ip_address(self, path_to_vm: str) -> str:
        print("output of a provider")
        return cloud_machines.address(Path(path_to_vm).stem)

    def revert_to_snapshot(self, path_to_vm: str, snapshot_name: str) -> str | None:
        if path_to_vm.endswith(".vbox"):
            cloud_machines.revert(Path(path_to_vm).stem, snapshot_name)
            return None
        cloud_machines.remove(path_to_vm)
        machine = cloud_machines.create(snapshot_name)
        _disturb("revert_to_snapshot")
        return machine

    def stop_emulator(self, path_to_vm: str) -> None:
        _disturb("stop_emulator")
        if path_to_vm.endswith(".vbox"):
            cloud_machines.stop(Path(path_to_vm).stem)
        else:
            cloud_machines.remove(path_to_vm)
