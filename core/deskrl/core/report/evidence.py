"""Asks a running replay service what happened: counters, envelopes of all episodes, a few episodes whole.

Knows the replay contract and which episodes are worth showing; nothing of how. A service that does not answer leaves a
stated gap, since the rest of a report does not need it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from deskrl.core.rpc import connect_sync
from deskrl.core.trajectory import CodecError, Step, decode_step
from deskrl.proto.v1 import replay_pb2, replay_pb2_grpc, rollout_pb2

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0
"""How long a service that has just been started may take to answer."""

_IMAGE_TIMEOUT_S = 20.0
_LIST_TIMEOUT_S = 120.0
_BATCH = 64
_MAX_IMAGES = 400
"""Screenshots of one page; tasks beyond are named but not shown."""


@dataclass(frozen=True)
class ShownEpisode:
    """An episode with its steps decoded; a step that cannot be read is None."""

    envelope: replay_pb2.Episode
    steps: list[Step | None]

    @property
    def image_hashes(self) -> list[str]:
        """The screenshots in the order of the steps, then the one of the end state."""
        hashes = [step.screenshot for step in self.steps if step is not None]
        return [name for name in [*hashes, self.envelope.result.final_image_hash] if name]


@dataclass(frozen=True)
class TaskEvidence:
    """One failed and one solved episode of a task, where replay has any, and how many there were."""

    task_id: str
    failed: ShownEpisode | None
    solved: ShownEpisode | None
    num_failed: int
    num_solved: int


@dataclass(frozen=True)
class Evidence:
    """What replay knows of a run."""

    status: replay_pb2.GetReplayStatusResponse | None = None
    envelopes: list[replay_pb2.Episode] = field(default_factory=list)
    tasks: list[TaskEvidence] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    not_shown: list[str] = field(default_factory=list)
    """Tasks left out for the size of the page."""
    problem: str = ""
    """Why something is missing, as one line."""


def gather(address: str, task_order: Sequence[str], success_above: float) -> Evidence:
    """Everything a report takes from replay.

    Args:
        address: of the replay service, `host:port`.
        task_order: tasks to show first; others follow by name.
        success_above: a reward above this is a success.
    """
    found = Evidence()
    with connect_sync(address) as channel:
        stub = replay_pb2_grpc.ReplayServiceStub(channel)
        try:
            status = stub.GetReplayStatus(
                replay_pb2.GetReplayStatusRequest(), timeout=CONNECT_TIMEOUT_S, wait_for_ready=True
            )
            found = Evidence(status=status)
            envelopes = list(_list(stub, replay_pb2.ListEpisodesRequest(envelope_only=True)))
            found = Evidence(status=status, envelopes=envelopes)
            return _with_examples(found, stub, task_order, success_above)
        except grpc.RpcError as error:
            problem = f"the replay service at {address} did not give everything: {error.code().name} {error.details()}"
            logger.warning("report: %s", problem)
            return Evidence(found.status, found.envelopes, problem=problem)


def _list(
    stub: replay_pb2_grpc.ReplayServiceStub, request: replay_pb2.ListEpisodesRequest
) -> Iterator[replay_pb2.Episode]:
    for reply in stub.ListEpisodes(request, timeout=_LIST_TIMEOUT_S):
        yield reply.episode


def _with_examples(
    found: Evidence, stub: replay_pb2_grpc.ReplayServiceStub, task_order: Sequence[str], success_above: float
) -> Evidence:
    by_task: dict[str, list[replay_pb2.Episode]] = {}
    for envelope in found.envelopes:
        if envelope.acting_policy != rollout_pb2.ACTING_POLICY_SCRIPTED and envelope.HasField("result"):
            by_task.setdefault(envelope.task_id, []).append(envelope)
    order = list(dict.fromkeys([*task_order, *sorted(by_task)]))
    tasks: list[TaskEvidence] = []
    images: dict[str, bytes] = {}
    not_shown: list[str] = []
    for task in order:
        if len(images) >= _MAX_IMAGES:
            not_shown.append(task)
            continue
        failed, solved = by_preference(by_task.get(task, []), success_above)
        evidence = TaskEvidence(task, _whole(stub, failed), _whole(stub, solved), len(failed), len(solved))
        for shown in (evidence.failed, evidence.solved):
            for name in shown.image_hashes if shown else ():
                if name not in images and (data := _fetch_image(stub, name)):
                    images[name] = data
        tasks.append(evidence)
    return Evidence(found.status, found.envelopes, tasks, images, not_shown)


def by_preference(
    episodes: Sequence[replay_pb2.Episode], success_above: float
) -> tuple[list[replay_pb2.Episode], list[replay_pb2.Episode]]:
    """Failed episodes and solved ones, those that tell most of what was learnt first.

    That is the earliest of the worst failures, with more than a single step where there is one, and the latest of the
    best successes.
    """
    failed = [episode for episode in episodes if episode.result.reward <= success_above]
    solved = [episode for episode in episodes if episode.result.reward > success_above]
    failed.sort(key=lambda it: (it.result.num_steps < 2, it.result.reward, it.finished_unix_s))
    solved.sort(key=lambda it: (-it.result.reward, -it.finished_unix_s))
    return failed, solved


def _whole(stub: replay_pb2_grpc.ReplayServiceStub, preferred: Sequence[replay_pb2.Episode]) -> ShownEpisode | None:
    """The first of these episodes that retention has left, with its steps; None if it has left none."""
    ids = [envelope.episode_id for envelope in preferred]
    # Mostly the first one is there; where retention has passed, many are not.
    for batch in filter(None, [ids[:1], *(ids[start : start + _BATCH] for start in range(1, len(ids), _BATCH))]):
        kept = {it.episode_id: it for it in _list(stub, replay_pb2.ListEpisodesRequest(episode_ids=batch))}
        for name in batch:
            if name in kept:
                return ShownEpisode(kept[name], [_decode(data) for data in kept[name].steps])
    return None


def _decode(data: bytes) -> Step | None:
    try:
        return decode_step(data)
    except CodecError as error:
        logger.warning("report: a stored step is left out: %s", error)
        return None


def _fetch_image(stub: replay_pb2_grpc.ReplayServiceStub, name: str) -> bytes | None:
    """One screenshot; None if replay does not hold it, which is a gap in the page and no more."""
    try:
        replies = stub.FetchImages(replay_pb2.FetchImagesRequest(hashes=[name]), timeout=_IMAGE_TIMEOUT_S)
        return b"".join(reply.image.data for reply in replies)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        logger.warning("report: a screenshot is left out: %s", error.details())
        return None
