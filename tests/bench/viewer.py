"""The viewer's pages over a run of 10,000 episodes against the same pages over one of 200.

Both stores are filled by the store's own operations; the pages are asked for in turns, as a browser would ask (laid
out whole, without HTTP). Prints one JSON line; `ratio` is the small run's time over the large one's, all pages
together, median of the turns: 1 means that size costs nothing.

    python tests/bench/viewer.py [--turns 7] [--episodes 10000]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image

from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.runfolder import RunFolder
from deskrl.core.trajectory import Span, Step, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import batches, images, planning, rollouts, successes
from deskrl.replay.pacing import Pacing
from deskrl.replay.planning import Ask
from deskrl.replay.store import Store
from deskrl.replay.viewer.site import Site

GROUP, STEPS, TASKS = 8, 15, 64
PROMPT_TOKENS, ACTION_TOKENS = 1500, 60
PACING = Pacing(max_staleness=1_000_000, groups_per_batch=1, rollouts=GROUP)
RULES = successes.SuccessRules(above=0.1, capacity=8, seed=0)


def picture() -> bytes:
    """A screenshot; one for all, since a page shows no more of them in a large run."""
    buffer = io.BytesIO()
    Image.effect_noise((640, 360), 40).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def payload_of(index: int, version: int, shot: str) -> tuple[bytes, tuple[Span, ...]]:
    """A step."""
    spans = (Span("bench", version, 0, ACTION_TOKENS),)
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
    """A run of so many episodes, of a new version every 32 of them."""
    config = RunConfig.model_validate({"runs": folder, "name": f"of-{num_episodes}"})
    store = Store(RunFolder(config.folder).replay, config.replay.max_bytes)
    shot = picture()
    image = images.Received(bytes.fromhex(ids.image_hash(shot)), shot)
    for ordinal in range(num_episodes // GROUP):
        store.submit(lambda connection, ordinal=ordinal: add_group(connection, store, ordinal, image)).result()
    store.close()
    return config


def add_group(connection: object, store: Store, ordinal: int, image: images.Received) -> None:
    """One group planned, played, learnt from: every other member succeeds, and now and then a desktop was lost."""
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
    planning.plan(connection, [plan])
    for member, grant in enumerate(planning.grant(connection, PACING, [Ask(f"{name}/{n}", "a") for n in range(GROUP)])):
        for index in range(STEPS):
            payload, spans = payload_of(index, ordinal * GROUP // 32, image.hash.hex())
            step = rollout_pb2.EpisodeStep(index=index, payload=payload)
            rollouts.add_step(connection, store.segments, grant.lease_id, step, spans, [image], [])
        result = rollout_pb2.EpisodeResult(
            reward=member % 2,
            num_steps=STEPS,
            termination=rollout_pb2.TERMINATION_FINISHED,
            final_image_hash=image.hash.hex(),
        )
        rollouts.finish(connection, store.segments, grant.lease_id, result, [], [], RULES.above)
    batch = f"train/{ordinal:06d}"
    batches.bind(connection, batches.Place("train", batch, 0), [], RULES)
    batches.commit(connection, "train", batch, [], common_pb2.PolicyVersion(lineage="bench", step=ordinal))


def pages_of(num_episodes: int) -> dict[str, tuple[str, dict[str, str]]]:
    """What a person opens, by name; each reaches as far into the run as it goes."""
    oldest = num_episodes // GROUP // 10
    return {
        "newest": ("/", {}),
        "middle": ("/", {"before": str(num_episodes // 2)}),
        "task": ("/", {"task": "task-7"}),
        "version": ("/", {"version": str(oldest * GROUP // 32)}),
        "none_found": ("/", {"fault": "3", "outcome": "failed"}),
        "episode": (f"/episode/{ids.group_id('train', oldest)}.3", {"step": "7"}),
        "group": (f"/group/{ids.group_id('train', oldest)}", {}),
    }


def main() -> None:
    """Fill, measure in turns, print one line."""
    parser = argparse.ArgumentParser(description="the viewer's pages over a large run against a small one")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--episodes", type=int, default=10_000, help=f"of the large run, a multiple of {GROUP}")
    options = parser.parse_args()
    sizes = (200, options.episodes)
    seconds: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        sites = {size: Site(fill(Path(folder), size)) for size in sizes}
        for turn in range(options.turns + 1):
            for size, site in sites.items():
                for name, (path, query) in pages_of(size).items():
                    start_s = time.perf_counter()
                    reply = site.reply(path, query)
                    taken_s = time.perf_counter() - start_s
                    assert reply.status == 200, reply.body
                    if turn > 0:  # the first one warms up
                        seconds.setdefault((size, name), []).append(taken_s)
    ms = {key: statistics.median(values) * 1000 for key, values in seconds.items()}
    names = list(pages_of(1))
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
