"""Double of azure-mgmt-compute: machines are those of `cloud_machines`, and disks exist until they are deleted."""

from types import SimpleNamespace as Record
from typing import Any

import cloud_machines
from azure.core.exceptions import ResourceNotFoundError


class _Finished:
    def __init__(self, value: Any = None) -> None:
        self._value = value

    def wait(self, timeout: float = 0) -> None:
        return

    def result(self) -> Any:
        return self._value


class _Machines:
    def get(self, group: str, name: str, expand: str = "") -> Any:
        state = "running" if cloud_machines.is_running(name) else "deallocated"
        return Record(
            location="here",
            zones=None,
            instance_view=Record(statuses=[Record(code=f"PowerState/{state}")]),
            network_profile=Record(
                network_interfaces=[Record(id=f"/subscriptions/s/resourceGroups/{group}/x/y/{name}")]
            ),
            storage_profile=Record(
                os_disk=Record(create_option="FromImage", managed_disk=Record(id=f"/disks/{name}-disk0")), data_disks=[]
            ),
        )

    def begin_start(self, group: str, name: str) -> _Finished:
        cloud_machines.start(name)
        return _Finished()

    def begin_deallocate(self, group: str, name: str) -> _Finished:
        cloud_machines.stop(name)
        return _Finished()

    def begin_create_or_update(self, group: str, name: str, machine: Any) -> _Finished:
        cloud_machines.revert(name, machine.storage_profile.os_disk["managed_disk"]["id"])
        return _Finished()


class _Disks:
    def begin_delete(self, group: str, name: str) -> _Finished:
        return _Finished()

    def get(self, group: str, name: str) -> Any:
        raise ResourceNotFoundError(name)

    def begin_create_or_update(self, group: str, name: str, disk: Any) -> _Finished:
        return _Finished(Record(id=disk["creation_data"]["source_resource_id"]))


class _Snapshots:
    def get(self, group: str, name: str) -> Any:
        return Record(location="here", id=name)


class ComputeManagementClient:
    def __init__(self, credential: object, subscription: str) -> None:
        self.virtual_machines, self.disks, self.snapshots = _Machines(), _Disks(), _Snapshots()
