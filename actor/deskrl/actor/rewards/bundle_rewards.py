"""Rewards of task bundles: the reward.py of each, loaded from the disk of this machine and computed as a reward term.

The code never comes from a rollout, which names only the task: an actor runs the files of the tasks in its own
configuration. A reward.py defines `reward`, a function of the ended episode or a class with a method `score`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.rewards.reward_interface import EndedEpisode, Score
from deskrl.actor.rewards.reward_registry import REWARDS
from deskrl.actor.rewards.reward_term import RewardTerm, readable
from deskrl.actor.tasks.evaluators import EvaluatorError, evaluate_declaration
from deskrl.actor.tasks.task_bundles import REWARD_FILE
from deskrl.actor.tasks.task_lists import task_source_files
from deskrl.core.config import RewardTermConfig, RunConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError

_MAX_REASON_CHARACTERS = 300


def find_reward_files(config: RunConfig) -> dict[str, Path]:
    """Return the reward.py of the bundles among a run's tasks, by task id; empty if this machine has no task files."""
    try:
        files = task_source_files(config.tasks, select_provider(config.desktop).provider.task_suite)
    except UserError:
        return {}
    found = {file.parent.name: file.with_name(REWARD_FILE) for file in files}
    return {task_id: path for task_id, path in found.items() if path.is_file()}


class BundleRewards:
    """Rewards of task bundles.

    Args:
        files: reward.py by task id.
        timeout_s: time limit in seconds of a reward.

    Raises:
        UserError: a file cannot be imported, or its `reward` is none.
    """

    def __init__(self, files: Mapping[str, Path], timeout_s: float) -> None:
        self._terms = {task_id: _load(task_id, path, timeout_s) for task_id, path in files.items()}

    async def score(self, desktop: Desktop, episode: EndedEpisode) -> Score:
        """Return the reward of an end state, after the policy's programs and, by default, all others are stopped.

        Raises:
            EvaluatorError: the reward is defective, or this machine does not have it.
            UnreadableStateError: the state of the desktop cannot be read.
            DesktopGone: the desktop no longer exists.
        """
        if (declared := evaluate_declaration(episode.task, episode.final_action)) is not None:
            return Score(declared.reward, declared.evidence)
        term = self._terms.get(episode.task.id)
        if term is None:
            where = "set tasks.suite or tasks.list of every actor to a folder with the bundle"
            raise EvaluatorError(f"task {episode.task.id}: this machine has no {REWARD_FILE} of it ({where})")
        await readable(desktop.stop_policy_programs())
        if not term.needs_session:
            await readable(desktop.stop_all_programs())
        score = await term.score(episode)
        await readable(desktop.stop_all_programs())
        return score


def _load(task_id: str, path: Path, timeout_s: float) -> RewardTerm:
    kind = f"{_import_module(path)}:reward"
    REWARDS.load(kind, str(path))
    return RewardTerm(f"of task {task_id}", RewardTermConfig(kind=kind), timeout_s)


def _import_module(path: Path) -> str:
    """Import a reward.py and return the name of its module, which no other bundle has.

    Raises:
        UserError: the file raised while it was imported, or defines no `reward`.
    """
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"deskrl_bundle_{re.sub(r'[^A-Za-z0-9]', '_', path.parent.name)}_{digest}"
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as for every path that ends in .py
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        del sys.modules[name]
        reason = typed_line(error, _MAX_REASON_CHARACTERS)
        raise UserError(f"{path}: raised while it was imported: {reason}", "correct the file") from error
    if not hasattr(module, "reward"):
        del sys.modules[name]
        raise UserError(f"{path}: defines no `reward`", "define a function `reward(episode)`, or a class of this name")
    return name
