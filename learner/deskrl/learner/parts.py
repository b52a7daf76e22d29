"""The learner's parts, put together from the configuration. Knows who needs whom; does nothing with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.core.rendering import ImageSizing, image_sizing_of, processor_hash, suppressed_ids, vocab_size_of
from deskrl.core.runfolder import RunFolder
from deskrl.learner import gpus, metrics, stopping
from deskrl.learner.batches.feed import Feed
from deskrl.learner.plan import Curriculum
from deskrl.learner.policy import activations
from deskrl.learner.policy.checkpoint import CheckpointStore, layout_of
from deskrl.learner.policy.checkpoint_writer import CheckpointWriter
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import load_policy, load_processor, make_collator
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.results import Results
from deskrl.learner.take import BatchTaker
from deskrl.learner.tracking import Tracker
from deskrl.learner.weights.announcements import Outcome
from deskrl.learner.weights.canary import CanaryProbe, make_canary
from deskrl.learner.weights.publish import TOLERANCE_FLOAT32, TOLERANCE_HALF, TOLERANCE_TF32, Publisher
from deskrl.learner.weights.sending import Sender


@dataclass(frozen=True)
class Parts:
    """What one rank of the learner works with."""

    folder: RunFolder
    tokenizer: Any
    sizing: ImageSizing
    processor_hash: str
    engine: Engine
    feed: Feed
    replay: ReplayClient
    curriculum: Curriculum
    applications: Mapping[str, str]
    """Of the tasks by their ids."""
    taker: BatchTaker
    checkpoints: CheckpointStore
    checkpoint_writer: CheckpointWriter
    canary: CanaryProbe
    publisher: Publisher
    stop: StopEvent
    results: Results
    tracker: Tracker | None
    """Of rank 0."""

    def close(self) -> None:
        """End connections, and leave the world of ranks."""
        self.publisher.close()
        self.replay.close()
        if self.tracker is not None:
            self.tracker.close()
        self.checkpoint_writer.close()
        self.engine.close()


def assemble(config: RunConfig, stop: StopEvent, on_outcome: Callable[[Outcome], None]) -> Parts:
    """Load the model, join the other ranks, open the connections.

    Args:
        config: of the run.
        stop: ends whatever waits.
        on_outcome: told of each update of each replica.

    Raises:
        UserError: the tasks, the model or its processor cannot be read.
    """
    gpus.refuse_dtype(config.learner.dtype, gpus.capability())
    folder = RunFolder(config.folder)
    folder.create()
    tasks = _read_tasks(folder)
    model_folder = config.model_folder
    processor = load_processor(model_folder)
    tokenizer = processor.tokenizer
    sizing = image_sizing_of(model_folder)
    hash_of_processor = processor_hash(model_folder, tokenizer)
    suppressed = suppressed_ids(tokenizer, vocab_size_of(model_folder))
    policy = load_policy(
        model_folder,
        suppressed,
        config.learner.freeze_vision,
        getattr(torch, config.learner.dtype),
        # Ranks gather the tower's weights together under ZeRO 3: none may skip what another does.
        config.learner.feature_cache_bytes if config.learner.zero_stage < 3 else 0,
    )
    activations.keep(policy.model.model.language_model, config.learner.activations)
    if not config.learner.freeze_vision:
        activations.keep(policy.model.model.visual, config.learner.activations)
    engine = Engine(policy, config.learner)
    replay = ReplayClient(config.replay.address, f"rank-{engine.rank}", stop)
    applications = {task_id: metrics.application_of(task) for task_id, task in tasks.items()}
    metrics.name_applications(set(applications.values()))
    curriculum = Curriculum(config, {task_id: json.dumps(task).encode() for task_id, task in tasks.items()})
    checkpoints = CheckpointStore(folder.checkpoints, model_folder, layout_of(config, engine.world_size))
    return Parts(
        folder=folder,
        tokenizer=tokenizer,
        sizing=sizing,
        processor_hash=hash_of_processor,
        engine=engine,
        feed=Feed(
            make_collator(policy, processor, replay.fetch_images),
            engine.rank,
            engine.world_size,
            config.learner.micro_batch_tokens,
            lambda: stopping.check(stop),
        ),
        replay=replay,
        curriculum=curriculum,
        applications=applications,
        taker=BatchTaker(config, curriculum, replay, engine.rank == 0, hash_of_processor),
        checkpoints=checkpoints,
        checkpoint_writer=CheckpointWriter(checkpoints, engine, config.learner.keep_checkpoints),
        canary=make_canary(policy, processor, sizing, *config.image_size),
        publisher=Publisher(
            config.inference,
            _sender(config, engine),
            _canary_tolerance(config, engine),
            stop,
            on_outcome,
        ),
        stop=stop,
        results=Results(folder, tasks),
        tracker=Tracker(config) if engine.rank == 0 else None,
    )


def _canary_tolerance(config: RunConfig, engine: Engine) -> float:
    if not config.is_in_float32:
        return TOLERANCE_HALF
    return TOLERANCE_TF32 if engine.device.type == "cuda" else TOLERANCE_FLOAT32


def _sender(config: RunConfig, engine: Engine) -> Sender | None:
    """What sends weights from this rank's GPU, where that is wanted of it."""
    wanted = engine.rank == 0 and engine.device.type == "cuda" and config.inference.weight_transfer != "stream"
    return Sender(engine.device) if wanted else None


def _read_tasks(folder: RunFolder) -> Mapping[str, Mapping[str, Any]]:
    """Task files by id, in the order of the task list; the launcher writes them before any role starts."""
    path = folder.root / "tasks.json"
    try:
        tasks: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error})", "start the run with `deskrl up`, or `deskrl prepare` it"
        ) from error
    if not tasks:
        raise UserError(f"{path} names no task", "name at least one in tasks.tasks")
    return tasks
