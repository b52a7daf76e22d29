"""What a node of the learner runs, and the first difference between two nodes that must run the same."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from deskrl.core.config import RunConfig, dotted
from deskrl.core.run_dir import RunDir
from deskrl.learner import accelerator
from deskrl.learner.nodes.network_interface import address_towards
from deskrl.models.model_checks import fingerprint_weights

_PACKAGES = ("deskrl", "torch", "deepspeed", "transformers")
"""Packages whose versions decide what ranks send to one another."""
_KEYS_OF_ONE_NODE = (
    "runs",
    "model.path",
    "security.",
    "replay.address",
    "replay.listen_host",
    "replay.folder",
    "inference.address",
    "inference.listen_host",
    "learner.devices",
)
"""Configuration keys, and beginnings of keys, that may differ between nodes: paths, addresses and GPU numbers."""


class Disagreement(NamedTuple):
    """Difference between two nodes of the learner."""

    message: str
    hint: str


@dataclass(frozen=True)
class NodeFacts:
    """What one node runs."""

    host: str
    """Host name."""
    versions: Mapping[str, str]
    """Version of each package that ranks use together."""
    config: Mapping[str, str]
    """Configuration that all nodes must share: JSON of each value by its key."""
    model: str
    """Fingerprint of the initial model."""
    run_id: str
    """Id in the run directory; empty without one."""
    num_gpus: int
    """Number of GPUs that the ranks of the node use."""
    address: str | None = None
    """Address of the node on the network of `learner.master_addr`."""
    process: str = field(default_factory=lambda: secrets.token_hex(8))
    """Random id of the process that joined, by which it recognises itself."""

    def to_json(self) -> str:
        """Return the facts as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeFacts:
        """Return the facts of `to_json`."""
        return cls(**json.loads(text))


def read_facts(config: RunConfig) -> NodeFacts:
    """Return what this machine runs.

    Raises:
        UserError: the model cannot be read.
    """
    learner = config.learner
    values = dotted(config.model_dump(mode="json"))
    return NodeFacts(
        host=socket.gethostname(),
        versions={name: _version(name) for name in _PACKAGES},
        config={key: json.dumps(value) for key, value in values if not key.startswith(_KEYS_OF_ONE_NODE)},
        model=fingerprint_weights(config.model_folder),
        run_id=RunDir(config.run_dir).read_id(),
        num_gpus=min(accelerator.num_gpus(), learner.num_processes),
        address=None if learner.master_addr is None else address_towards(learner.master_addr, learner.master_port),
    )


def find_disagreement(first: NodeFacts, other: NodeFacts, rank: int) -> Disagreement | None:
    """Return the first difference between node 0 and another node that keeps them from training together, or None.

    Args:
        first: facts of node 0.
        other: facts of the other node.
        rank: rank of the other node.
    """
    for what, ours, theirs, hint in _comparisons(first, other):
        if ours != theirs:
            message = f"node {rank} of the learner ({other.host}) has {what} {theirs}, node 0 ({first.host}) has {ours}"
            return Disagreement(message, hint)
    return None


def _comparisons(first: NodeFacts, other: NodeFacts) -> Iterator[tuple[str, object, object, str]]:
    """Yield what is compared: its name, both values, and the hint if they differ."""
    for name in _PACKAGES:
        ours, theirs = first.versions.get(name), other.versions.get(name)
        yield f"{name}", ours, theirs, f"install the same version of {name} on all nodes"
    for key in sorted({*first.config, *other.config}):
        hint = "start all nodes with the same configuration"
        yield f"{key} =", first.config.get(key), other.config.get(key), hint
    yield "model", first.model, other.model, "copy the same model folder to all nodes"
    hint = "set runs to a folder on a disk that all nodes share, and run `deskrl prepare CONFIG`"
    yield "run directory", first.run_id or "none", other.run_id or "none", hint
    yield "number of GPUs", first.num_gpus, other.num_gpus, "use machines with a GPU for each rank, or with none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
