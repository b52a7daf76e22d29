"""View models of the viewer: episodes, groups and filters in the words that its templates show."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from deskrl.analysis.formatting import enum_words
from deskrl.analysis.report.step_frames import Frame, make_frame
from deskrl.core.group_outcome import is_success
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE
from deskrl.replay.stored_episodes import DAMAGED, OUTCOMES, EpisodeFilter, EpisodeRecord, FilterOptions, GroupRecord

_FILTERS = ("task", "queue", "outcome", "termination", "fault", "version")
"""Fields of a filter that a page address can contain."""
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MAX_TITLE = 110
_OUTCOMES_BY_STATE = {DAMAGED: DAMAGED, "leased": "running", "planned": "pending", "faulted": "faulted"}


@dataclass(frozen=True)
class TaskNames:
    """What the run directory says about tasks, by task id."""

    instructions: Mapping[str, str] = field(default_factory=dict)
    applications: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeView:
    """An episode with its texts."""

    record: EpisodeRecord
    outcome: str
    """solved, failed, faulted, running or pending."""
    versions: str
    termination: str
    fault: str
    final_image: str
    """Hash of the screenshot of the end state; empty without one."""
    advantage: float | None
    """Advantage in the update of its group; None if it was not used for training, or is no longer stored."""
    title: str
    """Name of the task for a person: its id, or application and instruction if the id says nothing."""

    @property
    def url(self) -> str:
        """Address of its page."""
        return episode_url(self.record.episode_id)


@dataclass(frozen=True)
class FilterField:
    """Form field of a filter."""

    name: str
    label: str
    any_text: str
    """Text of the choice that does not filter."""
    options: list[tuple[str, str]] | None
    """Values and texts to choose from; None: number input."""
    chosen: str


@dataclass(frozen=True)
class MemberView:
    """A member of a group with the stored frames of its episode."""

    episode: EpisodeView
    frames: list[Frame]
    note: str
    """Role of the episode in its group, if it is a special one."""


@dataclass(frozen=True)
class LiveView:
    """An episode in progress with its last stored step."""

    episode: EpisodeView
    instruction: str
    frame: Frame | None
    """Last stored step, whose screenshot is the one before its action; None before the first step."""


def filter_fields(filters: EpisodeFilter, options: FilterOptions, names: TaskNames) -> list[FilterField]:
    """Return the form fields with their present values."""

    def form_field(name: str, label: str, any_text: str, choices: list[tuple[str, str]] | None) -> FilterField:
        value = getattr(filters, name)
        return FilterField(name, label, any_text, choices, "" if value is None else str(value))

    return [
        form_field("task", "task", "all tasks", _task_choices(options.tasks, names)),
        form_field("outcome", "outcome", "any", [(outcome, outcome) for outcome in OUTCOMES]),
        form_field("termination", "termination", "any", _enumeration(rollout_pb2.Termination, termination_text)),
        form_field("version", "policy version", f"0 to {options.newest_version}", None),
        form_field("fault", "fault", "any", _enumeration(rollout_pb2.FaultKind, fault_text)),
        form_field("queue", "queue", "all queues", [(queue, queue) for queue in options.queues]),
    ]


def _task_choices(tasks: Sequence[str], names: TaskNames) -> list[tuple[str, str]]:
    """Return values and texts of all tasks, ordered as a person reads them."""
    return sorted(((task, task_title(task, names)) for task in tasks), key=lambda it: it[1].lower())


def is_opaque(task_id: str) -> bool:
    """Return whether a task id says nothing to a person, like the UUIDs of OSWorld's tasks."""
    return _UUID.match(task_id) is not None


def task_title(task_id: str, names: TaskNames) -> str:
    """Return the name of a task for a person: its id, or application and instruction if the id says nothing."""
    instruction = names.instructions.get(task_id, "")
    if not instruction or not is_opaque(task_id):
        return task_id
    application = names.applications.get(task_id)
    text = instruction if len(instruction) <= _MAX_TITLE else f"{instruction[:_MAX_TITLE].rstrip()}…"
    return f"{application}: {text}" if application else text


def episode_view(
    record: EpisodeRecord,
    success_threshold: float,
    advantage: float | None = None,
    names: TaskNames | None = None,
) -> EpisodeView:
    """Return the view model of an episode."""
    outcome = _OUTCOMES_BY_STATE.get(record.state)
    if outcome is None:
        outcome = "solved" if record.reward is not None and is_success(record.reward, success_threshold) else "failed"
    return EpisodeView(
        record,
        outcome,
        version_text(record.oldest_version, record.newest_version),
        termination_text(record.termination),
        fault_text(record.fault_kind),
        "" if record.result is None or record.removed else record.result.final_image_hash,
        advantage,
        task_title(record.task_id, names or TaskNames()),
    )


def make_frames(steps: Sequence[Step], record: EpisodeRecord, size: tuple[int, int]) -> list[Frame]:
    """Return a frame for each step, then one of the end state if its screenshot differs from the last step's."""
    frames = [make_frame(step, *size) for step in steps]
    final = record.result.final_image_hash if record.result is not None and not record.removed else ""
    if final and (not frames or frames[-1].image != final):
        frames.append(Frame(None, final, None, "", "plain", "", ""))
    return frames


def member_note(record: EpisodeRecord, group: GroupRecord) -> str:
    """Return a note for the member that the candidate replaced, which is the first finished one; else empty."""
    finished = [member.rollout for member in group.members if member.state == "finished"]
    if group.used_candidate and finished[:1] == [record.rollout]:
        return "replaced by a stored success"
    return ""


def version_text(oldest: int | None, newest: int | None) -> str:
    """Return the policy versions of an episode: one number, or oldest to newest."""
    if oldest is None or newest is None:
        return "–"
    return str(newest) if oldest == newest else f"{oldest}–{newest}"


def termination_text(termination: int | None) -> str:
    """Return a termination in words; empty for None."""
    return "" if termination is None else enum_words(rollout_pb2.Termination.Name(termination), "TERMINATION_")


def fault_text(kind: int | None) -> str:
    """Return a kind of fault in words; empty for None."""
    return "" if kind is None else enum_words(rollout_pb2.FaultKind.Name(kind), "FAULT_KIND_")


def group_text(group: GroupRecord) -> str:
    """Return the state of a group in words."""
    if group.dropped_because:
        return f"dropped: {group.dropped_because.replace('_', ' ')}"
    use = "used for training" if group.queue == RATE_LIMITED_QUEUE else "used"
    return {
        "open": "in progress",
        "complete": "waiting for the learner" if group.queue == RATE_LIMITED_QUEUE else "complete",
        "bound": f"taken for batch {group.batch_id}",
        "consumed": f"{use} in batch {group.batch_id}",
        "closed": "closed with too few episodes",
    }[group.state]


def episode_url(episode_id: str, step: int | None = None) -> str:
    """Return the address of an episode, or of one of its steps, counted from 1."""
    return f"/episode/{quote(episode_id)}" + (f"?step={step}" if step is not None else "")


def group_url(group_id: str) -> str:
    """Return the address of a group."""
    return f"/group/{quote(group_id)}"


def list_url(filters: EpisodeFilter, before: int | None = None) -> str:
    """Return the address of the list of episodes that match."""
    query = {name: value for name in _FILTERS if (value := getattr(filters, name)) not in ("", None)}
    if before is not None:
        query["before"] = before
    return "/?" + urlencode(query) if query else "/"


def _enumeration(enum: Any, text_of: Callable[[int], str]) -> list[tuple[str, str]]:
    """Return values and texts of an enumeration, without the unspecified value."""
    return [(str(value.number), text_of(value.number)) for value in enum.DESCRIPTOR.values[1:]]
