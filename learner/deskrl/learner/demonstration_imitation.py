"""Warm start from a folder of demonstrations: supervised updates on the outputs that they demonstrate.

Unlike scripted solutions (`warm_start`), demonstrations may be of any number and of tasks that the run does not have,
and a policy rarely repeats one word by word. So training passes over all of them a given number of times. Each batch is
read from disk and tokenised when it is its turn.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

from deskrl.core import ids
from deskrl.core.config import RunConfig, WarmStartConfig
from deskrl.core.imitation_data import ImitationData
from deskrl.learner.components import Components
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.metrics.update_stats import WarmStartReport
from deskrl.learner.warm_start import WARMUP_UPDATES, demonstration, image_sizes, imitated_rows, imitation_update

_log = logging.getLogger(__name__)


def imitate_demonstrations(components: Components, config: RunConfig, warm_start: WarmStartConfig) -> None:
    """Train on the demonstrations in the run directory; a collective call.

    Args:
        components: components of this rank.
        config: run configuration.
        warm_start: configuration of the warm start, which has `demonstrations`.

    Raises:
        UserError: the demonstrations in the run directory are missing, incomplete or damaged.
    """
    data = ImitationData(components.folder.demonstrations)
    components.metrics.write_phase("imitation")
    batches = list(epoch_batches(len(data), warm_start.episodes_per_batch, warm_start.num_epochs, config.seed))
    if len(batches) > warm_start.max_updates:
        _log.warning(
            "learner.warm_start.max_updates ends the warm start after %d of %d updates",
            warm_start.max_updates,
            len(batches),
        )
    for number, batch in enumerate(batches[: warm_start.max_updates], start=1):
        learning_rate = warm_start.learning_rate * min(1.0, number / WARMUP_UPDATES)
        components.engine.set_optimizer(learning_rate, 0.0)
        demos = [_read(components, data, index) for index in batch]
        rows = [row for position, demo in enumerate(demos) for row in imitated_rows(position, demo)]
        loss, norm = imitation_update(components.engine, components.loader, rows)
        components.metrics.write_warm_start(WarmStartReport(number, loss, learning_rate, norm, None), None)


def epoch_batches(num_demos: int, batch_size: int, num_epochs: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices of each batch: every epoch has all demonstrations once, in an order of its own."""
    generator = random.Random(ids.derive_seed(seed, "demonstrations"))
    for _ in range(num_epochs):
        order = list(range(num_demos))
        generator.shuffle(order)
        yield from (order[start : start + batch_size] for start in range(0, num_demos, batch_size))


def _read(components: Components, data: ImitationData, index: int) -> Trajectory:
    """Return a demonstration with token ids."""
    rendered = data.read(index)
    sizes = image_sizes(data.read_images({name for step in rendered.steps for name in step.images}))
    episode = Trajectory(
        episode_id=f"demonstration.{index}", task_id=rendered.task_id, reward=1.0, steps=rendered.steps
    )
    return demonstration(episode, components.tokenizer, components.sizing, sizes)
