"""Reward of an episode: computes the configured terms in their order and returns their weighted mean.

The order keeps what the policy started away from the terms:

1. The policy's programs are stopped. Applications that the setup started continue to run.
2. Terms with `needs_session`, in the order of the configuration.
3. The term of the kind `evaluators`: post-configuration, getters that need a running application, then all programs are
   stopped and the other getters run.
4. All programs are stopped, if they are not yet.
5. All other terms, in the order of the configuration. They read files, and commands run with nothing beside them.

If `evaluators` is the only term, its evaluation is the reward, with its evidence unchanged. Otherwise the evidence is
`{"terms": {name: value}, "evidence": {name: evidence of the term}}`.
"""

from __future__ import annotations

from dataclasses import replace

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.rewards.bundle_rewards import BundleRewards, find_reward_files
from deskrl.actor.rewards.reward_interface import EndedEpisode, Score
from deskrl.actor.rewards.reward_term import RewardTerm, readable
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import Evaluation
from deskrl.core.config import RewardConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.group_outcome import is_success
from deskrl.core.reward_evidence import reward_terms


def make_reward(config: RunConfig) -> EpisodeReward:
    """Return the configured reward.

    Raises:
        UserError: a term is invalid.
    """
    timeout_s = config.desktop.evaluate_timeout_s
    bundles = BundleRewards(find_reward_files(config), timeout_s)
    return EpisodeReward(config.reward, timeout_s, config.replay.success_threshold, bundles)


def make_task_reward(config: RunConfig) -> EpisodeReward:
    """Return the reward by the tasks' own evaluators, whatever `config.reward` is; raises as `make_reward`."""
    return make_reward(config.model_copy(update={"reward": RewardConfig()}))


class EpisodeReward:
    """Weighted mean of the configured terms; without state of an episode.

    Args:
        config: section `reward` of the run configuration.
        evaluate_timeout_s: time limit in seconds of a term that has none of its own.
        success_threshold: rewards above this are successes.
        bundles: rewards of task bundles, which are the value of the term `evaluators` for their tasks.

    Raises:
        UserError: a term is invalid.
    """

    def __init__(
        self,
        config: RewardConfig,
        evaluate_timeout_s: float,
        success_threshold: float,
        bundles: BundleRewards | None = None,
    ) -> None:
        self._terms = [RewardTerm(name, term, evaluate_timeout_s) for name, term in config.terms.items()]
        self._success_threshold = success_threshold
        self._bundles = bundles or BundleRewards({}, evaluate_timeout_s)
        evaluators = [term.name for term in self._terms if term.is_task_evaluator]
        if len(evaluators) > 1:
            keys = " and ".join(f"reward.terms.{name}" for name in evaluators)
            raise UserError(f"{keys} are all of the kind evaluators, which stops all programs", "keep one of them")
        self._evaluators_name = evaluators[0] if evaluators else None

    @property
    def uses_evaluators_only(self) -> bool:
        """Whether the task's own evaluator is the only term."""
        return len(self._terms) == 1 and self._evaluators_name is not None

    def reads_screenshots(self, task: Task) -> bool:
        """Return whether a reward of a task's episodes may read the screenshots."""
        return not self.uses_evaluators_only or task.evaluator.is_reward_file

    @property
    def timeout_s(self) -> float:
        """Time limit in seconds of all terms together."""
        return sum(term.timeout_s for term in self._terms)

    async def evaluate(self, desktop: Desktop, episode: EndedEpisode) -> Evaluation:
        """Return the reward with its evidence. The desktop can only be reset afterwards.

        Args:
            desktop: desktop of the episode.
            episode: episode to evaluate.

        Raises:
            EvaluatorError: a reward, the task or the infrastructure is defective.
            UnreadableStateError: the state of the desktop cannot be read.
            DesktopGone: the desktop no longer exists.
        """
        try:
            if self.uses_evaluators_only:
                score = await self._score(desktop, self._terms[0], episode)
                return Evaluation(score.value, score.evidence)
            return await self._evaluate_terms(desktop, episode)
        finally:
            episode.desktop.close()

    def is_demonstration(self, reward: float, evidence_json: str) -> bool:
        """Return whether an episode of a scripted solution solved its task, so that it can be imitated.

        The task's own evaluator decides if it is a term: its value must be 1.0. The reward must be a success.
        """
        if self.uses_evaluators_only:
            return reward == 1.0
        is_solved = self._evaluators_name is None or reward_terms(evidence_json).get(self._evaluators_name) == 1.0
        return is_solved and is_success(reward, self._success_threshold)

    async def _evaluate_terms(self, desktop: Desktop, episode: EndedEpisode) -> Evaluation:
        scores: dict[str, Score] = {}

        async def add(term: RewardTerm) -> None:
            values = {name: score.value for name, score in scores.items()}
            scores[term.name] = await self._score(desktop, term, replace(episode, terms=values))

        await readable(desktop.stop_policy_programs())
        for term in self._terms:
            if term.needs_session and not term.is_task_evaluator:
                await add(term)
        for term in self._terms:
            if term.is_task_evaluator:
                await add(term)
        await readable(desktop.stop_all_programs())
        for term in self._terms:
            if not term.needs_session:
                await add(term)
        return self._weighted_mean(scores)

    async def _score(self, desktop: Desktop, term: RewardTerm, episode: EndedEpisode) -> Score:
        if term.is_task_evaluator and episode.task.evaluator.is_reward_file:
            return await self._bundles.score(desktop, episode)
        return await term.score(episode)

    def _weighted_mean(self, scores: dict[str, Score]) -> Evaluation:
        total = sum(term.weight * scores[term.name].value for term in self._terms)
        reward = min(1.0, total / sum(term.weight for term in self._terms))  # rounding can exceed 1
        values = {term.name: scores[term.name].value for term in self._terms}
        evidence = {
            term.name: scores[term.name].evidence for term in self._terms if scores[term.name].evidence is not None
        }
        return Evaluation(reward, {"terms": values} | ({"evidence": evidence} if evidence else {}))
