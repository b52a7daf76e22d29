"""In-place weight loader: buckets set each parameter of a real vLLM model to the value that its own loader would set.

The model is in the state in which a GPU worker holds it: loaded, and not repacked.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from inference_kit import build_model
from weight_loader_kit import load_and_compare

from deskrl.models.architectures import ARCHITECTURES


def test_each_parameter_equals_that_of_the_models_own_loader(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ARCHITECTURES.names()}
    for name, folder in folders.items():
        build_model(folder, name)
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[str, int, list[str]]] = spawn.Queue()
    process = spawn.Process(target=load_and_compare, args=(folders, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    for expected in folders:
        name, num_buckets, problems = results.get(timeout=60)
        assert (name, problems) == (expected, [])
        assert num_buckets > 5, "the test needs several buckets"
