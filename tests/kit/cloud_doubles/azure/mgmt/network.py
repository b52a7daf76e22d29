"""Double of azure-mgmt-network: an interface and its public address have the name of their machine."""

from types import SimpleNamespace as Record
from typing import Any

import cloud_machines


class _Interfaces:
    def get(self, group: str, name: str) -> Any:
        return Record(ip_configurations=[Record(public_ip_address=Record(id=f"/addresses/{name}"))])


class _Addresses:
    def get(self, group: str, name: str) -> Any:
        return Record(ip_address=cloud_machines.address(name))


class NetworkManagementClient:
    def __init__(self, credential: object, subscription: str) -> None:
        self.network_interfaces, self.public_ip_addresses = _Interfaces(), _Addresses()
