"""Terminal output of an explanation."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.highlighter import NullHighlighter
from rich.table import Table

from deskrl.actor.desktops.provider_registry import describe_added_delays
from deskrl.analysis.explain.explanation import Explanation
from deskrl.analysis.explain.update_time import UpdateTiming
from deskrl.analysis.formatting import format_size
from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.console import table_console
from deskrl.launch.sizing.footprint import max_checkpoints

_UNKNOWN = "unknown"


def print_explanation(explanation: Explanation, config: RunConfig) -> None:
    """Print an explanation to the terminal."""
    console = table_console()
    console.highlighter = NullHighlighter()
    console.print(f"[bold]{explanation.name}[/]  preset {explanation.preset}, {explanation.model}")
    for title, rows in (
        ("Batches", _batches(explanation)),
        ("Rows of a trajectory of maximum length", _rows(explanation)),
        ("GPU memory of one learner rank", _learner_memory(explanation, config)),
        ("GPU memory of one replica worker", _replica_memory(explanation, config)),
        ("Disk", _disk(explanation, config)),
        ("Staleness and wall-clock time of an update", _timing(explanation, config)),
        ("Whole run", _whole(explanation, config)),
    ):
        console.print(f"\n[bold]{title}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("\n[bold]Differences from ARPO[/]")
    console.print(_differences(explanation))
    if explanation.arpo_keys:
        console.print("\n[bold]Translated ARPO keys[/]")
        console.print(_arpo_keys(explanation))
    for remark in explanation.remarks:
        console.print(f"[yellow]note[/]  {remark}", markup=True)


def _batches(explanation: Explanation) -> Iterable[tuple[str, str]]:
    batches = explanation.batches
    steps = " + ".join(map(str, batches.trajectories_per_optimizer_step))
    yield (
        "episodes per update",
        f"{batches.tasks_per_update} tasks x {batches.rollouts} rollouts = {batches.episodes_per_update}",
    )
    yield "optimizer steps per update", f"{batches.optimizer_steps_per_update}, of {steps} trajectories"
    yield "tasks", _UNKNOWN if batches.num_tasks is None else str(batches.num_tasks)
    if batches.updates_per_epoch is not None:
        yield "updates per epoch", f"{batches.updates_per_epoch:g}"
        yield "updates", f"{batches.num_updates}, {batches.num_epochs:g} epochs"
    else:
        yield "updates", str(batches.num_updates)
    if batches.env_steps:
        yield "environment steps", f"{batches.env_steps}: the run ends with the update that reaches this number"
    yield "episodes", f"{batches.num_episodes}, plus those of dropped groups"
    if batches.num_evaluation_episodes:
        yield "evaluation", f"{batches.num_evaluation_episodes} episodes before training, and as many after"


def _rows(explanation: Explanation) -> Iterable[tuple[str, str]]:
    rows = explanation.rows
    width, height = rows.image_size
    yield "screenshot", f"{width} x {height}, {rows.tokens_per_image} tokens ({rows.patches_per_image} patches)"
    yield (
        "trajectory",
        f"{rows.steps} steps in {_count(rows.rows_per_trajectory, 'row')}, {rows.tokens_per_trajectory} tokens",
    )
    yield (
        "longest row",
        f"{rows.tokens_per_row} tokens: {rows.images_per_row} screenshots, "
        f"a prompt of about {rows.prompt_tokens} tokens, answers of about {rows.action_tokens} tokens",
    )


def _learner_memory(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    memory, learner = explanation.learner_memory, config.learner
    if memory is None:
        yield "total", _UNKNOWN
        return
    yield "model", f"{_parameters(explanation.num_parameters or 0)} parameters in {learner.dtype}"
    nodes = f" on {learner.num_nodes} nodes" if learner.num_nodes > 1 else ""
    yield "ranks", f"{learner.num_ranks}{nodes}, ZeRO stage {learner.zero_stage}"
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        yield name, format_size(getattr(memory, name))
    if learner.grpo.kl_coefficient:
        yield "reference policy", _reference(memory.reference, learner)
    yield "total", format_size(memory.total)


def _reference(num_bytes: int, learner: LearnerConfig) -> str:
    if learner.has_lora:
        return "none of its own: the model without the adapter"
    if not learner.offload_reference:
        return format_size(num_bytes)
    more = f", {format_size(num_bytes)} more than the rest of the peak leaves" if num_bytes else ""
    return f"on the GPU only while it scores tokens{more}"


def _replica_memory(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    memory = explanation.replica_memory
    if memory is None:
        yield "total", _UNKNOWN
        return
    yield "replicas", str(config.inference.num_replicas)
    yield "weights", f"{format_size(memory.weights)} in {config.inference.quantization or config.inference.dtype}"
    if memory.kv_cache is None or memory.kv_tokens is None:
        yield "KV cache", _UNKNOWN
        return
    prompts = memory.kv_tokens // max(1, explanation.rows.tokens_per_row)
    yield "KV cache", f"{format_size(memory.kv_cache)}: {memory.kv_tokens} tokens, {prompts} prompts of maximum length"


def _disk(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    size, num = explanation.checkpoint_bytes, max_checkpoints(config.learner)
    if size is None:
        yield "checkpoints", _UNKNOWN
    else:
        yield "checkpoints", f"{format_size(size)} each, {format_size(num * size)} for {num} of them"
        needed = f"{format_size(size)} of free host memory for a copy"
        yield "writing", f"in the background, if the learner has {needed}; else training waits"
    yield "episodes", f"at most {format_size(config.replay.max_bytes)}"


def _timing(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    batch, staleness = explanation.batches.episodes_per_update, explanation.max_staleness
    yield "staleness", f"at most {staleness} updates"
    yield "rate limiter", f"running and untrained episodes <= ({staleness} + 1 + updates) x {batch} - trained episodes"
    if delays := describe_added_delays(config.desktop):
        yield "added delays", delays
    timing = explanation.timing
    if timing is None:
        yield "wall clock", f"{_UNKNOWN}: set --learn-s"
        return
    yield (
        "desktops",
        f"{timing.desktops} ({config.desktop.provider}), of which {timing.desktops_allowed} may run at once",
    )
    yield (
        "episode",
        f"{_clock(timing.episode_s)}: reset {timing.env_reset_s:.3g} s, {timing.steps:g} x (policy {timing.act_s:g} s, "
        f"desktop {timing.env_step_s:.3g} s), evaluation {timing.evaluate_s:g} s {_waiting(timing)}[dim](assumed)[/]",
    )
    yield "acting", f"{_clock(timing.acting_s)} per update"
    yield "training", f"{_clock(timing.learning_s)} per update"
    how = "the longer of both" if timing.overlap else "one after the other"
    yield "update", f"{_clock(timing.update_s)}, {how}; {batch / timing.update_s * 60:.1f} episodes per minute"


def _whole(explanation: Explanation, config: RunConfig) -> Iterable[tuple[str, str]]:
    cost, timing, assumed = explanation.whole, explanation.timing, explanation.assumptions
    if cost is None or timing is None:
        yield "duration", _UNKNOWN
        return
    yield "training", f"{cost.num_updates} updates x {_clock(timing.update_s)} = {_clock(cost.training_s)}"
    if cost.num_evaluation_episodes is None:
        yield "evaluations", f"{_UNKNOWN}, as the number of tasks is"
    elif cost.num_evaluation_episodes:
        yield (
            "evaluations",
            f"{cost.num_evaluation_episodes} episodes x {_clock(timing.episode_s)} on {timing.desktops} desktops = "
            f"{_clock(cost.evaluation_s)}",
        )
    warm_start = (
        ", plus the warm start, whose duration is not predicted" if config.learner.warm_start is not None else ""
    )
    yield "total", f"{_clock(cost.run_s)}{warm_start}"
    yield "GPUs", f"{cost.num_gpus} x {_clock(cost.run_s)} = {cost.gpu_hours:.2f} GPU hours"
    yield "desktops", f"{timing.desktops} x {_clock(cost.run_s)} = {cost.desktop_hours:.2f} desktop hours"
    if cost.cost is None:
        yield "cost", f"{_UNKNOWN}: set --gpu-hour-price, --desktop-hour-price"
        return
    hours = (("gpu", cost.gpu_hours), ("desktop", cost.desktop_hours))
    prices = [(number, price) for name, number in hours if (price := assumed[f"{name}_hour_price"]) is not None]
    yield "cost", " + ".join(f"{number:.2f} h x {price:g}" for number, price in prices) + f" = {cost.cost:.2f}"


def _waiting(timing: UpdateTiming) -> str:
    return f"(desktop times x {timing.slowest:.1f}: all wait for the slowest) " if timing.slowest > 1 else ""


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
        table.add_row(note.key, str(note.value), note.outcome)
    return table


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _parameters(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.1f} million"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
