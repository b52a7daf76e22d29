"""Double of boto3: EC2's instances are those of `cloud_machines`; other services do not exist."""

from typing import Any

import cloud_machines
from botocore.exceptions import ClientError


class _Ec2:
    def describe_instances(self, InstanceIds: list[str]) -> dict[str, Any]:
        (name,) = InstanceIds
        if not cloud_machines.exists(name):
            raise ClientError(f"no instance {name}")
        instance = {
            "State": {"Name": "running" if cloud_machines.is_running(name) else "stopped"},
            "PrivateIpAddress": cloud_machines.address(name),
            "SecurityGroups": [{"GroupId": "sg-1"}],
            "SubnetId": "subnet-1",
            "InstanceType": "t3.medium",
        }
        return {"Reservations": [{"Instances": [instance]}]}

    def run_instances(self, ImageId: str, **_: Any) -> dict[str, Any]:
        return {"Instances": [{"InstanceId": cloud_machines.create(ImageId)}]}

    def start_instances(self, InstanceIds: list[str]) -> None:
        cloud_machines.start(*InstanceIds)

    def terminate_instances(self, InstanceIds: list[str]) -> None:
        cloud_machines.remove(*InstanceIds)

    def get_waiter(self, _: str) -> Any:
        return self

    def wait(self, **_: Any) -> None:
        return


def client(service: str, region_name: str | None = None) -> Any:
    """Return the client of a service."""
    if service != "ec2":
        raise ClientError(f"the double has no service {service}")
    return _Ec2()
