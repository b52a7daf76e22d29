"""Double of the client of ECS: instances are those of `cloud_machines`."""

import json
from types import SimpleNamespace as Record
from typing import Any

import cloud_machines


class Client:
    def __init__(self, config: Any) -> None:
        pass

    def describe_instances(self, request: Any) -> Any:
        found = [_instance(name) for name in json.loads(request.instance_ids) if cloud_machines.exists(name)]
        return Record(body=Record(instances=Record(instance=found)))

    def run_instances(self, request: Any) -> Any:
        name = cloud_machines.create(request.image_id)
        return Record(body=Record(instance_id_sets=Record(instance_id_set=[name])))

    def start_instance(self, request: Any) -> None:
        cloud_machines.start(request.instance_id)

    def delete_instances(self, request: Any) -> None:
        cloud_machines.remove(*request.instance_id)


def _instance(name: str) -> Any:
    addresses = Record(ip_address=[cloud_machines.address(name)])
    return Record(
        status="Running" if cloud_machines.is_running(name) else "Stopped",
        vpc_attributes=Record(private_ip_address=addresses),
        public_ip_address=addresses,
    )
