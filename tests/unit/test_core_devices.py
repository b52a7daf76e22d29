"""Each role sees the GPUs that the configuration gives it, and what cannot be is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deskrl.core import devices
from deskrl.core.config import RunConfig, load_config
from deskrl.core.errors import UserError
from deskrl.learner.gpus import refuse_dtype

RUNS = Path(__file__).parents[2] / "deploy" / "runs"


def run(learner: list[int], inference: list[int], **settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "learner": {"devices": learner, "num_processes": settings.pop("num_processes", max(1, len(learner)))},
            "inference": {"devices": inference, "num_replicas": max(1, len(inference)), **settings},
        }
    )


def test_every_replica_has_gpus_of_its_own() -> None:
    config = run([0], [1, 2, 3, 4], num_replicas=2, engine_args={"tensor_parallel_size": 2})
    assert [list(devices.of_replica(config, index)) for index in range(2)] == [[1, 2], [3, 4]]
    assert not list(devices.contradictions(config))


def test_a_process_sees_its_gpus_by_the_names_that_its_parent_has_for_them() -> None:
    assert devices.visible([1, 3], {}) == {"CUDA_VISIBLE_DEVICES": "1,3"}
    assert devices.visible([1], {"CUDA_VISIBLE_DEVICES": "4,6"}) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert devices.visible([], {"CUDA_VISIBLE_DEVICES": "4,6"}) == {}, "what the environment says holds"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (run([0, 1], [2], num_processes=1), "learner.devices names 2 GPUs"),
        (run([0], [1, 2], num_replicas=1), "inference.devices names 2 GPUs"),
        (run([0, 0], [1]), "learner.devices = [0, 0] names a GPU twice"),
        (run([0], [0], weight_transfer="nccl"), "share GPU 0"),
        (run([0], [0], weight_transfer="stream"), "share GPU 0"),
        (run([0], [0], weight_transfer="ipc"), "inference.kv_cache_bytes is not set"),
        (run([0], [1], weight_transfer="ipc"), "all replicas on GPU 0"),
    ],
)
def test_placements_that_cannot_be_are_named(config: RunConfig, reason: str) -> None:
    assert any(reason in contradiction for contradiction in devices.contradictions(config))


@pytest.mark.parametrize("transfer", ["auto", "ipc"])
def test_a_gpu_may_be_shared_where_weights_go_by_ipc(transfer: str) -> None:
    assert not list(devices.contradictions(run([0], [0], weight_transfer=transfer, kv_cache_bytes=2**30)))


@pytest.mark.parametrize(
    ("config", "num_gpus", "reason"),
    [
        (run([0], []), 0, r"learner\.devices = \[0\], and this machine has no GPU"),
        (run([0], [1]), 1, r"inference\.devices = \[1\], and this machine has 1 GPU"),
        (run([], [], weight_transfer="nccl"), 1, "this machine has 1 GPU"),
        (run([], [], weight_transfer="ipc"), 0, "this machine has no GPU"),
    ],
)
def test_gpus_that_are_not_there_are_told_in_one_line(config: RunConfig, num_gpus: int, reason: str) -> None:
    assert devices.are_named(config)
    with pytest.raises(UserError, match=reason):
        devices.refuse_missing(config, num_gpus)
    devices.refuse_missing(config, 2)


@pytest.mark.parametrize("path", sorted(RUNS.glob("h200*.toml")), ids=lambda path: path.stem)
def test_the_shipped_runs_for_gpus_fit_together_and_are_refused_without_them(path: Path) -> None:
    config = load_config(path)
    assert not list(devices.contradictions(config))
    with pytest.raises(UserError, match="this machine has no GPU"):
        devices.refuse_missing(config, 0)


def test_a_run_that_says_nothing_of_gpus_asks_for_none() -> None:
    assert not devices.are_named(RunConfig())
    devices.refuse_missing(RunConfig(), 0)


@pytest.mark.parametrize(
    ("dtype", "capability", "told"),
    [
        ("float16", None, "float16 is for GPUs, and there is none here; set it to float32"),
        (
            "bfloat16",
            (7, 5),
            r"bfloat16, which this GPU \(compute capability 7.5\) has not; set it to float16 or float32",
        ),
        ("float16", (7, 5), None),
        ("float32", (7, 5), None),
        ("bfloat16", (9, 0), None),
        ("bfloat16", None, None),
    ],
)
def test_a_numeric_type_that_a_gpu_has_not_is_refused(
    dtype: str, capability: tuple[int, int] | None, told: str | None
) -> None:
    if told is None:
        refuse_dtype(dtype, capability)
        return
    with pytest.raises(UserError, match=told):
        refuse_dtype(dtype, capability)
