"""vLLM settings of a run: engine arguments and environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deskrl.core.config import RunConfig

TRANSFER_BACKEND = "deskrl"
"""Name under which `vllm_weight_engine` registers its weight transfer engine with vLLM."""


def vllm_engine_args(config: RunConfig) -> dict[str, Any]:
    """Return vLLM's engine arguments for a run; `inference.engine_args` overrides them."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    inference = config.inference
    arguments: dict[str, Any] = {
        "model": str(config.model_folder),
        "dtype": inference.dtype,
        "seed": config.seed,
        "max_model_len": inference.max_model_len,
        "max_num_seqs": inference.max_concurrent_requests,
        "gpu_memory_utilization": inference.gpu_memory_utilization,
        "kv_cache_memory_bytes": inference.kv_cache_bytes,
        "limit_mm_per_prompt": {"image": inference.max_images, "video": 0},
        "mm_processor_cache_gb": inference.image_cache_bytes / 1024**3,
        # Logprobs of the sampling distribution: after suppression of tokens and division by the temperature.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER_BACKEND),
        # A string, because importing the class would patch vLLM and register with it in this process too.
        "worker_extension_cls": "deskrl.inference.vllm_worker_extension.WorkerExtension",
    }
    if "mm_device_do_normalize" in AsyncEngineArgs.__dataclass_fields__:
        # Otherwise vLLM 0.32 would normalise all pixels on the device, even those that are normalised already.
        arguments["mm_device_do_normalize"] = False
    if current_platform.is_cpu():
        # Run the worker in the engine's process, as on a single GPU: a separate worker process would start 8 s later,
        # need another 0.5 GB of memory, and busy-wait on a core while idle.
        arguments |= {"distributed_executor_backend": "uni", "enforce_eager": True}
    else:
        # A new screenshot spends a third of its request in the vision tower, which is 20 % faster when compiled.
        arguments["compilation_config"] = {"compile_mm_encoder": True}
    return arguments | inference.engine_args


_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

_CPU_ENVIRONMENT = {
    # Otherwise vLLM's CPU platform starts a worker process, for the sake of thread binding.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Desktops and a learner share the cores, so threads must not be bound to particular ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compiling the few small functions of the sampler delays the first request by 2 to 15 s without any speedup.
    "TORCHDYNAMO_DISABLE": "1",
}

_GPU_ENVIRONMENT = {
    # This process has used OpenMP before vLLM starts its workers. A forked worker would inherit the thread pool without
    # its threads and hang at the first tensor that is filled in parallel (which depends on model and machine size).
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def set_vllm_environment() -> None:
    """Set the environment variables of vLLM unless the user has set them; call before the first import of vLLM."""
    _set_defaults(_ENVIRONMENT)
    from vllm.platforms import current_platform

    _set_defaults(_CPU_ENVIRONMENT if current_platform.is_cpu() else _GPU_ENVIRONMENT)


def _set_defaults(defaults: Mapping[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
