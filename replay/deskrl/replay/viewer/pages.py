"""From records to what the templates show: words, versions, verdicts. Knows what is worth saying; no SQL, no markup."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from deskrl.core.report.frames import Frame, frame_of
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.pacing import PACED_QUEUE
from deskrl.replay.viewer.browse import OUTCOMES, Choices, EpisodeRecord, Filters, GroupRecord

_VERDICTS = {"leased": "running", "planned": "waiting", "faulted": "faulted"}


@dataclass(frozen=True)
class EpisodeView:
    """An episode in words."""

    record: EpisodeRecord
    verdict: str
    """solved, failed, faulted, running or waiting."""
    versions: str
    ending: str
    fault: str
    final_image: str
    advantage: float | None
    """What it was worth in its group's update; None if it was not learnt from, or that is not kept."""

    @property
    def url(self) -> str:
        """Its page."""
        return episode_url(self.record.episode_id)


@dataclass(frozen=True)
class FilterField:
    """One thing to filter by."""

    name: str
    label: str
    any: str
    """What it says when nothing is asked for."""
    options: list[tuple[str, str]] | None
    """Value and text; None: a number."""
    chosen: str


@dataclass(frozen=True)
class MemberView:
    """A member of a group: the episode and the frames that are kept of it."""

    episode: EpisodeView
    frames: list[Frame]
    standing: str
    """What became of it in its group, where that is not plain."""


def filter_fields(filters: Filters, choices: Choices) -> list[FilterField]:
    """What there is to filter by, and what is asked for."""

    def field(name: str, label: str, any_text: str, options: list[tuple[str, str]] | None) -> FilterField:
        value = getattr(filters, name)
        return FilterField(name, label, any_text, options, "" if value is None else str(value))

    return [
        field("task", "task", "all tasks", [(task, task) for task in choices.tasks]),
        field("outcome", "outcome", "any", [(outcome, outcome) for outcome in OUTCOMES]),
        field("termination", "ended by", "anything", _enumeration(rollout_pb2.Termination, termination_text)),
        field("version", "version", f"0 to {choices.newest_version}", None),
        field("fault", "fault", "with or without", _enumeration(rollout_pb2.FaultKind, fault_text)),
        field("queue", "queue", "all queues", [(queue, queue) for queue in choices.queues]),
    ]


def episode_view(record: EpisodeRecord, success_above: float, advantage: float | None = None) -> EpisodeView:
    """The episode in words."""
    verdict = _VERDICTS.get(record.state)
    if verdict is None:
        verdict = "solved" if record.reward is not None and record.reward > success_above else "failed"
    return EpisodeView(
        record,
        verdict,
        version_text(record.oldest_version, record.newest_version),
        termination_text(record.termination),
        fault_text(record.fault_kind),
        "" if record.result is None or record.removed else record.result.final_image_hash,
        advantage,
    )


def frames_of(steps: Sequence[Step], record: EpisodeRecord, size: tuple[int, int]) -> list[Frame]:
    """A frame for each step, then the end state if it was caught and looks other than the last step."""
    frames = [frame_of(step, *size) for step in steps]
    final = record.result.final_image_hash if record.result is not None and not record.removed else ""
    if final and (not frames or frames[-1].image != final):
        frames.append(Frame(None, final, None, "", "plain", "", ""))
    return frames


def standing_of(record: EpisodeRecord, group: GroupRecord) -> str:
    """Which member made room for a stored success: the first that finished."""
    finished = [member.rollout for member in group.members if member.state == "finished"]
    if group.used_candidate and finished[:1] == [record.rollout]:
        return "made room for a stored success"
    return ""


def version_text(oldest: int | None, newest: int | None) -> str:
    """The policy versions of an episode: one number, or from the oldest to the newest."""
    if oldest is None or newest is None:
        return "–"
    return str(newest) if oldest == newest else f"{oldest}–{newest}"


def termination_text(termination: int | None) -> str:
    """How the policy's episode ended, in words."""
    return "" if termination is None else _words(rollout_pb2.Termination.Name(termination), "TERMINATION_")


def fault_text(kind: int | None) -> str:
    """A kind of fault, in words."""
    return "" if kind is None else _words(rollout_pb2.FaultKind.Name(kind), "FAULT_KIND_")


def group_text(group: GroupRecord) -> str:
    """What became of a group."""
    if group.dropped_because:
        return f"not learnt from: {group.dropped_because.replace('_', ' ')}"
    use = "learnt from" if group.queue == PACED_QUEUE else "used"
    return {
        "open": "being played",
        "complete": "waits for the learner",
        "bound": f"being {use}, batch {group.batch_id}",
        "consumed": f"{use}, batch {group.batch_id}",
        "closed": "closed",
    }[group.state]


def ago_text(unix_s: float | None) -> str:
    """How long ago, roughly."""
    if unix_s is None:
        return ""
    past_s = max(0.0, time.time() - unix_s)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if past_s >= length_s:
            return f"{past_s / length_s:.0f} {unit} ago"
    return f"{past_s:.0f} s ago"


def episode_url(episode_id: str, step: int | None = None) -> str:
    """The page of an episode, or of one of its steps, counted from 1."""
    return f"/episode/{quote(episode_id)}" + (f"?step={step}" if step is not None else "")


def group_url(group_id: str) -> str:
    """The page of a group."""
    return f"/group/{quote(group_id)}"


def list_url(filters: Filters, before: int | None = None) -> str:
    """The page of the episodes that match."""
    asked = {name: value for name, value in vars(filters).items() if value not in ("", None)}
    if before is not None:
        asked["before"] = before
    return "/?" + urlencode(asked) if asked else "/"


def _enumeration(enum: Any, text_of: Callable[[int], str]) -> list[tuple[str, str]]:
    """An enumeration's values in words, but for the one that means none."""
    return [(str(value.number), text_of(value.number)) for value in enum.DESCRIPTOR.values[1:]]


def _words(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower().replace("_", " ")
