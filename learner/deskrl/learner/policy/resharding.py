"""Engine state of a checkpoint for another number of ranks: divides DeepSpeed's files of ZeRO 1 to 3 anew.

DeepSpeed itself restores the state of as many ranks as have written it only; its universal checkpoints would have to be
converted by a program of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_FILE = "mp_rank_00_model_states.pt"
_RANK_MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
"""With ZeRO 3, where each rank has one."""


class Sharding(NamedTuple):
    """How flat tensors of the optimizer are divided over ranks."""

    pieces: Sequence[Sequence[int]]
    """Numbers of elements of each flat tensor's pieces, each of which is divided by itself: with ZeRO 1 and 2 a whole
    parameter group, with ZeRO 3 each parameter."""
    alignment: int
    """Factor of the size of a shard: 2 with ZeRO 1 and 2, 1 with ZeRO 3."""

    def shard_size(self, num_elements: int, num_ranks: int) -> int:
        """Return the number of elements of a piece that a rank holds, including padding at the end."""
        return self.alignment * -(-num_elements // (self.alignment * num_ranks))


def num_shards(folder: Path) -> int:
    """Return for how many ranks the state in a folder of DeepSpeed is divided; 0 if it is not divided (ZeRO 0)."""
    return len(_optimizer_files(folder))


def write_resharded(source: Path, target: Path, rank: int, num_ranks: int, sharding: Sharding) -> None:
    """Write the files of one rank of a world of another size than the one that has written a state.

    Args:
        source: folder of DeepSpeed with the state.
        target: folder for the files.
        rank: rank that the files are for.
        num_ranks: number of ranks of its world.
        sharding: how the optimizer divides its tensors.
    """
    files = _optimizer_files(source)
    contents = [_read(files[old]) for old in range(len(files))]
    # The tensors that are not read stay on the disk.
    resharded = _resharded(contents, lambda shards, index: reshard(shards, sharding, index, rank, num_ranks))
    resharded["partition_count"] = num_ranks
    prefix = "bf16_" if files[0].name.startswith("bf16_") else ""
    content = {**contents[0], "optimizer_state_dict": resharded}
    torch.save(content, target / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    has_file_of_each_rank = (source / _RANK_MODEL_FILE.format(0)).exists()
    if rank == 0 or has_file_of_each_rank:
        names = [name.format(0) for name in (_RANK_MODEL_FILE, _MODEL_FILE) if (source / name.format(0)).exists()]
        own = _RANK_MODEL_FILE.format(rank) if has_file_of_each_rank else _MODEL_FILE
        torch.save({**_read(source / names[0]), "dp_world_size": num_ranks}, target / own)


def reshard(shards: Sequence[Tensor], sharding: Sharding, index: int, rank: int, num_ranks: int) -> Tensor:
    """Return a rank's shard of a flat tensor.

    Args:
        shards: shards of all ranks that have written it.
        sharding: how flat tensors are divided.
        index: index of the flat tensor in `sharding`.
        rank: rank whose shard is returned.
        num_ranks: number of ranks of its world.
    """
    pieces = sharding.pieces[index]
    own = torch.zeros(sum(sharding.shard_size(size, num_ranks) for size in pieces), dtype=shards[0].dtype)
    own_start = old_start = 0
    for size in pieces:
        own_size, old_size = sharding.shard_size(size, num_ranks), sharding.shard_size(size, len(shards))
        position, end = rank * own_size, min((rank + 1) * own_size, size)
        while position < end:
            old, offset = divmod(position, old_size)
            length = min(end - position, old_size - offset)
            to = own_start + position - rank * own_size
            own[to : to + length] = shards[old].narrow(0, old_start + offset, length)
            position += length
        own_start, old_start = own_start + own_size, old_start + old_size
    return own


def _resharded(contents: Sequence[Mapping[str, Any]], reshard_one: Callable[[list[Tensor], int], Tensor]) -> Any:
    """Return the optimizer's part of a file; `reshard_one` gets all shards of a flat tensor, and the tensor's index."""
    states = [content["optimizer_state_dict"] for content in contents]
    weights = "single_partition_of_fp32_groups" if "base_optimizer_state" in states[0] else "fp32_flat_groups"
    base = "base_optimizer_state" if "base_optimizer_state" in states[0] else "optimizer_state_dict"
    result = dict(states[0])
    if states[0][weights]:  # there are none with an adapter
        masters = [_padded(state, weights) for state in states]
        result[weights] = [reshard_one(list(shards), index) for index, shards in enumerate(zip(*masters, strict=True))]
    result[base] = {**states[0][base], "state": {}}
    for index, number in enumerate(states[0][base]["state"]):
        moments = [state[base]["state"][number] for state in states]
        result[base]["state"][number] = {
            key: reshard_one([moment[key] for moment in moments], index) if _is_sharded(value) else value
            for key, value in moments[0].items()
        }
    if "group_paddings" in result:
        result["group_paddings"] = [0] * len(result["group_paddings"])  # `result` holds whole shards
    return result


def _padded(state: Mapping[str, Any], weights: str) -> list[Tensor]:
    """Return a rank's master weights, with the padding that ZeRO 1 and 2 do not write."""
    paddings = state.get("group_paddings", [0] * len(state[weights]))
    return [
        torch.nn.functional.pad(weight, (0, padding)) if padding else weight
        for weight, padding in zip(state[weights], paddings, strict=True)
    ]


def _is_sharded(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def _optimizer_files(folder: Path) -> dict[int, Path]:
    return dict(_numbered(folder))


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if found := _OPTIMIZER_FILE.fullmatch(path.name):
            yield int(found[2]), path


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content
