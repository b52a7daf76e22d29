"""Weight staging: an update is used only if it matches its announcement and the model."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from deskrl.core.errors import UserError
from deskrl.inference.weight_staging import (
    StagingFile,
    TransferResult,
    UpdateRejected,
    check_announcement,
    checkpoint_shapes,
    merge_results,
    mismatched_tensors,
    vision_changed,
)
from deskrl.proto.v1 import weights_pb2

A = struct.pack("<6f", *range(6))
B = struct.pack("<2f", 7, 8)
SHAPES = {"model.a": (2, 3), "visual.b": (2,)}


def spec(name: str, data: bytes, shape: tuple[int, ...], dtype: str = "float32") -> weights_pb2.TensorSpec:
    checksum = hashlib.sha256(data).hexdigest()
    return weights_pb2.TensorSpec(name=name, dtype=dtype, shape=shape, checksum=checksum, num_bytes=len(data))


TENSORS = [spec("model.a", A, (2, 3)), spec("visual.b", B, (2,))]


@pytest.fixture
def file() -> Iterator[StagingFile]:
    with closing(StagingFile(TENSORS)) as opened:
        yield opened


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_chunks_of_any_size_form_one_safetensors_file(file: StagingFile, size: int) -> None:
    data = A + B
    for start in range(0, len(data), size):
        file.write(data[start : start + size])
    with safe_open(file.path, framework="numpy") as opened:
        assert opened.get_tensor("model.a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert opened.get_tensor("visual.b").tolist() == [7, 8]


def test_an_empty_tensor_is_written() -> None:
    with closing(StagingFile([spec("empty", b"", (0,)), *TENSORS])) as file:
        file.write(A + B)
        with safe_open(file.path, framework="numpy") as opened:
            assert set(opened.keys()) == {"empty", "model.a", "visual.b"}


def test_a_wrong_byte_is_detected_at_the_end_of_its_tensor(file: StagingFile) -> None:
    file.write(A[:-1])
    with pytest.raises(UpdateRejected, match=r"model\.a: the checksum differs"):
        file.write(b"\xff")


def test_excess_bytes_are_rejected(file: StagingFile) -> None:
    with pytest.raises(UpdateRejected, match="3 bytes more than announced"):
        file.write(A + B + b"xyz")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (TENSORS[:1], "missing"),
        ([*TENSORS, spec("c", B, (2,))], "unknown"),
        ([*TENSORS, TENSORS[0]], "duplicate"),
        ([spec("model.a", A, (3, 2)), TENSORS[1]], "shape"),
        ([spec("model.a", A, (2, 3), "int8"), TENSORS[1]], "dtype"),
        ([spec("model.a", A[:4], (2, 3)), TENSORS[1]], "4 bytes"),
    ],
)
def test_tensors_that_differ_from_those_of_the_model_are_rejected(
    tensors: list[weights_pb2.TensorSpec], reason: str
) -> None:
    with pytest.raises(UpdateRejected, match=reason):
        check_announcement(tensors, SHAPES)


def test_tensors_may_have_another_precision_than_the_model() -> None:
    check_announcement([spec("model.a", A[:12], (2, 3), "bfloat16"), TENSORS[1]], SHAPES)


def test_vision_has_changed_only_if_a_vision_tensor_has_changed() -> None:
    checksums = {tensor.name: tensor.checksum for tensor in TENSORS}
    assert vision_changed(None, checksums), "the checksums of the initial weights are unknown"
    assert not vision_changed(checksums | {"model.a": "another"}, checksums)
    assert vision_changed(checksums | {"visual.b": "another"}, checksums)


def test_tensors_with_differing_checksums_are_named() -> None:
    assert mismatched_tensors(["a", "b", "c"], [1, 2, 3], [1, 2, 3]) == []
    assert mismatched_tensors(["a", "b", "c"], [1, 2, 3], [1, 9, 3]) == ["b"]
    assert mismatched_tensors(["a", "b"], [1], [1, 2]) == ["a", "b"], "all tensors, because a checksum is missing"


def test_an_error_results_unless_all_workers_received_the_same_bytes() -> None:
    whole = {"checksums": [1, 2], "num_loaded": 3}
    assert merge_results([whole, whole]) == TransferResult([1, 2], "", is_model_modified=True)
    assert merge_results([whole, {"checksums": [1, 3], "num_loaded": 3}]).error
    stalled = {"error": "WaitFailed: bucket 0 of 9", "num_loaded": 0}
    assert merge_results([stalled]) == TransferResult((), "WaitFailed: bucket 0 of 9", is_model_modified=False)
    assert merge_results([stalled, whole]).is_model_modified


def test_names_and_shapes_are_read_from_all_files_of_a_checkpoint(tmp_path: Path) -> None:
    import numpy as np

    save_file({"model.a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"visual.b": np.zeros(2, np.float32)}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_shapes(tmp_path) == SHAPES


@pytest.mark.parametrize("damage", [None, b"", b"\x10\0\0\0\0\0\0\0{"], ids=["missing", "empty", "truncated"])
def test_a_folder_without_readable_weights_is_rejected(tmp_path: Path, damage: bytes | None) -> None:
    if damage is not None:
        (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(UserError):
        checkpoint_shapes(tmp_path)
