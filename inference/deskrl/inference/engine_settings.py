"""How vLLM is set up for a run: its engine arguments, and what it reads from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deskrl.core.config import RunConfig

TRANSFER_BACKEND = "deskrl"
"""Name of the weight-transfer engine that `transfer` registers with vLLM."""


def engine_arguments(config: RunConfig) -> dict[str, Any]:
    """vLLM's engine arguments for a run; what `inference.engine_args` says wins."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    inference = config.inference
    arguments: dict[str, Any] = {
        "model": str(config.model_folder),
        "dtype": inference.dtype,
        "seed": config.seed,
        "max_model_len": inference.max_model_len,
        "max_num_seqs": inference.max_concurrent,
        "gpu_memory_utilization": inference.gpu_memory_fraction,
        "kv_cache_memory_bytes": inference.kv_cache_bytes,
        "limit_mm_per_prompt": {"image": inference.max_images, "video": 0},
        "mm_processor_cache_gb": inference.image_cache_bytes / 1024**3,
        # Under the distribution that is sampled from: suppressed tokens and temperature applied.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER_BACKEND),
        "worker_extension_cls": "deskrl.inference.worker.WorkerExtension",
    }
    if "mm_device_do_normalize" in AsyncEngineArgs.__dataclass_fields__:
        # vLLM 0.32 expects bytes in place of floats then, and does its own arithmetic on whatever it gets.
        arguments["mm_device_do_normalize"] = False
    if current_platform.is_cpu():
        # One process beside this one, as on a single GPU: a worker of its own would start 8 s later, cost half a
        # gigabyte, and spin on a core while it waits.
        arguments |= {"distributed_executor_backend": "uni", "enforce_eager": True}
    else:
        # A never-seen screenshot costs a third of its request in the vision tower, which is a fifth faster so.
        arguments["compilation_config"] = {"compile_mm_encoder": True}
    return arguments | inference.engine_args


_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

_CPU_ENVIRONMENT = {
    # Else vLLM's CPU platform insists on a worker process, for the sake of thread binding.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The cores are shared with desktops and a learner: threads go where there is room, and leave room.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compiling the sampler's few small functions delays the first request by 2 to 15 s and gains nothing.
    "TORCHDYNAMO_DISABLE": "1",
}

_GPU_ENVIRONMENT = {
    # This process has computed by then. A fork of it has OpenMP's pool without its threads, and waits for them for ever
    # at the first tensor that is filled in parallel; whether one is depends on the model's and the machine's size.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def set_environment() -> None:
    """Set what vLLM reads from the environment, before it is first imported; the user's own settings win."""
    _set_defaults(_ENVIRONMENT)
    from vllm.platforms import current_platform

    _set_defaults(_CPU_ENVIRONMENT if current_platform.is_cpu() else _GPU_ENVIRONMENT)


def _set_defaults(defaults: Mapping[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
