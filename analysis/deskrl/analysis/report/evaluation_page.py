"""Page of an evaluation: success by task set, application and task, pass@k, what is left out, and example episodes.

A finished evaluation is read from its result files, one in progress from the replay store.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.analysis.evaluation.episode_records import EvaluatedEpisode, EvaluatedTask, has_evaluation, read_evaluation
from deskrl.analysis.evaluation.summary import PassRate, SuccessRate, pass_at_k, success_rate
from deskrl.analysis.evaluation.summary_table import count_reasons
from deskrl.analysis.evaluation.task_sets import named_task_sets
from deskrl.analysis.report.replay_data import MAX_IMAGES, ReplayData, read_replay_data
from deskrl.analysis.report.report_view_models import TaskStrips, task_strips, termination_words
from deskrl.analysis.report.run_history import Count
from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import is_success
from deskrl.core.run_dir import RunDir


@dataclass(frozen=True)
class TaskRow:
    """Result of one task."""

    task_id: str
    application: str
    instruction: str
    is_infeasible: bool
    count: Count
    """Successes among the episodes that count."""
    mean_steps: float | None
    terminations: list[tuple[str, int]]
    num_uncounted: int
    num_pending: int


@dataclass(frozen=True)
class EvaluationPart:
    """Results of one task set."""

    name: str
    rate: SuccessRate
    groups: list[tuple[str, SuccessRate]]
    """Success by feasibility and by application."""
    pass_rates: list[tuple[int, PassRate]]
    """pass@k by k; empty if no task was repeated."""
    tasks: list[TaskRow]
    strips: list[TaskStrips]
    tasks_not_shown: list[str]
    left_out: Mapping[str, Sequence[str]]
    """Reasons by task."""
    reasons: list[tuple[str, int]]
    """Number of tasks that were left out by reason."""
    uncounted: list[tuple[str, int]]
    """Episodes that do not count, by cause."""
    num_planned: int
    """Number of episodes of the plan."""

    @property
    def num_listed(self) -> int:
        """Number of tasks of the list."""
        return len(self.tasks) + len(self.left_out)

    @property
    def num_evaluated(self) -> int:
        """Number of tasks with an episode that counts."""
        return sum(row.count.n > 0 for row in self.tasks)

    @property
    def num_pending(self) -> int:
        """Number of episodes that have not ended."""
        return sum(row.num_pending for row in self.tasks)


@dataclass(frozen=True)
class EvaluationView:
    """Everything that the page shows."""

    policy: str
    temperature: float | None
    repeats: int
    parts: list[EvaluationPart]
    images: dict[str, bytes]
    versions: list[str]
    problem: str
    """Why the replay store could not be read; empty if it was."""

    @property
    def is_finished(self) -> bool:
        """Whether all episodes have ended."""
        return all(part.num_pending == 0 for part in self.parts)


def evaluation_view(run_dir: RunDir, config: RunConfig) -> EvaluationView:
    """Read an evaluation, finished or in progress.

    Args:
        run_dir: directory of the evaluation, or of one of its task sets.
        config: its configuration.
    """
    owner = run_dir if (run_dir.root / "evaluation.json").is_file() else RunDir(run_dir.root.resolve().parents[1])
    plan = _read_json(owner.root / "evaluation.json").get("plan", {})
    repeats = int(plan.get("repeats", 1))
    sets = named_task_sets(run_dir.root)
    parts: list[EvaluationPart] = []
    images: dict[str, bytes] = {}
    versions: set[str] = set()
    problem = ""
    for name, root in sets.items():
        replay = read_replay_data(
            owner.replay,
            list(_read_json(RunDir(root).tasks)),
            config.replay.success_threshold,
            queue=f"eval/{name}",
            max_images=MAX_IMAGES // len(sets),
        )
        problem = problem or replay.problem
        images |= replay.images
        records = read_evaluation(root) if has_evaluation(root) else _records_in_progress(RunDir(root), replay)
        versions |= {v for record in records for e in record.episodes if e.reward is not None for v in e.versions}
        parts.append(_part(name, RunDir(root), records, replay, repeats, config))
    return EvaluationView(
        _describe_policy(config), plan.get("temperature"), repeats, parts, images, sorted(versions), problem
    )


def _describe_policy(config: RunConfig) -> str:
    if config.inference.external_url is not None:
        return f"{config.inference.external_model} at {config.inference.external_url}"
    return str(config.model.path or config.model.build)


def _part(
    name: str, run_dir: RunDir, records: Sequence[EvaluatedTask], replay: ReplayData, repeats: int, config: RunConfig
) -> EvaluationPart:
    threshold = config.replay.success_threshold
    instructions = {task: str(file.get("instruction", "")) for task, file in _read_json(run_dir.tasks).items()}
    infeasible = [record for record in records if record.infeasible]
    groups = [("feasible", [record for record in records if not record.infeasible]), ("infeasible", infeasible)]
    groups += [(app, [r for r in records if r.application == app]) for app in sorted({r.application for r in records})]
    left_out = _read_json(run_dir.left_out)
    uncounted = Counter(e.termination.replace("_", " ") for r in records for e in r.episodes if e.reward is None)
    return EvaluationPart(
        name=name,
        rate=success_rate(records, threshold),
        groups=[(label, success_rate(group, threshold)) for label, group in groups if group],
        pass_rates=[it for it in pass_at_k(records, threshold).items() if repeats > 1],
        tasks=[_task_row(record, instructions.get(record.task_id, ""), threshold, repeats) for record in records],
        strips=[it for it in task_strips(replay, instructions, config) if it.num_failed + it.num_solved],
        tasks_not_shown=replay.tasks_not_shown,
        left_out=left_out,
        reasons=count_reasons(left_out),
        uncounted=uncounted.most_common(),
        num_planned=len(records) * repeats,
    )


def _task_row(record: EvaluatedTask, instruction: str, success_threshold: float, repeats: int) -> TaskRow:
    counted = [episode for episode in record.episodes if episode.reward is not None]
    num_solved = sum(is_success(e.reward, success_threshold) for e in counted if e.reward is not None)
    return TaskRow(
        task_id=record.task_id,
        application=record.application,
        instruction=instruction,
        is_infeasible=record.infeasible,
        count=Count(num_solved, len(counted)),
        mean_steps=sum(e.num_steps for e in counted) / len(counted) if counted else None,
        terminations=Counter(e.termination.replace("_", " ") for e in counted).most_common(),
        num_uncounted=len(record.episodes) - len(counted),
        num_pending=max(0, repeats - len(record.episodes)),
    )


def _records_in_progress(run_dir: RunDir, replay: ReplayData) -> list[EvaluatedTask]:
    """Return the tasks with the episodes that have ended, as far as the replay store knows them."""
    applications = _read_json(run_dir.applications)
    records = []
    for task_id, file in _read_json(run_dir.tasks).items():
        evaluator = file.get("evaluator", {}).get("func") if isinstance(file, dict) else None
        episodes = [
            EvaluatedEpisode(
                episode_id=it.episode_id,
                seed=it.seed,
                reward=None if it.result is None else it.result.reward,
                termination="fault" if it.result is None else termination_words(it.result.termination),
                num_steps=it.num_steps,
                duration_s=0.0 if it.result is None else it.result.duration_s,
                timings_ms=(),
                versions=() if it.newest_version is None else (f"{it.lineage}/{it.newest_version}",),
                actions=(),
                screenshots=(),
                fault="" if it.last_fault is None else it.last_fault.message,
            )
            for it in replay.episodes
            if it.task_id == task_id
        ]
        application = str(applications.get(task_id, ""))
        records.append(EvaluatedTask(task_id, application, evaluator == "infeasible", tuple(episodes)))
    return records


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if the file is missing or damaged, so that the page shows the rest."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
