"""Build hook: generates the gRPC stubs from proto/ so that no generated code is kept in git.

Stubs are tied to the generator's version, so each machine makes its own at install time.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Runs protoc over every contract before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside their `.proto` files."""
        from grpc_tools import protoc

        root = Path(self.root) / "proto"
        sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
        arguments = ["protoc", f"-I{root}", f"--python_out={root}", f"--pyi_out={root}", f"--grpc_python_out={root}"]
        if protoc.main([*arguments, *sources]) != 0:
            raise RuntimeError("protoc refused the contracts in proto/; its message is above")
        build_data["artifacts"] += ["proto/**/*_pb2.py", "proto/**/*_pb2.pyi", "proto/**/*_pb2_grpc.py"]
