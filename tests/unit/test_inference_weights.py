"""What arrives of a weight update is what was announced, or nothing of it is used."""

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
from deskrl.inference.weights import (
    Received,
    UpdateRefused,
    WeightFile,
    check_announcement,
    checkpoint_shapes,
    differing,
    merge_received,
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
def file() -> Iterator[WeightFile]:
    with closing(WeightFile(TENSORS)) as opened:
        yield opened


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_chunks_cut_anywhere_make_one_safetensors_file(file: WeightFile, size: int) -> None:
    data = A + B
    for start in range(0, len(data), size):
        file.write(data[start : start + size])
    with safe_open(file.path, framework="numpy") as opened:
        assert opened.get_tensor("model.a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert opened.get_tensor("visual.b").tolist() == [7, 8]


def test_a_tensor_without_elements_is_one_too() -> None:
    with closing(WeightFile([spec("empty", b"", (0,)), *TENSORS])) as file:
        file.write(A + B)
        with safe_open(file.path, framework="numpy") as opened:
            assert set(opened.keys()) == {"empty", "model.a", "visual.b"}


def test_a_wrong_byte_is_found_at_the_end_of_its_tensor(file: WeightFile) -> None:
    file.write(A[:-1])
    with pytest.raises(UpdateRefused, match=r"the checksum of model\.a differs"):
        file.write(b"\xff")


def test_bytes_too_many_are_refused(file: WeightFile) -> None:
    with pytest.raises(UpdateRefused, match="3 bytes more than announced"):
        file.write(A + B + b"xyz")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (TENSORS[:1], "missing"),
        ([*TENSORS, spec("c", B, (2,))], "unknown"),
        ([*TENSORS, TENSORS[0]], "twice"),
        ([spec("model.a", A, (3, 2)), TENSORS[1]], "shape"),
        ([spec("model.a", A, (2, 3), "int8"), TENSORS[1]], "dtype"),
        ([spec("model.a", A[:4], (2, 3)), TENSORS[1]], "4 bytes"),
    ],
)
def test_other_tensors_than_the_models_are_refused(tensors: list[weights_pb2.TensorSpec], reason: str) -> None:
    with pytest.raises(UpdateRefused, match=reason):
        check_announcement(tensors, SHAPES)


def test_the_models_tensors_may_come_in_another_precision() -> None:
    check_announcement([spec("model.a", A[:12], (2, 3), "bfloat16"), TENSORS[1]], SHAPES)


def test_only_a_changed_vision_tensor_changes_vision() -> None:
    checksums = {tensor.name: tensor.checksum for tensor in TENSORS}
    assert vision_changed(None, checksums), "nothing is known of the weights that the engine started with"
    assert not vision_changed(checksums | {"model.a": "another"}, checksums)
    assert vision_changed(checksums | {"visual.b": "another"}, checksums)


def test_tensors_that_arrived_otherwise_than_they_were_sent_are_named() -> None:
    assert differing(["a", "b", "c"], [1, 2, 3], [1, 2, 3]) == []
    assert differing(["a", "b", "c"], [1, 2, 3], [1, 9, 3]) == ["b"]
    assert differing(["a", "b"], [1], [1, 2]) == ["a", "b"], "one that was never told of proves nothing"


def test_workers_of_one_engine_must_have_received_the_same() -> None:
    whole = {"checksums": [1, 2], "placed": 3}
    assert merge_received([whole, whole]) == Received([1, 2], "", touched=True)
    assert merge_received([whole, {"checksums": [1, 3], "placed": 3}]).error
    stalled = {"error": "GaveUp: bucket 0 of 9", "placed": 0}
    assert merge_received([stalled]) == Received((), "GaveUp: bucket 0 of 9", touched=False)
    assert merge_received([stalled, whole]).touched


def test_names_and_shapes_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    import numpy as np

    save_file({"model.a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"visual.b": np.zeros(2, np.float32)}, tmp_path / "model-2.safetensors")
    assert checkpoint_shapes(tmp_path) == SHAPES


@pytest.mark.parametrize("damage", [None, b"", b"\x10\0\0\0\0\0\0\0{"], ids=["absent", "empty", "cut short"])
def test_a_folder_without_readable_weights_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    if damage is not None:
        (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(UserError):
        checkpoint_shapes(tmp_path)
