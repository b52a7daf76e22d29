"""Components of one learner rank, and how they are built from the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.imitation_data import read_images
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.prompt_rendering import ImageSizing, processor_hash, read_image_sizing, read_vocab_size, suppressed_ids
from deskrl.core.run_dir import RunDir
from deskrl.learner import accelerator, cancellation
from deskrl.learner.batch_builder import BatchBuilder
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore, layout_of
from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter
from deskrl.learner.checkpoint.model_card import ModelCardWriter
from deskrl.learner.curriculum import Curriculum
from deskrl.learner.extensions import check_extensions
from deskrl.learner.metrics import prometheus
from deskrl.learner.metrics.metrics_writer import MetricsWriter
from deskrl.learner.metrics.result_files import ResultFiles
from deskrl.learner.metrics.run_trackers import RunTrackers
from deskrl.learner.policy import activation_checkpointing
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor, make_collator
from deskrl.learner.policy.reference_policy import ReferencePolicy, build_reference
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.weights.bucket_sender import BucketSender
from deskrl.learner.weights.canary import CanaryProbe, make_canary
from deskrl.learner.weights.publisher import TOLERANCE_FLOAT32, TOLERANCE_HALF, TOLERANCE_TF32, Publisher
from deskrl.models.model_checks import check_complete, check_model_not_quantized


@dataclass(frozen=True)
class Components:
    """Components of one rank."""

    folder: RunDir
    tokenizer: Any
    sizing: ImageSizing
    processor_hash: str
    engine: DeepSpeedEngine
    reference: ReferencePolicy | None
    """Reference policy of the KL penalty; None without one."""
    loader: MicroBatchLoader
    replay: ReplayClient
    curriculum: Curriculum
    batch_builder: BatchBuilder
    checkpoints: CheckpointStore
    checkpoint_writer: CheckpointWriter
    model_card: ModelCardWriter
    canary: CanaryProbe
    publisher: Publisher
    stop: StopEvent
    results: ResultFiles
    metrics: MetricsWriter

    @property
    def is_rank_0(self) -> bool:
        """Whether this is rank 0, which alone plans groups, publishes weights, commits batches and writes files."""
        return self.engine.rank == 0

    def close(self) -> None:
        """Close connections and leave the process group of the ranks."""
        self.publisher.close()
        self.replay.close()
        self.metrics.close()
        self.checkpoint_writer.close()
        self.engine.close()


def build_components(config: RunConfig, stop: StopEvent) -> Components:
    """Load the model, join the other ranks and connect to the replay service; a collective call.

    Args:
        config: run configuration.
        stop: event that cancels the learner's work.

    Raises:
        UserError: an extension cannot be selected, the model cannot be trained, or the tasks, the model or its
            processor cannot be read.
    """
    check_complete(config.model_folder, config.model.architecture)
    check_model_not_quantized(config)
    check_extensions(config)
    accelerator.check_dtype(config.learner.dtype, accelerator.capability())
    folder = RunDir(config.run_dir)
    folder.create()
    tasks = _read_tasks(folder)
    model_folder = config.model_folder
    processor = load_processor(model_folder)
    tokenizer = processor.tokenizer
    sizing = read_image_sizing(model_folder)
    hash_of_processor = processor_hash(model_folder, tokenizer)
    suppressed = suppressed_ids(tokenizer, read_vocab_size(model_folder))
    policy = _load_policy(config, suppressed)
    engine = DeepSpeedEngine(policy, config.learner)
    reference = build_reference(config, engine, suppressed)
    replay = ReplayClient(config.replay.address, f"rank-{engine.rank}", stop)
    applications = {task_id: prometheus.application_of(task) for task_id, task in tasks.items()}
    results = ResultFiles(folder, tasks)
    trackers = RunTrackers(config) if engine.rank == 0 else None
    metrics = MetricsWriter(folder, results, trackers, applications)
    model_card = ModelCardWriter(config, len(tasks), results)
    curriculum = Curriculum(config, {task_id: json.dumps(task).encode() for task_id, task in tasks.items()})
    checkpoints = CheckpointStore(folder.checkpoints, model_folder, layout_of(config))
    return Components(
        folder=folder,
        tokenizer=tokenizer,
        sizing=sizing,
        processor_hash=hash_of_processor,
        engine=engine,
        reference=reference,
        loader=MicroBatchLoader(
            make_collator(policy, processor, _screenshot_source(config, folder, replay)),
            engine.rank,
            engine.world_size,
            config.learner.micro_batch_tokens,
            lambda: cancellation.check(stop),
        ),
        replay=replay,
        curriculum=curriculum,
        batch_builder=BatchBuilder(config, curriculum, replay, engine.rank == 0, hash_of_processor),
        checkpoints=checkpoints,
        checkpoint_writer=CheckpointWriter(checkpoints, engine, config.learner.keep_checkpoints, model_card.write),
        model_card=model_card,
        canary=make_canary(policy, processor, sizing, *config.image_size),
        publisher=Publisher(
            config.inference,
            _sender(config, engine),
            _canary_tolerance(config, engine),
            stop,
            metrics.write_weight_update,
            replay.joined_replicas,
        ),
        stop=stop,
        results=results,
        metrics=metrics,
    )


def _screenshot_source(
    config: RunConfig, folder: RunDir, replay: ReplayClient
) -> Callable[[Collection[str]], Mapping[str, bytes]]:
    """Return the function that gets screenshots by their hashes, from imitated demonstrations or from replay."""
    warm_start = config.learner.warm_start
    if warm_start is None or warm_start.demonstrations is None:
        return replay.fetch_images

    def read_or_fetch(hashes: Collection[str]) -> Mapping[str, bytes]:
        found = read_images(folder.demonstrations, hashes)
        missing = set(hashes) - found.keys()
        return {**found, **replay.fetch_images(missing)} if missing else found

    return read_or_fetch


def _load_policy(config: RunConfig, suppressed: tuple[int, ...]) -> Policy:
    """Load the policy, add the configured adapter and enable the configured activation checkpointing."""
    learner = config.learner
    policy = load_policy(
        config.model_folder,
        suppressed,
        learner.has_frozen_vision,
        getattr(torch, learner.dtype),
        # Under ZeRO 3, all ranks gather the vision tower's weights together, so no rank may skip its forward pass.
        learner.feature_cache_bytes if learner.zero_stage < 3 else 0,
        config.model.architecture,
    )
    if learner.has_lora:
        policy.add_adapter(learner.lora, config.seed)
    part = policy.architecture
    activation_checkpointing.enable(part.language_model(policy.model), learner.activation_checkpointing)
    if not learner.has_frozen_vision:
        activation_checkpointing.enable(part.vision_tower(policy.model), learner.activation_checkpointing)
    return policy


def _canary_tolerance(config: RunConfig, engine: DeepSpeedEngine) -> float:
    """Return the largest allowed difference of canary logprobs between learner and replica."""
    if not config.is_in_float32:
        return TOLERANCE_HALF
    return TOLERANCE_TF32 if engine.device.type == "cuda" else TOLERANCE_FLOAT32


def _sender(config: RunConfig, engine: DeepSpeedEngine) -> BucketSender | None:
    """Return the sender of weights on this rank's GPU; None if this rank does not send from a GPU."""
    sends = engine.rank == 0 and engine.device.type == "cuda" and config.inference.weight_transfer != "stream"
    return BucketSender(engine.device) if sends else None


def _read_tasks(folder: RunDir) -> Mapping[str, Mapping[str, Any]]:
    """Return the content of the task file by task id, in the order of the task list."""
    tasks = folder.read_tasks()
    if not tasks:
        raise UserError(f"{folder.tasks}: contains no tasks", "name at least one in tasks.ids")
    return tasks
