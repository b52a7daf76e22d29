"""Benchmark of the viewer: rendering time of its pages for a run of 10,000 episodes and for one of 200.

Both stores are filled by the operations of the replay service. Pages are rendered without HTTP, alternating between the
runs. Prints one JSON line. `ratio` is the small run's time over all pages divided by the large run's, median over the
rounds: 1 means that the time does not depend on the size of the run.

    python tests/bench/viewer.py [--turns 7] [--episodes 10000]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from deskrl.analysis.viewer.pages import Page, ViewerPages
from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import batch_delivery, image_index, rollout_scheduler, rollouts, success_buffer
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.rollout_scheduler import LeaseRequest
from deskrl.replay.store import Store

GROUP, STEPS, TASKS = 8, 15, 64
PROMPT_TOKENS, ACTION_TOKENS = 1500, 60
RATE_LIMITER = RateLimiter(max_staleness=1_000_000, groups_per_batch=1, rollouts_per_group=GROUP)
SUCCESS_BUFFER = success_buffer.SuccessBufferConfig(threshold=0.1, capacity=8, seed=0)


def picture() -> bytes:
    """Return a screenshot as PNG; all episodes share it, since pages show equally many screenshots in both runs."""
    buffer = io.BytesIO()
    Image.effect_noise((640, 360), 40).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def payload_of(index: int, version: int, shot: str) -> tuple[bytes, tuple[VersionSpan, ...]]:
    """Return an encoded step and its version spans."""
    spans = (VersionSpan("bench", version, 0, ACTION_TOKENS),)
    step = Step(
        index=index,
        screenshot=shot,
        images=(shot,),
        text="Thought: There it is.\nAction: click(start_box='(10,10)')",
        prompt_ids=tuple(range(PROMPT_TOKENS)),
        action_ids=tuple(range(ACTION_TOKENS)),
        logprobs=(-0.5,) * ACTION_TOKENS,
        spans=spans,
        action={"kind": "click", "x": 10, "y": 10},
    )
    return encode_step(step), spans


def fill(folder: Path, num_episodes: int) -> RunConfig:
    """Create a run of `num_episodes` episodes, with a new policy version every 32 episodes."""
    config = RunConfig.model_validate({"runs": folder, "name": f"of-{num_episodes}"})
    store = Store(RunDir(config.run_dir).replay, config.replay.max_bytes)
    shot = picture()
    image = image_index.ReceivedImage(bytes.fromhex(ids.image_hash(shot)), shot)
    for ordinal in range(num_episodes // GROUP):
        store.submit(lambda connection, ordinal=ordinal: add_group(connection, store, ordinal, image)).result()
    store.close()
    return config


def add_group(connection: object, store: Store, ordinal: int, image: image_index.ReceivedImage) -> None:
    """Add one group of a committed batch, in which every other member succeeds."""
    name = ids.group_id("train", ordinal)
    plan = replay_pb2.GroupPlan(
        group_id=name,
        queue="train",
        task_id=f"task-{ordinal % TASKS}",
        task_json=b'{"instruction": "Do it."}',
        seeds=range(GROUP),
        max_steps=STEPS,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    rollout_scheduler.plan_groups(connection, [plan])
    for member, grant in enumerate(
        rollout_scheduler.grant_leases(
            connection, RATE_LIMITER, [LeaseRequest(f"{name}/{n}", "a") for n in range(GROUP)]
        )
    ):
        for index in range(STEPS):
            payload, spans = payload_of(index, ordinal * GROUP // 32, image.hash.hex())
            step = rollout_pb2.EpisodeStep(index=index, payload=payload)
            rollouts.add_step(connection, store.blob_log, grant.lease_id, step, spans, [image], [])
        result = rollout_pb2.EpisodeResult(
            reward=member % 2,
            num_steps=STEPS,
            termination=rollout_pb2.TERMINATION_FINISHED,
            final_image_hash=image.hash.hex(),
        )
        rollouts.finish(connection, store.blob_log, grant.lease_id, result, [], [], SUCCESS_BUFFER.threshold)
    batch = f"train/{ordinal:06d}"
    batch_delivery.bind(connection, batch_delivery.BatchSlot("train", batch, 0), [], SUCCESS_BUFFER)
    batch_delivery.commit(connection, "train", batch, [], common_pb2.PolicyVersion(lineage="bench", step=ordinal))


Render = Callable[[ViewerPages], Page]


def renderers(num_episodes: int) -> dict[str, Render]:
    """Return the rendered pages by name; where an age matters, they show old parts of the run."""
    oldest = num_episodes // GROUP // 10
    return {
        "newest": lambda pages: pages.episodes({}),
        "middle": lambda pages: pages.episodes({"before": str(num_episodes // 2)}),
        "task": lambda pages: pages.episodes({"task": "task-7"}),
        "version": lambda pages: pages.episodes({"version": str(oldest * GROUP // 32)}),
        "none_found": lambda pages: pages.episodes({"fault": "3", "outcome": "failed"}),
        "episode": lambda pages: pages.episode(f"{ids.group_id('train', oldest)}.3", {"step": "7"}),
        "group": lambda pages: pages.group(ids.group_id("train", oldest)),
    }


def main() -> None:
    """Fill both runs, measure, and print the result."""
    parser = argparse.ArgumentParser(description="rendering time of the viewer's pages for a large and a small run")
    parser.add_argument("--turns", type=int, default=7, help="number of measured rounds")
    parser.add_argument("--episodes", type=int, default=10_000, help=f"large run, a multiple of {GROUP}")
    options = parser.parse_args()
    sizes = (200, options.episodes)
    seconds: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        viewers = {size: ViewerPages(fill(Path(folder), size)) for size in sizes}
        for turn in range(options.turns + 1):
            for size, pages in viewers.items():
                for name, render in renderers(size).items():
                    start_s = time.perf_counter()
                    page = render(pages)
                    taken_s = time.perf_counter() - start_s
                    assert page.body
                    if turn > 0:  # the first round is a warm-up
                        seconds.setdefault((size, name), []).append(taken_s)
    ms = {key: statistics.median(values) * 1000 for key, values in seconds.items()}
    names = list(renderers(1))
    totals = {
        size: [sum(seconds[size, name][turn] for name in names) for turn in range(options.turns)] for size in sizes
    }
    ratios = [small / large for small, large in zip(totals[sizes[0]], totals[sizes[1]], strict=True)]
    report = {
        "bench": "viewer",
        "ratio": round(statistics.median(ratios), 3),
        "large_ms": {name: round(ms[options.episodes, name], 1) for name in names},
        "small_ms": {name: round(ms[200, name], 1) for name in names},
        "episodes": options.episodes,
        "turns": options.turns,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
