"""Proof that tasks can be solved and are not solved already: `deskrl tasks prove`. Knows no policy and no service.

Each task is played on a real desktop: once with nothing done, where its evaluator must say 0.0, and several times by
its scripted solution, where it must say 1.0: first as it is demonstrated, then at points drawn from its targets. All
go through the agent's text and its coordinates, so what is proven is what the policy will imitate.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.conversation import make_agent
from deskrl.actor.agent.grammar import FormatError, Turn
from deskrl.actor.agent.players import ScriptedPlayer
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider import make_desktop
from deskrl.actor.tasks.evaluators import EvaluatorError, evaluate_task
from deskrl.actor.tasks.files import Task, load_tasks
from deskrl.actor.tasks.lists import load_list
from deskrl.actor.tasks.playable import unplayable
from deskrl.actor.tasks.setup_steps import SetupError, setup_task
from deskrl.core.config import RunConfig

_PHASES = ("reset", "setup", "act", "evaluate")


@dataclass
class Proof:
    """What came of one task; seconds by phase hold one value for each time."""

    task_id: str
    untouched: float | None = None
    solved: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in _PHASES})

    @property
    def holds(self) -> bool:
        """Solvable each time, and not solved by doing nothing."""
        return not self.problems and self.untouched == 0.0 and bool(self.solved) and min(self.solved) == 1.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to a phase."""
        started = time.monotonic()
        yield
        self.seconds[phase].append(time.monotonic() - started)


def main(
    suite: Path | None = None,
    task_ids: Sequence[str] = (),
    num_times: int = 3,
    listed: Path | None = None,
    root: Path | None = None,
) -> int:
    """Prove tasks and print a table.

    Args:
        suite: root of a suite; None: deskrl's own.
        task_ids: which of its tasks; none named means all.
        num_times: as in `prove`.
        listed: a task list, in place of a suite and ids.
        root: folder of its task files, as in `lists.locate`.

    Returns:
        The exit status: 0 if every proof holds, else 1.
    """
    tasks = load_tasks(suite, task_ids) if listed is None else load_list(listed, root)
    proofs = asyncio.run(prove(tasks, RunConfig(), num_times))
    print_proofs(proofs)
    return 0 if all(proof.holds for proof in proofs) else 1


async def prove(tasks: Sequence[Task], config: RunConfig, num_times: int = 3) -> list[Proof]:
    """Prove each task on `desktop.num_envs` desktops at once.

    Args:
        tasks: what to prove.
        config: sections `desktop` and `agent`, and the seed of the first time.
        num_times: how often a solution drawn from its boxes is played, each time another, after the demonstration.
    """
    waiting = list(reversed(tasks))
    proofs: dict[str, Proof] = {}

    async def work(name: str, root: Path) -> None:
        while waiting:
            task = waiting.pop()
            desktop = make_desktop(config.desktop, name, root)
            try:
                proofs[task.id] = await _prove_task(desktop, task, config, num_times)
            finally:
                await desktop.close()

    with tempfile.TemporaryDirectory(prefix="deskrl-") as folder:
        async with asyncio.TaskGroup() as group:
            for number in range(min(config.desktop.num_envs, len(tasks))):
                group.create_task(work(f"d{number}", Path(folder) / "desktops"))
    return [proofs[task.id] for task in tasks]


async def _prove_task(desktop: Desktop, task: Task, config: RunConfig, num_times: int) -> Proof:
    proof = Proof(task.id)
    proof.problems += unplayable(task, here=config.desktop.provider == "embedded")
    if not task.solution:
        proof.problems.append("there is no scripted solution")
    if proof.problems:
        return proof
    try:
        untimed = Proof(task.id)  # an evaluator that waits in vain is no measure of one that does not
        proof.untouched = await _play(desktop, task, config, [], untimed)
        drawn = [task.solve(config.seed + number) for number in range(num_times)]
        for solution in [task.demonstrate(), *drawn]:
            proof.solved.append(await _play(desktop, task, config, solution, proof))
    except (DesktopError, SetupError, EvaluatorError, FormatError, TimeoutError) as error:
        proof.problems.append(f"{type(error).__name__}: {error}")
    return proof


async def _play(
    desktop: Desktop, task: Task, config: RunConfig, solution: Sequence[tuple[str, Action]], proof: Proof
) -> float:
    """One episode by a scripted solution, or with nothing done where that is empty."""
    limits = config.desktop
    with proof.timed("reset"):
        async with asyncio.timeout(limits.start_timeout_s):
            await desktop.reset()
    with proof.timed("setup"):
        async with asyncio.timeout(limits.setup_timeout_s):
            await setup_task(desktop, task, config.seed)
            screenshot = await desktop.settle(ScriptedPlayer.rest_s)
    conversation = make_agent(config.agent).begin(task.instruction)
    last = Action(ActionKind.FINISHED)
    for thought, action in solution:
        conversation.observe(screenshot)
        said = conversation.render(Turn(thought, action))
        conversation.respond(said)
        last = conversation.parse(said).action
        if last.ends_episode:
            break
        with proof.timed("act"):
            async with asyncio.timeout(limits.step_timeout_s):
                await desktop.act(last)
                screenshot = await desktop.settle(ScriptedPlayer.rest_s)
    with proof.timed("evaluate"):
        async with asyncio.timeout(limits.evaluate_timeout_s):
            return (await evaluate_task(desktop, task, last)).reward


def print_proofs(proofs: Sequence[Proof]) -> None:
    """A table: one line a task, median seconds by phase."""
    from rich.table import Table

    from deskrl.core.terminal import table_console

    table = Table("task", "untouched", "solved", *[f"{phase} s" for phase in _PHASES], "proof")
    for proof in proofs:
        untouched = "–" if proof.untouched is None else f"{proof.untouched:.1f}"
        solved = f"{sum(reward == 1.0 for reward in proof.solved)} of {len(proof.solved)}"
        medians = [f"{statistics.median(seen):.2f}" if (seen := proof.seconds[phase]) else "–" for phase in _PHASES]
        verdict = "[green]holds" if proof.holds else f"[red]{'; '.join(proof.problems) or 'fails'}"
        table.add_row(proof.task_id, untouched, solved, *medians, verdict)
    table_console().print(table)
