"""What is kept of an evaluation: a file for each task with its episodes, and their screenshots as files.

Knows the store's messages and the run folder; counts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder, write_atomically, write_json
from deskrl.core.trajectory import decode_step
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc, rollout_pb2

_CALL_S = 120.0


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode.

    `reward` is None where it says nothing of the policy: where it ended in faults only (termination `fault`), or
    another policy version than the evaluated one acted in it (`other_version`).
    """

    episode_id: str
    seed: int
    reward: float | None
    termination: str
    num_steps: int
    duration_s: float
    timings_ms: tuple[Mapping[str, float], ...]
    """Of each step, by part (`deskrl.core.timings`)."""
    versions: tuple[str, ...]
    """Policy versions that sampled its tokens, as lineage/step."""
    actions: tuple[str, ...]
    screenshots: tuple[str, ...]
    """Files below the folder of results: before each step, and of the end."""
    fault: str


@dataclass(frozen=True)
class TaskRecord:
    """A task and its episodes."""

    task_id: str
    application: str
    infeasible: bool
    episodes: tuple[EpisodeRecord, ...]


def collect(
    stub: replay_pb2_grpc.ReplayServiceStub, folder: RunFolder, queue: str, evaluated: str | None
) -> list[TaskRecord]:
    """All ended episodes of a queue by task, in the order of the task list; their screenshots become files.

    Args:
        stub: of the replay service.
        folder: of the tasks and their results.
        queue: whose episodes.
        evaluated: the policy version that counts, as lineage/step; None: versions are not known.
    """
    tasks = json.loads((folder.root / "tasks.json").read_text(encoding="utf-8"))
    applications = json.loads((folder.root / "applications.json").read_text(encoding="utf-8"))
    records = []
    for task_id, task in tasks.items():
        request = replay_pb2.ListEpisodesRequest(queue=queue, task_id=task_id)
        episodes = [answer.episode for answer in stub.ListEpisodes(request, timeout=_CALL_S)]
        episodes.sort(key=lambda episode: episode.episode_id)
        kept = tuple(_keep(stub, folder, episode, evaluated) for episode in episodes)
        record = TaskRecord(task_id, applications[task_id], task["evaluator"]["func"] == "infeasible", kept)
        write_json(folder.results / "task_results" / f"{task_id}.json", asdict(record))
        records.append(record)
    return records


def read_records(root: Path) -> list[TaskRecord]:
    """The tasks of an evaluation's folder.

    Raises:
        UserError: it holds none.
    """
    records = []
    for path in sorted((root / "results" / "task_results").glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            episodes = tuple(EpisodeRecord(**episode) for episode in raw.pop("episodes"))
            records.append(TaskRecord(**raw, episodes=episodes))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a training run keeps results of its own there
    if not records:
        raise UserError(f"{root} holds no evaluation", "name a folder that `deskrl eval` has written")
    return records


def record_of(episode: replay_pb2.Episode, evaluated: str | None) -> EpisodeRecord:
    """An episode as it is kept, without its screenshots; `evaluated` is as in `collect`."""
    steps = [decode_step(data) for data in episode.steps]
    versions = sorted({f"{span.lineage}/{span.step}" for step in steps for span in step.spans})
    reward: float | None = episode.result.reward
    termination = rollout_pb2.Termination.Name(episode.result.termination).removeprefix("TERMINATION_").lower()
    fault = ""
    if not episode.HasField("result"):
        reward, termination, fault = None, "fault", episode.last_fault.message
    elif evaluated is not None and (others := [version for version in versions if version != evaluated]):
        reward, termination = None, "other_version"
        fault = f"{', '.join(others)} acted, and {evaluated} is evaluated"
    return EpisodeRecord(
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


def _keep(
    stub: replay_pb2_grpc.ReplayServiceStub, folder: RunFolder, episode: replay_pb2.Episode, evaluated: str | None
) -> EpisodeRecord:
    hashes = [decode_step(data, with_ids=False).screenshot for data in episode.steps]
    if episode.HasField("result") and episode.result.final_image_hash:
        hashes.append(episode.result.final_image_hash)
    screenshots = tuple(_write_screenshots(stub, folder, episode.episode_id, hashes))
    return replace(record_of(episode, evaluated), screenshots=screenshots)


def _write_screenshots(
    stub: replay_pb2_grpc.ReplayServiceStub, folder: RunFolder, episode_id: str, hashes: list[str]
) -> Iterator[str]:
    """Write the pictures, one file for each place where it was seen; yields their paths below `results`."""
    if not hashes:
        return
    request = replay_pb2.FetchImagesRequest(hashes=sorted(set(hashes)))
    images = {answer.image.hash: answer.image.data for answer in stub.FetchImages(request, timeout=_CALL_S)}
    place = folder.results / "screenshots" / episode_id.replace("/", "-")
    place.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(hashes):
        path = place / f"{number:02d}.png"
        write_atomically(path, images[name])
        yield str(path.relative_to(folder.results))
