"""What `test_inference_placement` does in a process of its own, which can import this by name."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import torch
from ports_kit import free_port
from safetensors.torch import load_file

from deskrl.core.weights.buckets import plan_buckets


def place_and_compare(folder: Path, results: multiprocessing.Queue[list[str]]) -> None:
    """In a process of its own: vLLM's distributed state is the process's."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from deskrl.inference.placement import CannotPlace, InPlace, TensorShape

    weights = load_file(folder / "model.safetensors")
    config = EngineArgs(
        model=str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=512
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
        model.load_weights(weights.items())
        expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data.zero_()
        tensors = [TensorShape(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
        buckets = plan_buckets([tensor.nbytes for tensor in weights.values()], capacity_bytes=1024**2)
        placement = InPlace(model, tensors, buckets)
        buffers = [torch.zeros(max(bucket.num_bytes for bucket in buckets), dtype=torch.uint8) for _ in range(2)]
        for index, bucket in enumerate(buckets):
            for piece in bucket.pieces:
                data = weights[tensors[piece.tensor].name].reshape(-1).view(torch.uint8)
                buffers[index % 2][piece.offset : piece.offset + piece.num_bytes] = data
            placement.place(index, buffers[index % 2])
        problems = [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])]
        try:
            InPlace(model, tensors[1:], plan_buckets([8] * (len(tensors) - 1)))
            problems.append("a model that is not wholly covered was not refused")
        except CannotPlace:
            pass
    results.put([f"{len(buckets)} buckets", *problems])
