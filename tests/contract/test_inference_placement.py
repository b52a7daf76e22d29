"""Buckets end up in a real vLLM model where its own loader would have put each tensor.

The model is as a GPU's worker holds it: built and loaded, its weights not repacked.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import get_args

import pytest
from inference_kit import build_model
from placement_kit import place_and_compare

from deskrl.core.families import Architecture


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_parameter_is_what_the_loader_would_have_made_it(tmp_path: Path, architecture: Architecture) -> None:
    build_model(tmp_path, architecture)
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[str]] = spawn.Queue()
    process = spawn.Process(target=place_and_compare, args=(tmp_path, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    num_buckets, *problems = results.get(timeout=10)
    assert not problems
    assert int(num_buckets.split()[0]) > 5, "tensors are spread over many buckets, and share some"
