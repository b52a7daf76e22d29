"""ARPO's configuration keys as data: what becomes of each in a run of deskrl.

A key is *carried* over to a key of a run as it is, *read* where several decide together (`translate`), *fixed* where
one value alone fits, or *unused*, with the reason. Defaults are those of ARPO's own schema
(github.com/dvlab-research/ARPO at 7489ae3), and those of its fork with environments elsewhere for the keys that it
added. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Carried:
    """Its value is that of a key of the run; `default`, ARPO's own, is carried too unless it is None."""

    to: str
    kind: type
    default: Any = None


@dataclass(frozen=True)
class Read:
    """`translate` reads it, with others."""

    kind: type
    default: Any = None
    sets: str = ""
    """The key of a run that stands above it: set there, this one is not looked at."""


@dataclass(frozen=True)
class Fixed:
    """Any other value than these is refused; the first is the mend."""

    accepted: tuple[Any, ...]
    why: str
    otherwise: Any = None
    """ARPO's own value where none is stated, if that is to be refused too."""


@dataclass(frozen=True)
class Unused:
    """Nothing becomes of it, and why."""

    why: str


Rule = Carried | Read | Fixed | Unused

_KL_OFF = "KL is off"
_NO_CRITIC = "GRPO has no critic"
_NO_REFERENCE = "without KL there is no reference model"
_OWN_EVALUATOR = "the task's own evaluator gives the reward, as in ARPO's code, which reads none of these"
_FORMAT = "OSWorld's task files have one format"
_SHARDS = "DeepSpeed ZeRO shards by learner.zero_stage"
_FOLDER = "a run has one folder, runs/NAME, with its checkpoints, results, logs and report"
_MICRO = "micro-batches are of learner.micro_batch_tokens"
_LOGGED = "metrics.jsonl and wandb have every metric of every update; screenshots are in report.html"

KEYS: Mapping[str, Rule] = {
    "data.train_files": Read(str, "", sets="tasks.list"),
    "data.val_files": Unused(
        "evaluation before and after is of the tasks that are trained on; `deskrl eval` takes any list"
    ),
    "data.prompt_key": Unused(_FORMAT),
    "data.answer_key": Unused(_FORMAT),
    "data.image_key": Unused(_FORMAT),
    "data.max_prompt_length": Read(int, 512, sets="inference.max_model_len"),
    "data.max_response_length": Carried("inference.max_action_tokens", int, 512),
    "data.rollout_batch_size": Read(int, 512, sets="learner.grpo.groups_per_batch"),
    "data.val_batch_size": Unused("evaluation takes no batches"),
    "data.format_prompt": Unused("agent.prompt is UI-TARS's own; ARPO's code reads this key for no desktop task"),
    "data.shuffle": Fixed((True,), "every epoch is in an order of its own"),
    "data.seed": Carried("seed", int, 1),
    "data.max_pixels": Read(int, 4194304, sets="agent.image_width"),
    "data.min_pixels": Read(int, 262144, sets="agent.image_height"),
    "algorithm.adv_estimator": Fixed(("grpo",), "deskrl trains by GRPO"),
    "algorithm.gamma": Unused("GRPO discounts nothing"),
    "algorithm.lam": Unused("GRPO discounts nothing"),
    "algorithm.disable_kl": Fixed((True,), "deskrl has no KL term, nor had the paper's runs", otherwise=False),
    "algorithm.use_kl_loss": Unused(_KL_OFF),
    "algorithm.kl_penalty": Unused(_KL_OFF),
    "algorithm.kl_coef": Unused(_KL_OFF),
    "algorithm.kl_type": Unused(_KL_OFF),
    "algorithm.kl_horizon": Unused(_KL_OFF),
    "algorithm.kl_target": Unused(_KL_OFF),
    # Declared false and read nowhere: ARPO's code replays whatever it says. Here false is off.
    "algorithm.enable_replay": Carried("learner.grpo.replay_successes", bool, True),
    "worker.hybrid_engine": Unused("inference.devices and learner.devices say who shares a GPU"),
    "worker.actor.strategy": Unused(_SHARDS),
    "worker.actor.global_batch_size": Read(int, 256, sets="learner.grpo.minibatches"),
    "worker.actor.micro_batch_size_per_device_for_update": Unused(
        f"{_MICRO}, and the loss does not depend on them (ARPO's does: above 1 it averages over all their tokens)"
    ),
    "worker.actor.micro_batch_size_per_device_for_experience": Unused(_MICRO),
    "worker.actor.max_grad_norm": Carried("learner.grpo.max_grad_norm", float, 1.0),
    "worker.actor.clip_ratio_low": Carried("learner.grpo.clip_low", float, 0.2),
    "worker.actor.clip_ratio_high": Carried("learner.grpo.clip_high", float, 0.3),
    "worker.actor.clip_ratio_dual": Carried("learner.grpo.dual_clip", float, 3.0),
    "worker.actor.ppo_epochs": Fixed((1,), "a batch is learnt once"),
    "worker.actor.padding_free": Unused("how rows are laid out changes no result"),
    "worker.actor.ulysses_sequence_parallel_size": Fixed((1,), "a row is on one GPU"),
    "worker.actor.use_torch_compile": Unused("how logprobs are computed changes no result"),
    "worker.actor.model.model_path": Read(str, None, sets="model.path"),
    "worker.actor.model.tokenizer_path": Unused("the tokenizer lies in the model's folder"),
    "worker.actor.model.override_config.*": Unused("the learner chooses its attention"),
    "worker.actor.model.enable_gradient_checkpointing": Read(bool, True, sets="learner.activations"),
    "worker.actor.model.trust_remote_code": Unused("code out of a model's folder is never run"),
    "worker.actor.model.freeze_vision_tower": Carried("learner.freeze_vision", bool, False),
    "worker.actor.optim.lr": Carried("learner.grpo.learning_rate", float, 1e-6),
    "worker.actor.optim.betas": Fixed(([0.9, 0.999],), "AdamW's own"),
    "worker.actor.optim.weight_decay": Carried("learner.grpo.weight_decay", float, 0.01),
    "worker.actor.optim.strategy": Fixed(
        ("adamw", "adamw_bf16"), "the optimizer is AdamW over float32 master weights, for adamw_bf16 too"
    ),
    "worker.actor.optim.lr_warmup_ratio": Read(float, 0.0, sets="learner.grpo.warmup_updates"),
    "worker.actor.optim.min_lr_ratio": Unused("the learning rate stays after the warm-up, as in ARPO's code"),
    "worker.actor.optim.warmup_style": Fixed(("constant",), "the learning rate stays after the warm-up"),
    "worker.actor.fsdp.enable_full_shard": Read(bool, True, sets="learner.zero_stage"),
    "worker.actor.fsdp.enable_cpu_offload": Read(bool, False, sets="learner.offload_optimizer"),
    "worker.actor.fsdp.*": Unused(_SHARDS + "; master weights are float32"),
    "worker.actor.offload.offload_optimizer": Read(bool, False, sets="learner.offload_optimizer"),
    "worker.actor.offload.offload_params": Unused("weights stay on the GPU, parted by learner.zero_stage"),
    "worker.critic.*": Unused(_NO_CRITIC),
    "worker.ref.*": Unused(_NO_REFERENCE),
    "worker.reward.*": Unused(_OWN_EVALUATOR),
    "worker.rollout.name": Fixed(("vllm",), "vLLM serves the policy"),
    "worker.rollout.n": Read(int, 1, sets="tasks.rollouts"),
    "worker.rollout.temperature": Carried("learner.grpo.temperature", float, 1.0),
    "worker.rollout.top_p": Fixed((1.0,), "the learner scores actions under the whole distribution"),
    "worker.rollout.top_k": Fixed((-1,), "the learner scores actions under the whole distribution"),
    "worker.rollout.limit_images": Read(int, 0, sets="agent.context"),
    "worker.rollout.dtype": Read(str, "bf16", sets="inference.dtype"),
    "worker.rollout.gpu_memory_utilization": Read(float, 0.6, sets="inference.gpu_memory_fraction"),
    "worker.rollout.ignore_eos": Fixed((False,), "an action ends where the policy ends it"),
    "worker.rollout.enforce_eager": Read(bool, False, sets="inference.engine_args.enforce_eager"),
    "worker.rollout.enable_chunked_prefill": Unused("vLLM's present engine always does"),
    "worker.rollout.tensor_parallel_size": Read(int, None, sets="inference.engine_args.tensor_parallel_size"),
    "worker.rollout.max_num_batched_tokens": Carried("inference.engine_args.max_num_batched_tokens", int),
    "worker.rollout.max_num_seqs": Carried("inference.max_concurrent", int),
    "worker.rollout.disable_log_stats": Unused("inference.metrics_port exposes what there is to know"),
    "worker.rollout.val_override_config.*": Unused("evaluation samples as training does"),
    "worker.rollout.use_external_server": Fixed(
        (False,), "training needs a policy that takes each update and tells its token ids and logprobs"
    ),
    "worker.rollout.server_url": Unused("the run serves its policy itself"),
    "env.num_envs": Carried("desktop.num_envs", int, 32),
    "env.max_steps": Carried("tasks.max_steps", int, 15),
    "env.screen_size": Read(list, [1920, 1080], sets="desktop.width"),
    "env.provider": Read(str, "docker", sets="desktop.provider"),
    "env.os_type": Fixed(("Ubuntu",), "desktops are Linux"),
    "env.headless": Unused("no desktop opens a window here"),
    "env.remote_server_url": Fixed(
        (None,),
        "that server speaks a protocol of its own, one desktop for each, not the one of OSWorld's guests; "
        "choose env.provider=remote with desktop.remote.addresses",
    ),
    "trainer.total_episodes": Read(int, 10, sets="learner.grpo.num_updates"),
    "trainer.max_steps": Read(int, None, sets="learner.grpo.num_updates"),
    "trainer.project_name": Unused(_FOLDER),
    "trainer.experiment_name": Carried("name", str, "demo"),
    "trainer.logger": Read(list, ["console", "wandb"], sets="wandb"),
    "trainer.nnodes": Fixed((1,), "`deskrl up` starts the roles of one machine; over several, start each role alone"),
    "trainer.n_gpus_per_node": Read(int, 8, sets="learner.num_processes"),
    "trainer.use_cpu": Read(bool, False, sets="learner.dtype"),
    "trainer.critic_warmup": Unused(_NO_CRITIC),
    "trainer.val_freq": Unused("evaluation is before and after; `deskrl eval` takes any checkpoint"),
    "trainer.val_before_train": Read(bool, True, sets="learner.eval.episodes"),
    "trainer.val_only": Fixed((False,), "a run trains; `deskrl eval` evaluates"),
    "trainer.val_generations_to_log": Unused(_LOGGED),
    "trainer.save_freq": Read(int, -1, sets="learner.checkpoint_every"),
    "trainer.save_limit": Read(int, None, sets="learner.keep_checkpoints"),
    "trainer.save_checkpoint_path": Unused(_FOLDER),
    "trainer.load_checkpoint_path": Read(str),
    "trainer.wandb_entity": Unused("wandb takes it from WANDB_ENTITY"),
    "wandb.enabled": Read(bool, sets="wandb"),
    "wandb.name": Carried("name", str),
    "wandb.entity": Unused("wandb takes it from WANDB_ENTITY"),
    "wandb.project": Unused(_FOLDER),
    "wandb.*": Unused(_LOGGED),
    "metrics": Unused(_LOGGED),
}


def rule_of(key: str) -> Rule | None:
    """What becomes of a key; None if ARPO has none of that name."""
    if key in KEYS:
        return KEYS[key]
    parts = key.split(".")
    prefixes = (".".join((*parts[:length], "*")) for length in range(len(parts) - 1, 0, -1))
    return next((KEYS[prefix] for prefix in prefixes if prefix in KEYS), None)
