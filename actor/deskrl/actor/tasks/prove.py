"""Task validation on real desktops: each task can be solved, and is not solved initially (`deskrl tasks prove`).

For each task, one episode without actions must not be a success, though its reward may be partial. Several episodes of
the scripted solution must be evaluated as 1.0: first the demonstration, then solutions with points sampled from their
boxes. All actions pass through the agent's text format and coordinates, so that exactly what the policy imitates is
validated. With `tasks.noise`, each episode has other noise of that level.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.policies import ScriptedPolicy
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import make_desktop, select_provider
from deskrl.actor.rewards.episode_reward import make_task_reward
from deskrl.actor.rewards.reward_interface import EpisodeAction, ended_episode
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError
from deskrl.actor.tasks.noise import with_noise
from deskrl.actor.tasks.setup_steps import SetupError, setup_task
from deskrl.actor.tasks.task_filter import unmet_requirements
from deskrl.actor.tasks.task_lists import named_source, task_source_files
from deskrl.actor.tasks.task_schema import read_task
from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import is_success
from deskrl.core.ids import derive_seed

_PHASES = ("reset", "setup", "act", "evaluate")


@dataclass
class Proof:
    """Result of the validation of one task."""

    task_id: str
    success_threshold: float
    """Rewards above this are successes."""
    initial_reward: float | None = None
    """Reward of the episode without actions; None if it did not run to completion."""
    solution_rewards: list[float] = field(default_factory=list)
    """Rewards of the episodes of the scripted solution."""
    problems: list[str] = field(default_factory=list)
    """Reasons why the task could not be validated."""
    durations_s: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in _PHASES})
    """Durations in seconds by phase; `act` has one value per action, the other phases one per episode."""

    @property
    def holds(self) -> bool:
        """Whether every episode of the solution succeeded and the episode without actions did not."""
        return (
            not self.problems
            and self.initial_reward is not None
            and not is_success(self.initial_reward, self.success_threshold)
            and bool(self.solution_rewards)
            and min(self.solution_rewards) == 1.0
        )

    @asynccontextmanager
    async def timed(self, phase: str, timeout_s: float) -> AsyncIterator[None]:
        """Record the duration of the block for a phase; raises TimeoutError with its name if it takes too long."""
        start_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"{phase} took longer than {timeout_s:g} s") from error
        self.durations_s[phase].append(time.monotonic() - start_s)


def main(
    config: RunConfig,
    suite: Path | None = None,
    task_ids: Sequence[str] = (),
    num_repeats: int = 3,
    list_path: Path | None = None,
    root: Path | None = None,
) -> int:
    """Validate tasks and print a table.

    Args:
        config: configuration, as in `prove`.
        suite: root of a suite; None: that of the desktop provider, or deskrl's own.
        task_ids: ids of the suite's tasks to validate; empty: all.
        num_repeats: number of sampled solutions per task, as in `prove`.
        list_path: task list to use instead of a suite and ids.
        root: directory of the list's task files, as in `locate_tasks`.

    Returns:
        Exit status: 0 if all proofs hold, else 1.
    """
    source = named_source(config.tasks, suite, task_ids, list_path, root)
    config = config.model_copy(update={"tasks": source})
    tasks = list(map(read_task, task_source_files(source, select_provider(config.desktop).provider.task_suite)))
    proofs = asyncio.run(prove(tasks, config, num_repeats))
    print_proofs(proofs)
    return 0 if all(proof.holds for proof in proofs) else 1


async def prove(tasks: Sequence[Task], config: RunConfig, num_repeats: int = 3) -> list[Proof]:
    """Validate tasks on `desktop.num_envs` desktops in parallel.

    Args:
        tasks: tasks to validate.
        config: configuration; the sections `desktop` and `agent`, the seed and `tasks.noise` are used.
        num_repeats: number of episodes with sampled points, in addition to the demonstration.

    Returns:
        The proofs in the order of the tasks.
    """
    pending = list(reversed(tasks))
    proofs: dict[str, Proof] = {}

    async def work(name: str, root: Path) -> None:
        while pending:
            task = pending.pop()
            desktop = make_desktop(config.desktop, name, root)
            try:
                proofs[task.id] = await _prove_task(desktop, task, config, num_repeats)
            finally:
                await desktop.close()

    with tempfile.TemporaryDirectory(prefix="deskrl-") as directory:
        async with asyncio.TaskGroup() as group:
            for number in range(min(config.desktop.num_envs, len(tasks))):
                group.create_task(work(f"d{number}", Path(directory) / "desktops"))
    return [proofs[task.id] for task in tasks]


async def _prove_task(desktop: Desktop, task: Task, config: RunConfig, num_repeats: int) -> Proof:
    threshold = config.replay.success_threshold
    proof = Proof(task.id, threshold)
    proof.problems += unmet_requirements(task, select_provider(config.desktop).provider)
    if not task.solution:
        proof.problems.append("no scripted solution")
    if proof.problems:
        return proof
    try:
        untimed = Proof(task.id, threshold)  # a negative evaluation is repeated, so that its duration is not typical
        variant = with_noise(task, config.tasks.noise, derive_seed(config.seed, "initial"))
        proof.initial_reward = await _run_episode(desktop, variant, config, [], untimed)
        for number in range(num_repeats + 1):
            variant = with_noise(task, config.tasks.noise, derive_seed(config.seed, number))
            solution = variant.solve(config.seed + number - 1) if number else variant.demonstrate()
            proof.solution_rewards.append(await _run_episode(desktop, variant, config, solution, proof))
    except (DesktopError, SetupError, EvaluatorError, UnreadableStateError, FormatError, OSError) as error:
        # OSError includes TimeoutError and a full disk
        proof.problems.append(f"{type(error).__name__}: {error}")
    return proof


async def _run_episode(
    desktop: Desktop, task: Task, config: RunConfig, solution: Sequence[tuple[str, Action]], proof: Proof
) -> float:
    """Run one episode of a scripted solution and return its reward; with an empty solution, take no action."""
    limits = config.desktop
    async with proof.timed("reset", limits.start_timeout_s):
        await desktop.reset()
    async with proof.timed("setup", limits.setup_timeout_s):
        instruction = await setup_task(desktop, task, config.seed, limits)
        screenshot = await desktop.settle(ScriptedPolicy.min_quiet_s)
    conversation = Agent(config.agent).start_conversation(instruction)
    last = Action(ActionKind.FINISHED)
    actions: list[EpisodeAction] = []
    png_files: list[bytes] = []
    for thought, action in solution:
        png_files.append(conversation.observe(screenshot).data)
        text = conversation.render(PolicyResponse(thought, action))
        conversation.respond(text)
        last = conversation.parse(text).action
        actions.append(EpisodeAction(thought, last))
        if last.ends_episode:
            break
        async with proof.timed("act", limits.step_timeout_s):
            await desktop.act(last)
            screenshot = await desktop.settle(ScriptedPolicy.min_quiet_s)
    async with proof.timed("evaluate", limits.evaluate_timeout_s):
        ended = ended_episode(desktop, task, actions, png_files, last, config.seed)
        return (await make_task_reward(config).evaluate(desktop, ended)).reward


def print_proofs(proofs: Sequence[Proof]) -> None:
    """Print a table with one row per task and the median duration of each phase."""
    from rich.table import Table

    from deskrl.core.console import table_console

    table = Table("task", "initial reward", "solved", *[f"{phase} s" for phase in _PHASES], "proof")
    for proof in proofs:
        initial = "–" if proof.initial_reward is None else f"{proof.initial_reward:.3g}"
        solved = f"{sum(reward == 1.0 for reward in proof.solution_rewards)} of {len(proof.solution_rewards)}"
        if partial := [reward for reward in proof.solution_rewards if 0 < reward < 1]:
            solved += f" (lowest partial reward {min(partial):.3g})"
        medians = [
            f"{statistics.median(durations):.2f}" if (durations := proof.durations_s[phase]) else "–"
            for phase in _PHASES
        ]
        verdict = "[green]holds" if proof.holds else f"[red]{'; '.join(proof.problems) or 'fails'}"
        table.add_row(proof.task_id, initial, solved, *medians, verdict)
    table_console().print(table)
