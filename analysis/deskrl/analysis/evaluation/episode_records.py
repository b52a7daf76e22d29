"""Records of an evaluation: one JSON file for each task with its episodes, and the screenshots as PNG files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.file_io import write_atomically, write_json
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import decode_step
from deskrl.launch.run_state import is_evaluation
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc, rollout_pb2

_CALL_S = 120.0


@dataclass(frozen=True)
class EvaluatedEpisode:
    """One episode of an evaluation.

    `reward` is None if the episode does not count: all attempts ended in faults (termination `fault`), or another
    policy version than the evaluated one sampled actions (`other_version`).
    """

    episode_id: str
    seed: int
    reward: float | None
    termination: str
    num_steps: int
    duration_s: float
    timings_ms: tuple[Mapping[str, float], ...]
    """Latency of each step by part (`deskrl.core.latency_breakdown`)."""
    versions: tuple[str, ...]
    """Policy versions that sampled the tokens, as lineage/step."""
    actions: tuple[str, ...]
    screenshots: tuple[str, ...]
    """Screenshot files, relative to the results directory: one before each step, and one at the end."""
    fault: str


@dataclass(frozen=True)
class EvaluatedTask:
    """Task of an evaluation with its episodes."""

    task_id: str
    application: str
    infeasible: bool
    episodes: tuple[EvaluatedEpisode, ...]
    num_lost_connections: int = 0
    """Attempts of the task, over all queues, that lost their desktop after the policy's first action; each was a fault,
    after which the episode was run again."""


def collect_tasks(
    stub: replay_pb2_grpc.ReplayServiceStub, run_dir: RunDir, queue: str, evaluated_version: str | None
) -> list[EvaluatedTask]:
    """Write and return all finished episodes of a queue by task, in the order of the task list.

    Args:
        stub: stub of the replay service.
        run_dir: directory of the tasks, in which results and screenshots are written.
        queue: name of the queue.
        evaluated_version: policy version whose episodes count, as lineage/step; None if versions are unknown.
    """
    tasks = run_dir.read_tasks()
    applications = run_dir.read_applications()
    status = stub.GetReplayStatus(replay_pb2.GetReplayStatusRequest(), timeout=_CALL_S)
    num_lost = {it.task_id: it.num_lost for it in status.lost_connections}
    records = []
    for task_id, task in tasks.items():
        request = replay_pb2.ListEpisodesRequest(queue=queue, task_id=task_id)
        episodes = [answer.episode for answer in stub.ListEpisodes(request, timeout=_CALL_S)]
        episodes.sort(key=lambda episode: episode.episode_id)
        kept = tuple(_write_episode(stub, run_dir, episode, evaluated_version) for episode in episodes)
        infeasible = task["evaluator"]["func"] == "infeasible"
        record = EvaluatedTask(task_id, applications[task_id], infeasible, kept, num_lost.get(task_id, 0))
        write_json(run_dir.task_results / f"{task_id}.json", asdict(record))
        records.append(record)
    return records


def read_evaluation(root: Path) -> list[EvaluatedTask]:
    """Read the tasks of an evaluation or of one task set from its directory.

    Raises:
        UserError: the directory contains no evaluation, or one that has not finished.
    """
    if records := list(_read_records(root)):
        return records
    if is_evaluation(RunDir(root)):
        raise UserError(f"{root}: the evaluation has not finished", "repeat the `deskrl eval` command to resume it")
    raise UserError(f"{root}: contains no evaluation", "name a directory that `deskrl eval` has written")


def has_evaluation(root: Path) -> bool:
    """Return whether a directory contains results of an evaluation."""
    return any(True for _ in _read_records(root))


def _read_records(root: Path) -> Iterator[EvaluatedTask]:
    for path in sorted(RunDir(root).task_results.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            episodes = tuple(EvaluatedEpisode(**episode) for episode in raw.pop("episodes"))
            yield EvaluatedTask(**raw, episodes=episodes)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a training run has other result files there


def evaluated_episode(episode: replay_pb2.Episode, evaluated_version: str | None) -> EvaluatedEpisode:
    """Convert an episode, without its screenshots; `evaluated_version` as in `collect_tasks`."""
    steps = [decode_step(data) for data in episode.steps]
    versions = sorted({f"{span.lineage}/{span.step}" for step in steps for span in step.spans})
    reward: float | None = episode.result.reward
    termination = rollout_pb2.Termination.Name(episode.result.termination).removeprefix("TERMINATION_").lower()
    fault = ""
    if not episode.HasField("result"):
        reward, termination, fault = None, "fault", episode.last_fault.message
    elif evaluated_version is not None and (
        others := [version for version in versions if version != evaluated_version]
    ):
        reward, termination = None, "other_version"
        fault = f"policy version {', '.join(others)} acted instead of the evaluated {evaluated_version}"
    return EvaluatedEpisode(
        episode_id=episode.episode_id,
        seed=episode.seed,
        reward=reward,
        termination=termination,
        num_steps=len(steps),
        duration_s=round(episode.result.duration_s, 3),
        timings_ms=tuple(step.timings_ms for step in steps),
        versions=tuple(versions),
        actions=tuple(step.text for step in steps),
        screenshots=(),
        fault=fault,
    )


def _write_episode(
    stub: replay_pb2_grpc.ReplayServiceStub, run_dir: RunDir, episode: replay_pb2.Episode, evaluated_version: str | None
) -> EvaluatedEpisode:
    """Write the screenshots of an episode and convert it."""
    hashes = [decode_step(data, with_ids=False).screenshot for data in episode.steps]
    if episode.HasField("result") and episode.result.final_image_hash:
        hashes.append(episode.result.final_image_hash)
    screenshots = tuple(_write_screenshots(stub, run_dir, episode.episode_id, hashes))
    return replace(evaluated_episode(episode, evaluated_version), screenshots=screenshots)


def _write_screenshots(
    stub: replay_pb2_grpc.ReplayServiceStub, run_dir: RunDir, episode_id: str, hashes: list[str]
) -> Iterator[str]:
    """Write the screenshots, one file per step; yields their paths relative to `results`."""
    if not hashes:
        return
    request = replay_pb2.FetchImagesRequest(hashes=sorted(set(hashes)))
    images = {answer.image.hash: answer.image.data for answer in stub.FetchImages(request, timeout=_CALL_S)}
    target = run_dir.results / "screenshots" / episode_id.replace("/", "-")
    target.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(hashes):
        path = target / f"{number:02d}.png"
        write_atomically(path, images[name])
        yield str(path.relative_to(run_dir.results))
