"""Table of ARPO's configuration keys, with the rule by which each is translated into keys of a run of deskrl.

Defaults are those of ARPO's own schema (github.com/dvlab-research/ARPO at 7489ae3), and for keys added by its fork with
remote environments, those of the fork.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Copied:
    """The value is copied to a key of the run."""

    target: str
    """Dotted key of the run."""
    kind: type
    default: Any = None
    """ARPO's default, which is copied too; None: nothing is copied."""


@dataclass(frozen=True)
class Derived:
    """`translate` derives keys of the run from this key, possibly together with others."""

    kind: type
    default: Any = None
    """ARPO's default."""
    target: str = ""
    """Main key of the run derived from this one."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest value of a number, which every number has."""


@dataclass(frozen=True)
class Fixed:
    """Only certain values are accepted, because deskrl has nothing to choose here."""

    accepted: tuple[Any, ...]
    """Accepted values; the first is suggested in place of another value."""
    reason: str


@dataclass(frozen=True)
class Unused:
    """The key has no effect on the run."""

    reason: str


_COUNT = (1, 2**30)
_COUNT_OR_OFF = (-1, 2**30)
"""Count of which 0 and -1 stand for none or for no limit."""
_PIXELS = (1, 2**40)

Rule = Copied | Derived | Fixed | Unused

_CONSTANT_KL = "the weight of the KL penalty is constant"
_NO_CRITIC = "GRPO has no critic"
_REFERENCE = "the reference policy is sharded as the policy is; micro-batches are those of the learner"
_OWN_EVALUATOR = "the task's own evaluator gives the reward; ARPO's code does not read this key either"
_FORMAT = "OSWorld's task files have a single format"
_SHARDS = "sharding is set by learner.zero_stage (DeepSpeed ZeRO)"
_RUN_DIR = "the run directory, runs/NAME, holds checkpoints, results, logs and report"
_MICRO = "micro-batches have learner.micro_batch_tokens tokens"
_LOGGED = "metrics.jsonl and wandb hold all metrics of all updates; report.html shows screenshots"

KEYS: Mapping[str, Rule] = {
    "data.train_files": Derived(str, "", target="tasks.list"),
    "data.val_files": Unused(
        "evaluation before and after training uses the training tasks; `deskrl eval` accepts any list"
    ),
    "data.prompt_key": Unused(_FORMAT),
    "data.answer_key": Unused(_FORMAT),
    "data.image_key": Unused(_FORMAT),
    "data.max_prompt_length": Derived(int, 512, target="inference.max_model_len", bounds=_COUNT),
    "data.max_response_length": Copied("inference.max_action_tokens", int, 512),
    "data.rollout_batch_size": Derived(int, 512, target="learner.grpo.groups_per_batch", bounds=_COUNT),
    "data.val_batch_size": Unused("evaluation has no batches"),
    "data.format_prompt": Unused("agent.prompt is UI-TARS's own; ARPO's code does not read this key for desktop tasks"),
    "data.shuffle": Fixed((True,), "tasks are shuffled in every epoch"),
    "data.seed": Copied("seed", int, 1),
    "data.max_pixels": Derived(int, 4194304, target="agent.image_width", bounds=_PIXELS),
    "data.min_pixels": Derived(int, 262144, target="agent.image_height", bounds=_PIXELS),
    "algorithm.adv_estimator": Fixed(("grpo",), "deskrl trains by GRPO"),
    "algorithm.gamma": Unused("GRPO discounts nothing"),
    "algorithm.lam": Unused("GRPO discounts nothing"),
    "algorithm.disable_kl": Derived(bool, False, target="learner.grpo.kl_coefficient"),
    "algorithm.use_kl_loss": Derived(bool, False, target="learner.grpo.kl_applied_to"),
    "algorithm.kl_penalty": Derived(str, "kl", target="learner.grpo.kl_estimator"),
    "algorithm.kl_coef": Derived(float, 1e-3, target="learner.grpo.kl_coefficient", bounds=(0, 1e6)),
    "algorithm.kl_type": Derived(str, "fixed", target="learner.grpo.kl_coefficient"),
    "algorithm.kl_horizon": Unused(_CONSTANT_KL),
    "algorithm.kl_target": Unused(_CONSTANT_KL),
    # ARPO declares this key (false) but never reads it, and always uses its success buffer. Here, false disables it.
    "algorithm.enable_replay": Copied("learner.grpo.use_success_buffer", bool, True),
    "worker.hybrid_engine": Unused("inference.devices and learner.devices determine which roles share a GPU"),
    "worker.actor.strategy": Unused(_SHARDS),
    "worker.actor.global_batch_size": Derived(int, 256, target="learner.grpo.num_minibatches", bounds=_COUNT_OR_OFF),
    "worker.actor.micro_batch_size_per_device_for_update": Unused(
        f"{_MICRO}, on which the loss does not depend (in ARPO, a micro-batch above 1 averages over all its tokens)"
    ),
    "worker.actor.micro_batch_size_per_device_for_experience": Unused(_MICRO),
    "worker.actor.max_grad_norm": Copied("learner.grpo.max_grad_norm", float, 1.0),
    "worker.actor.clip_ratio_low": Copied("learner.grpo.clip_low", float, 0.2),
    "worker.actor.clip_ratio_high": Copied("learner.grpo.clip_high", float, 0.3),
    "worker.actor.clip_ratio_dual": Copied("learner.grpo.dual_clip", float, 3.0),
    "worker.actor.ppo_epochs": Fixed((1,), "each batch is trained on once"),
    "worker.actor.padding_free": Unused("the layout of rows does not change results"),
    "worker.actor.ulysses_sequence_parallel_size": Fixed((1,), "a row is processed on one GPU"),
    "worker.actor.use_torch_compile": Unused("compilation does not change results"),
    "worker.actor.model.model_path": Derived(str, None, target="model.path"),
    "worker.actor.model.tokenizer_path": Unused("the tokenizer is in the model directory"),
    "worker.actor.model.override_config.*": Unused("the learner chooses its attention implementation"),
    "worker.actor.model.enable_gradient_checkpointing": Derived(bool, True, target="learner.activation_checkpointing"),
    "worker.actor.model.trust_remote_code": Unused("code in a model directory is never run"),
    "worker.actor.model.freeze_vision_tower": Copied("learner.freeze_vision", bool, False),
    "worker.actor.optim.lr": Copied("learner.grpo.learning_rate", float, 1e-6),
    "worker.actor.optim.betas": Fixed(([0.9, 0.999],), "these are AdamW's defaults"),
    "worker.actor.optim.weight_decay": Copied("learner.grpo.weight_decay", float, 0.01),
    "worker.actor.optim.strategy": Fixed(
        ("adamw", "adamw_bf16"), "the optimizer is AdamW with float32 master weights, also for adamw_bf16"
    ),
    "worker.actor.optim.lr_warmup_ratio": Derived(float, 0.0, target="learner.grpo.warmup_updates", bounds=(0, 1)),
    "worker.actor.optim.min_lr_ratio": Unused("the learning rate is constant after the warm-up, as in ARPO's code"),
    "worker.actor.optim.warmup_style": Fixed(("constant",), "the learning rate is constant after the warm-up"),
    "worker.actor.fsdp.enable_full_shard": Derived(bool, True, target="learner.zero_stage"),
    "worker.actor.fsdp.enable_cpu_offload": Derived(bool, False, target="learner.offload_optimizer"),
    "worker.actor.fsdp.*": Unused(_SHARDS + "; master weights are float32"),
    "worker.actor.offload.offload_optimizer": Derived(bool, False, target="learner.offload_optimizer"),
    "worker.actor.offload.offload_params": Unused("weights stay on the GPU, sharded according to learner.zero_stage"),
    "worker.critic.*": Unused(_NO_CRITIC),
    "worker.ref.fsdp.enable_cpu_offload": Derived(bool, False, target="learner.offload_reference"),
    "worker.ref.offload.offload_params": Derived(bool, False, target="learner.offload_reference"),
    "worker.ref.*": Unused(_REFERENCE),
    "worker.reward.*": Unused(_OWN_EVALUATOR),
    "worker.rollout.name": Fixed(("vllm",), "vLLM serves the policy"),
    "worker.rollout.n": Derived(int, 1, target="tasks.num_rollouts", bounds=_COUNT_OR_OFF),
    "worker.rollout.temperature": Copied("learner.grpo.temperature", float, 1.0),
    "worker.rollout.top_p": Fixed((1.0,), "the learner computes logprobs under the full distribution"),
    "worker.rollout.top_k": Fixed((-1,), "the learner computes logprobs under the full distribution"),
    "worker.rollout.limit_images": Derived(int, 0, target="agent.context", bounds=_COUNT_OR_OFF),
    "worker.rollout.dtype": Derived(str, "bf16", target="inference.dtype"),
    "worker.rollout.gpu_memory_utilization": Derived(
        float, 0.6, target="inference.gpu_memory_utilization", bounds=(0, 1)
    ),
    "worker.rollout.ignore_eos": Fixed((False,), "an action ends where the policy ends it"),
    "worker.rollout.enforce_eager": Derived(bool, False, target="inference.engine_args.enforce_eager"),
    "worker.rollout.enable_chunked_prefill": Unused("vLLM's engine always does this"),
    "worker.rollout.tensor_parallel_size": Derived(
        int, None, target="inference.engine_args.tensor_parallel_size", bounds=(1, 1024)
    ),
    "worker.rollout.max_num_batched_tokens": Copied("inference.engine_args.max_num_batched_tokens", int),
    "worker.rollout.max_num_seqs": Copied("inference.max_concurrent_requests", int),
    "worker.rollout.disable_log_stats": Unused("inference.metrics_port serves the engine's metrics"),
    "worker.rollout.val_override_config.*": Unused("evaluation samples as training does"),
    "worker.rollout.use_external_server": Fixed(
        (False,), "training requires a policy server that accepts weights and returns token ids and logprobs"
    ),
    "worker.rollout.server_url": Unused("the run serves its own policy"),
    "env.num_envs": Copied("desktop.num_envs", int, 32),
    "env.max_steps": Copied("tasks.max_steps", int, 15),
    "env.screen_size": Derived(list, [1920, 1080], target="desktop.width"),
    "env.provider": Derived(str, "docker", target="desktop.provider"),
    "env.os_type": Fixed(("Ubuntu",), "desktops are Linux"),
    "env.headless": Unused("desktops never open a window on this machine"),
    "env.remote_server_url": Fixed(
        (None,),
        "that server has its own protocol, not that of OSWorld's guest servers, which env.provider=remote with "
        "desktop.remote.addresses supports",
    ),
    "trainer.total_episodes": Derived(int, 10, target="learner.grpo.num_updates", bounds=(0, 2**30)),
    "trainer.max_steps": Derived(int, None, target="learner.grpo.num_updates", bounds=(0, 2**30)),
    "trainer.project_name": Unused(_RUN_DIR),
    "trainer.experiment_name": Copied("name", str, "demo"),
    "trainer.logger": Derived(list, ["console", "wandb"], target="tracker"),
    "trainer.nnodes": Copied("learner.num_nodes", int, 1),
    "trainer.n_gpus_per_node": Derived(int, 8, target="learner.num_processes", bounds=(0, 1024)),
    "trainer.use_cpu": Derived(bool, False, target="learner.dtype"),
    "trainer.critic_warmup": Unused(_NO_CRITIC),
    "trainer.val_freq": Unused("evaluation is before and after training; `deskrl eval` accepts any checkpoint"),
    "trainer.val_before_train": Derived(bool, True, target="learner.eval.num_episodes"),
    "trainer.val_only": Fixed((False,), "a run trains; use `deskrl eval` to evaluate"),
    "trainer.val_generations_to_log": Unused(_LOGGED),
    "trainer.save_freq": Derived(int, -1, target="learner.checkpoint_every", bounds=_COUNT_OR_OFF),
    "trainer.save_limit": Derived(int, None, target="learner.keep_checkpoints", bounds=_COUNT_OR_OFF),
    "trainer.save_checkpoint_path": Unused(_RUN_DIR),
    "trainer.load_checkpoint_path": Derived(str),
    "trainer.wandb_entity": Unused("wandb reads WANDB_ENTITY"),
    "wandb.enabled": Derived(bool, target="tracker"),
    "wandb.name": Copied("name", str),
    "wandb.entity": Unused("wandb reads WANDB_ENTITY"),
    "wandb.project": Unused(_RUN_DIR),
    "wandb.*": Unused(_LOGGED),
    "metrics": Unused(_LOGGED),
}


def rule_of(key: str) -> Rule | None:
    """Return the rule of a key; None if ARPO has no such key."""
    if key in KEYS:
        return KEYS[key]
    parts = key.split(".")
    prefixes = (".".join((*parts[:length], "*")) for length in range(len(parts) - 1, 0, -1))
    return next((KEYS[prefix] for prefix in prefixes if prefix in KEYS), None)
