"""Child process of `test_inference_weight_loader`, in a module that `multiprocessing` can import."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ports_kit import free_port
from safetensors.torch import load_file

from deskrl.core.weights.buckets import plan_buckets


def load_and_compare(folders: Mapping[str, Path], results: multiprocessing.Queue[tuple[str, int, list[str]]]) -> None:
    """Load each model in place; put its name, the number of buckets, and the parameters that differ into `results`.

    Runs in one child process for all models, because the state of vLLM is global and its import takes long.
    """
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import set_default_torch_dtype

    is_first = True
    for name, folder in folders.items():
        config = EngineArgs(
            model=str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=512
        ).create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            if is_first:
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
                is_first = False
            results.put((name, *_compare(config, folder)))


def _compare(config: Any, folder: Path) -> tuple[int, list[str]]:
    """Return the number of buckets, and the parameters that differ between both loaders."""
    from vllm.model_executor.model_loader.utils import initialize_model

    from deskrl.inference.weight_loader import CannotLoadInPlace, CheckpointTensor, InPlaceLoader

    weights = load_file(folder / "model.safetensors")
    model = initialize_model(vllm_config=config)
    model.load_weights(weights.items())
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    tensors = [CheckpointTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    buckets = plan_buckets([tensor.nbytes for tensor in weights.values()], capacity_bytes=1024**2)
    loader = InPlaceLoader(model, tensors, buckets)
    buffers = [torch.zeros(max(bucket.num_bytes for bucket in buckets), dtype=torch.uint8) for _ in range(2)]
    for index, bucket in enumerate(buckets):
        for piece in bucket.pieces:
            data = weights[tensors[piece.tensor].name].reshape(-1).view(torch.uint8)
            buffers[index % 2][piece.offset : piece.offset + piece.num_bytes] = data
        loader.load(index, buffers[index % 2])
    problems = [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])]
    try:
        InPlaceLoader(model, tensors[1:], plan_buckets([8] * (len(tensors) - 1)))
        problems.append("an incomplete set of tensors was not rejected")
    except CannotLoadInPlace:
        pass
    return len(buckets), problems
