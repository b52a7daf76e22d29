"""Double of the client of ECS: instances are those of `cloud_machines`."""

from types import SimpleNamespace as Record
from typing import Any

import cloud_machines


class ECSApi:
    def describe_instances(self, request: Any) -> Any:
        return Record(instances=[_instance(name) for name in request.instance_ids])

    def run_instances(self, request: Any) -> Any:
        return Record(instance_ids=[cloud_machines.create(request.image_id)])

    def start_instance(self, request: Any) -> None:
        cloud_machines.start(*request.instance_ids)

    def delete_instance(self, request: Any) -> None:
        cloud_machines.remove(request.instance_id)


def _instance(name: str) -> Any:
    return Record(
        status="RUNNING" if cloud_machines.is_running(name) else "STOPPED",
        eip_address=Record(ip_address=""),
        network_interfaces=[Record(primary_ip_address=cloud_machines.address(name))],
    )
