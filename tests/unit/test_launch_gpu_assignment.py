"""Assignment of GPUs to roles, and rejection of assignments that a machine cannot satisfy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deskrl.core.config import RunConfig, load_config
from deskrl.core.errors import UserError
from deskrl.launch import gpu_assignment
from deskrl.learner.accelerator import check_dtype

RUNS = Path(__file__).parents[2] / "deploy" / "runs"


def run(learner: list[int], inference: list[int], **settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "learner": {"devices": learner, "num_processes": settings.pop("num_processes", max(1, len(learner)))},
            "inference": {"devices": inference, "num_replicas": max(1, len(inference)), **settings},
        }
    )


def test_every_replica_gets_its_own_gpus() -> None:
    config = run([0], [1, 2, 3, 4], num_replicas=2, engine_args={"tensor_parallel_size": 2})
    assert [list(gpu_assignment.of_replica(config, index)) for index in range(2)] == [[1, 2], [3, 4]]
    assert not list(gpu_assignment.contradictions(config))


def test_gpus_are_numbered_among_those_that_the_parent_process_sees() -> None:
    assert gpu_assignment.visible([1, 3], {}) == {"CUDA_VISIBLE_DEVICES": "1,3"}
    assert gpu_assignment.visible([1], {"CUDA_VISIBLE_DEVICES": "4,6"}) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert gpu_assignment.visible([], {"CUDA_VISIBLE_DEVICES": "4,6"}) == {}, "without devices, the environment is kept"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (run([0, 1], [2], num_processes=1), "learner.devices names 2 GPUs"),
        (run([0], [1, 2], num_replicas=1), "inference.devices names 2 GPUs"),
        (run([0, 0], [1]), "learner.devices = [0, 0] names a GPU twice"),
        (run([0], [0], weight_transfer="nccl"), "share GPU 0"),
        (run([0], [0], weight_transfer="stream"), "share GPU 0"),
        (run([0], [0], weight_transfer="ipc"), "which needs inference.kv_cache_bytes"),
        (run([0], [1], weight_transfer="ipc"), "needs all replicas on GPU 0"),
    ],
)
def test_contradicting_gpu_settings_are_reported(config: RunConfig, reason: str) -> None:
    assert any(reason in contradiction for contradiction in gpu_assignment.contradictions(config))


@pytest.mark.parametrize("transfer", ["auto", "ipc"])
def test_learner_and_replica_may_share_a_gpu_with_ipc_transfer(transfer: str) -> None:
    assert not list(gpu_assignment.contradictions(run([0], [0], weight_transfer=transfer, kv_cache_bytes=2**30)))


@pytest.mark.parametrize(
    ("config", "num_gpus", "reason"),
    [
        (run([0], []), 0, r"learner\.devices = \[0\], but this machine has no GPU"),
        (run([0], [1]), 1, r"inference\.devices = \[1\], but this machine has 1 GPU"),
        (run([], [], weight_transfer="nccl"), 1, "this machine has 1 GPU"),
        (run([], [], weight_transfer="ipc"), 0, "this machine has no GPU"),
    ],
)
def test_a_missing_gpu_is_reported_in_one_line(config: RunConfig, num_gpus: int, reason: str) -> None:
    assert gpu_assignment.needs_gpus(config)
    with pytest.raises(UserError, match=reason):
        gpu_assignment.check_gpus_exist(config, num_gpus)
    gpu_assignment.check_gpus_exist(config, 2)


@pytest.mark.parametrize("path", sorted(RUNS.glob("h200*.toml")), ids=lambda path: path.stem)
def test_shipped_gpu_configurations_are_consistent_and_rejected_without_gpus(path: Path) -> None:
    config = load_config(path)
    assert not list(gpu_assignment.contradictions(config))
    with pytest.raises(UserError, match="this machine has no GPU"):
        gpu_assignment.check_gpus_exist(config, 0)


def test_a_run_without_gpu_settings_needs_no_gpu() -> None:
    assert not gpu_assignment.needs_gpus(RunConfig())
    gpu_assignment.check_gpus_exist(RunConfig(), 0)


@pytest.mark.parametrize(
    ("dtype", "capability", "told"),
    [
        ("float16", None, r"float16 needs a GPU, but none was found \(hint: set it to float32\)"),
        (
            "bfloat16",
            (7, 5),
            r"bfloat16 is not supported by this GPU \(compute capability 7.5\) \(hint: set it to float16 or float32\)",
        ),
        ("float16", (7, 5), None),
        ("float32", (7, 5), None),
        ("bfloat16", (9, 0), None),
        ("bfloat16", None, None),
    ],
)
def test_a_dtype_that_the_gpu_does_not_support_is_rejected(
    dtype: str, capability: tuple[int, int] | None, told: str | None
) -> None:
    if told is None:
        check_dtype(dtype, capability)
        return
    with pytest.raises(UserError, match=told):
        check_dtype(dtype, capability)
