"""Success of a random clicker on the pages of MiniWoB++, which is what a policy has to exceed.

An episode is at most `--clicks` clicks on uniformly distributed points of the page, without its instruction, on an
embedded desktop; it ends with the page. Its layout is one of the split `heldout`. Pages take turns, so that with
`--limit-s` each has as many episodes as any other one, or one more. Prints one JSON line; `--table` also writes the
rows of the table in docs/miniwob.md.

    python tests/bench/miniwob.py --package miniwob-1.1.0-py3-none-any.whl [--episodes N] [--clicks N] [--desktops N]
        [--limit-s S] [--table FILE] [--pages PAGE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.miniwob.make_tasks import main as make_tasks
from deskrl.actor.miniwob.page_run import PAGE_HEIGHT, PAGE_WIDTH, read_end
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import evaluate_task
from deskrl.actor.tasks.setup_steps import setup_task
from deskrl.actor.tasks.task_lists import load_list
from deskrl.core.config import DesktopConfig
from deskrl.core.ids import derive_seed

INSTRUCTION_HEIGHT = 50
"""Height in CSS pixels of the top of a page, which contains the instruction."""
REACTION_S = 0.05
CONFIG = DesktopConfig()
SCALE = min(CONFIG.width // PAGE_WIDTH, CONFIG.height // PAGE_HEIGHT)
Rewards = dict[str, list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=None)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--clicks", type=int, default=10)
    parser.add_argument("--desktops", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--pages", nargs="+", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deskrl-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            make_tasks(Path(folder) / "tasks", options.package, options.pages)
        tasks = load_list(Path(folder) / "tasks" / "heldout.json")
        started_s = time.monotonic()
        rewards, faults = asyncio.run(measure(tasks, options, Path(folder) / "desktops"))
    num_episodes = sum(map(len, rewards.values()))
    means = [sum(of_page) / len(of_page) for of_page in rewards.values() if of_page]
    summary = {
        "pages": len(tasks),
        "episodes": num_episodes,
        "episodes_per_page": [min(map(len, rewards.values())), max(map(len, rewards.values()))],
        "faults": faults,
        "mean_reward": round(sum(means) / max(len(means), 1), 4),
        "duration_s": round(time.monotonic() - started_s, 1),
    }
    print(json.dumps(summary))
    if options.table is not None:
        options.table.write_text("".join(row(page, rewards[page]) for page in sorted(rewards)), encoding="utf-8")


async def measure(tasks: Sequence[Task], options: argparse.Namespace, root: Path) -> tuple[Rewards, list[str]]:
    """Return the rewards by page, and the faults."""
    pending = [(task, number) for number in range(options.episodes) for task in tasks][::-1]
    deadline_s = time.monotonic() + options.limit_s
    rewards: Rewards = defaultdict(list)
    faults: list[str] = []

    async def work(name: str) -> None:
        desktop = make_desktop(CONFIG, name, root)
        try:
            while pending and time.monotonic() < deadline_s:
                task, number = pending.pop()
                page = task.id.removesuffix("-heldout")
                try:
                    rewards[page].append(await play(desktop, task, number, options.clicks))
                except DesktopError as error:
                    faults.append(f"{page}: {error}")
        finally:
            await desktop.close()

    async with asyncio.TaskGroup() as group:
        for number in range(options.desktops):
            group.create_task(work(f"d{number}"))
    return rewards, faults


async def play(desktop: Desktop, task: Task, number: int, num_clicks: int) -> float:
    """Play one episode and return its reward."""
    await desktop.reset()
    await setup_task(desktop, task, number)
    generator = random.Random(derive_seed("random clicker", task.id, number))
    for _ in range(num_clicks):
        x = generator.randrange(SCALE * PAGE_WIDTH)
        y = generator.randrange(SCALE * INSTRUCTION_HEIGHT, SCALE * PAGE_HEIGHT)
        await desktop.act(Action(ActionKind.CLICK, x=x, y=y))
        await asyncio.sleep(REACTION_S)
        if await read_end(desktop) is not None:
            break
    return (await evaluate_task(desktop, task, None)).reward


def row(page: str, rewards: Sequence[float]) -> str:
    """Return a row: page, episodes, episodes with reward 1, mean reward."""
    num_solved = sum(reward == 1.0 for reward in rewards)
    return f"| {page} | {num_solved} of {len(rewards)} | {sum(rewards) / len(rewards):.2f} |\n"


if __name__ == "__main__":
    main()
