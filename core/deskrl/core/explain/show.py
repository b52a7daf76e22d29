"""Lays an explanation out for a terminal. Knows words and tables; computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deskrl.core.config import RunConfig
from deskrl.core.explain.explanation import Explanation
from deskrl.core.explain.storage import most_checkpoints
from deskrl.core.explain.timing import Timing

_UNKNOWN = "unknown here"


def show(explanation: Explanation, config: RunConfig) -> None:
    """Print it."""
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]{explanation.name}[/]  preset {explanation.preset}, {explanation.model}")
    for title, rows in (
        ("Batches", _batches(explanation)),
        ("Rows, at full length", _rows(explanation)),
        ("Memory of one rank of the learner (a GPU)", _learner_memory(explanation, config)),
        ("Memory of one worker of a replica (a GPU)", _replica_memory(explanation, config)),
        ("Disk", _disk(explanation, config)),
        ("Pacing and wall clock", _timing(explanation, config)),
        ("The whole run", _whole(explanation, config)),
    ):
        console.print(f"\n[bold]{title}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("\n[bold]Where it departs from ARPO[/]")
    console.print(_differences(explanation))
    if explanation.arpo_keys:
        console.print("\n[bold]ARPO's keys[/]")
        console.print(_arpo_keys(explanation))
    for remark in explanation.remarks:
        console.print(f"[yellow]note[/]  {remark}", markup=True)


def _batches(explanation: Explanation) -> Iterable[tuple[str, str]]:
    told = explanation.batches
    steps = " + ".join(map(str, told.trajectories_per_optimizer_step))
    yield (
        "episodes of an update",
        f"{told.tasks_per_update} tasks x {told.rollouts} rollouts = {told.episodes_per_update}",
    )
    yield "optimizer steps of an update", f"{told.optimizer_steps_per_update}, of {steps} trajectories"
    yield "tasks", _UNKNOWN if told.num_tasks is None else str(told.num_tasks)
    if told.updates_per_epoch is not None:
        yield "updates of an epoch", f"{told.updates_per_epoch:g}"
        yield "updates in all", f"{told.num_updates}, {told.num_epochs:g} epochs"
    else:
        yield "updates in all", str(told.num_updates)
    if told.env_steps:
        yield "environment steps", f"{told.env_steps}: the update that reaches them is the last"
    yield "episodes in all", f"{told.num_episodes}, and those of groups that are dropped"
    if told.num_evaluation_episodes:
        yield "evaluation", f"{told.num_evaluation_episodes} episodes before, and as many after"


def _rows(explanation: Explanation) -> Iterable[tuple[str, str]]:
    told = explanation.rows
    width, height = told.image_size
    yield "a screenshot", f"{width} x {height}, {told.tokens_per_image} tokens ({told.patches_per_image} patches)"
    yield (
        "a trajectory",
        f"{told.steps} steps in {_count(told.rows_per_trajectory, 'row')}, {told.tokens_per_trajectory} tokens",
    )
    yield (
        "its longest row",
        f"{told.tokens_per_row} tokens: {told.images_per_row} screenshots, a prompt of about {told.prompt_tokens}, "
        f"answers of about {told.action_tokens}",
    )


def _learner_memory(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    told, learner = explanation.learner_memory, config.learner
    if told is None:
        yield "all", _UNKNOWN
        return
    yield "model", f"{_parameters(explanation.num_parameters or 0)} parameters in {learner.dtype}"
    yield "ranks", f"{learner.num_processes}, ZeRO stage {learner.zero_stage}"
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        yield name, _gib(getattr(told, name))
    yield "together", _gib(told.total)


def _replica_memory(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    told = explanation.replica_memory
    if told is None:
        yield "all", _UNKNOWN
        return
    yield "replicas", str(config.inference.num_replicas)
    yield "weights", f"{_gib(told.weights)} in {config.inference.quantization or config.inference.dtype}"
    if told.kv_cache is None or told.kv_tokens is None:
        yield "KV cache", _UNKNOWN
        return
    prompts = told.kv_tokens // max(1, explanation.rows.tokens_per_row)
    yield "KV cache", f"{_gib(told.kv_cache)}: {told.kv_tokens} tokens, {prompts} prompts of full length"


def _disk(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    each, most = explanation.checkpoint_bytes, most_checkpoints(config.learner)
    if each is None:
        yield "checkpoints", _UNKNOWN
    else:
        yield "checkpoints", f"{_gib(each)} each, {_gib(most * each)} for {most} of them"
        yield (
            "written",
            f"beside learning, if the learner's host memory has {_gib(each)} for a copy; else it waits",
        )
    yield "episodes", f"at most {_gib(config.replay.max_bytes)}"


def _timing(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    batch, staleness = explanation.batches.episodes_per_update, explanation.max_staleness
    yield "staleness", f"at most {staleness} updates"
    yield "pacing", f"running and unused episodes <= ({staleness} + 1 + updates) x {batch} - learnt"
    if config.desktop.provider == "embedded" and config.desktop.embedded.adds_time:
        yield "made slower", config.desktop.embedded.describe()
    told = explanation.timing
    if told is None:
        yield "wall clock", f"{_UNKNOWN}: tell --learn-s"
        return
    yield "desktops", f"{told.desktops} ({config.desktop.provider}), {told.desktops_allowed} of them at once"
    yield (
        "an episode",
        f"{_clock(told.episode_s)}: reset {told.env_reset_s:.3g} s, {told.steps:g} x (policy {told.act_s:g} s, "
        f"desktop {told.env_step_s:.3g} s), evaluation {told.evaluate_s:g} s {_waiting(told)}[dim](assumed)[/]",
    )
    yield "acting", f"{_clock(told.acting_s)} an update"
    yield "learning", f"{_clock(told.learning_s)} an update"
    how = "whichever is longer" if told.overlap else "one after the other"
    yield "an update", f"{_clock(told.update_s)}, {how}; {batch / told.update_s * 60:.1f} episodes a minute"


def _whole(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    told, timing, assumed = explanation.whole, explanation.timing, explanation.assumptions
    if told is None or timing is None:
        yield "hours", _UNKNOWN
        return
    yield "training", f"{told.num_updates} updates x {_clock(timing.update_s)} = {_clock(told.training_s)}"
    if told.num_evaluation_episodes is None:
        yield "evaluations", f"{_UNKNOWN}: the number of tasks"
    elif told.num_evaluation_episodes:
        yield (
            "evaluations",
            f"{told.num_evaluation_episodes} episodes x {_clock(timing.episode_s)} on {timing.desktops} desktops = "
            f"{_clock(told.evaluation_s)}",
        )
    before = "; the warm start comes before, and ends by itself" if config.learner.warm_start is not None else ""
    yield "in all", f"{_clock(told.run_s)}{before}"
    yield "GPUs", f"{told.num_gpus} x {_clock(told.run_s)} = {told.gpu_hours:.2f} GPU hours"
    yield "desktops", f"{timing.desktops} x {_clock(told.run_s)} = {told.desktop_hours:.2f} desktop hours"
    if told.cost is None:
        yield "cost", "tell --gpu-hour-price, --desktop-hour-price"
        return
    hours = (("gpu", told.gpu_hours), ("desktop", told.desktop_hours))
    prices = [(number, price) for name, number in hours if (price := assumed[f"{name}_hour_price"]) is not None]
    yield "cost", " + ".join(f"{number:.2f} h x {price:g}" for number, price in prices) + f" = {told.cost:.2f}"


def _waiting(told: Timing) -> str:
    return f"(desktops x {told.slowest:.1f}: all wait for the slowest) " if told.slowest > 1 else ""


def _differences(explanation: Explanation) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, show_lines=True)
    for column in ("", "paper", "ARPO's code", "this run"):
        table.add_column(column, overflow="fold")
    for row in explanation.differences:
        same = row.run == row.code
        table.add_row(row.topic, row.paper, row.code, row.run if same else f"[bold]{row.run}[/]")
    return table


def _arpo_keys(explanation: Explanation) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    for note in explanation.arpo_keys:
        table.add_row(note.key, str(note.value), note.became)
    return table


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _parameters(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.1f} million"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB" if num_bytes >= 1024**3 / 10 else f"{num_bytes / 1024**2:.1f} MiB"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
