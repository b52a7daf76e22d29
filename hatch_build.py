"""Build hook that generates the gRPC stubs from proto/ at install time.

Stubs depend on the version of the generator, so they are not kept in git.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Runs protoc on every .proto file before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` next to the .proto files."""
        from grpc_tools import protoc

        root = Path(self.root) / "proto"
        sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
        arguments = ["protoc", f"-I{root}", f"--python_out={root}", f"--pyi_out={root}", f"--grpc_python_out={root}"]
        if protoc.main([*arguments, *sources]) != 0:
            raise RuntimeError("protoc failed on the files in proto/; see its output above")
        build_data["artifacts"] += ["proto/**/*_pb2.py", "proto/**/*_pb2.pyi", "proto/**/*_pb2_grpc.py"]
