"""Audit of rewards on real desktops: scripted cheats must not be rewarded (`deskrl tasks audit`).

Each cheat is run against each task, as a policy could: either by keys and pointer alone (`INPUT_CHEATS`), or by a
program, as if a terminal were reachable (`cheat_program.PROGRAMS`). Cheats know what the evaluator expects to read, but
do not do what the task asks for. Episodes are run and ended like those of training, so that the audit also shows which
cheats end an episode with a fault, after which its rollout would be repeated instead of getting the reward 0.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.desktop_starts import reset_in_time
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.provider_registry import make_desktop, select_provider
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.rewards.episode_reward import make_reward
from deskrl.actor.task import Task
from deskrl.actor.tasks import cheat_program
from deskrl.actor.tasks.task_filter import unmet_requirements
from deskrl.actor.tasks.task_lists import named_source, task_source_files
from deskrl.actor.tasks.task_schema import read_task
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.group_outcome import is_success
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

_EVALUATE_WITHIN_S = 0.3  # in place of the task's own: a cheat is not late
_CHEAT_TIMEOUT_S = 15.0
_REACTION_S = 0.4
_PATHS = re.compile(r"[~\w./-]*\w[\w-]*\.\w+|~/[\w./-]+|/home/[\w./-]+")
_WORD = re.compile(r"[~\w./-]+")
_COMMON_TOOLS = ("python3", "python", "sh", "bash", "ls", "cat", "test", "wmctrl", "xdotool", "ssconvert")
_SOURCE = Path(cheat_program.__file__)
_CONTROL = ("nothing",)

_FILE_CHEATS = {
    *("pipes", "sockets", "links-to-memory", "links-to-zeros", "changing-links", "huge-files", "bombs"),
}
_BROWSER_CHEATS = {"developer-tools", "address-bar", "page-source", "forged-page"}
_BROWSERS = {"browser", "chrome", "chromium"}

Verdict = Literal["held", "rewarded", "fault", "skipped"]


@dataclass(frozen=True)
class Claims:
    """What a cheat knows of a task's evaluator."""

    texts: tuple[str, ...]
    """Texts that the evaluator expects to read."""
    paths: tuple[str, ...]
    """Files that the evaluator reads."""
    tools: tuple[str, ...]
    """Programs that the evaluator runs."""

    @property
    def text(self) -> str:
        """First line of the first text, for cheats that can give only one."""
        return self.texts[0].splitlines()[0] if self.texts[0] else "1"

    def to_json(self) -> str:
        """Return the claims as the argument of `cheat_program`."""
        return json.dumps({"texts": self.texts, "paths": self.paths, "tools": self.tools})


@dataclass(frozen=True)
class Attempt:
    """Result of one cheat against one task."""

    task_id: str
    cheat: str
    """Name of the cheat, or several names."""
    verdict: Verdict
    detail: str
    """Termination and evidence, or the fault."""


def cheat_names() -> tuple[str, ...]:
    """Return the names of all cheats; the first does nothing, as a control."""
    return (*_CONTROL, *INPUT_CHEATS, *cheat_program.PROGRAMS)


def cheat_description(name: str) -> str:
    """Return one line that says what a cheat does."""
    cheat = INPUT_CHEATS.get(name) or cheat_program.PROGRAMS.get(name)
    return (cheat.__doc__ or "").splitlines()[0] if cheat is not None else "Finish at once."


def main(
    config: RunConfig,
    suite: Path | None = None,
    task_ids: Sequence[str] = (),
    cheats: Sequence[str] = (),
    list_path: Path | None = None,
    root: Path | None = None,
) -> int:
    """Audit tasks and print a table.

    Args:
        config: configuration, as in `audit`.
        suite: root of a suite; None: that of the desktop provider, or deskrl's own.
        task_ids: ids of the tasks to audit; empty: all tasks of the suite or list.
        cheats: names of the cheats to run; empty: all.
        list_path: task list to use instead of a suite.
        root: directory of the list's task files, as in `locate_tasks`.

    Returns:
        Exit status: 0 if no cheat was rewarded or ended an episode with a fault, else 1.

    Raises:
        UserError: a task or cheat is unknown.
    """
    source = named_source(config.tasks, suite, () if list_path else task_ids, list_path, root)
    files = task_source_files(source, select_provider(config.desktop).provider.task_suite)
    tasks = [task for task in map(read_task, files) if not task_ids or task.id in task_ids]
    if unknown := set(task_ids) - {task.id for task in tasks}:
        raise UserError(f"{list_path}: no task {', '.join(sorted(unknown))}", "choose from the tasks of the list")
    config = config.model_copy(update={"tasks": source})
    if unknown := set(cheats) - set(cheat_names()):
        raise UserError(f"no cheat {', '.join(sorted(unknown))}", f"choose from {', '.join(cheat_names())}")
    attempts = asyncio.run(audit(tasks, config, cheats))
    print_attempts(attempts)
    return 0 if is_passed(attempts) else 1


def is_passed(attempts: Sequence[Attempt]) -> bool:
    """Return whether no attempt was rewarded or ended with a fault."""
    return not any(attempt.verdict in ("rewarded", "fault") for attempt in attempts)


async def audit(tasks: Sequence[Task], config: RunConfig, cheats: Sequence[str] = ()) -> list[Attempt]:
    """Run cheats against tasks on `desktop.num_envs` desktops in parallel.

    Args:
        tasks: tasks to audit.
        config: configuration; the sections `desktop` and `agent` and the seed are used.
        cheats: names of the cheats to run; empty: all.

    Returns:
        One attempt for each task and cheat, in the order of the tasks and cheats. Skipped are tasks whose requirements
        are not met on this machine, and cheats that have nothing to act on.
    """
    pairs = [(task, cheat) for task in tasks for cheat in (cheats or cheat_names())]
    pending = list(reversed(pairs))
    attempts: dict[tuple[str, str], Attempt] = {}

    async def work(name: str, root: Path) -> None:
        desktop = make_desktop(config.desktop, name, root)
        try:
            while pending:
                task, cheat = pending.pop()
                attempts[task.id, cheat] = await attempt_cheats(desktop, task, (cheat,), config)
        finally:
            await desktop.close()

    with tempfile.TemporaryDirectory(prefix="deskrl-") as directory:
        async with asyncio.TaskGroup() as group:
            for number in range(min(config.desktop.num_envs, len(pairs))):
                group.create_task(work(f"d{number}", Path(directory) / "desktops"))
    return [attempts[task.id, cheat] for task, cheat in pairs]


async def attempt_cheats(desktop: Desktop, task: Task, cheats: Sequence[str], config: RunConfig) -> Attempt:
    """Run one episode in which the policy runs cheats, one after the other."""
    name = " + ".join(cheats)
    if unmet := unmet_requirements(task, select_provider(config.desktop).provider):
        return Attempt(task.id, name, "skipped", "; ".join(unmet))
    if not any(_has_target(cheat, task) for cheat in cheats):
        return Attempt(task.id, name, "skipped", "the task has nothing that the cheat acts on")
    task = replace(task, evaluate_within_s=min(task.evaluate_within_s, _EVALUATE_WITHIN_S))
    try:
        result = await _run_cheats(desktop, task, cheats, config)
        # A task can have a partial reward for its initial state, which is not the cheat's.
        is_rewarded = is_success(result.reward, config.replay.success_threshold)
        if result.reward > 0 and tuple(cheats) != _CONTROL:
            is_rewarded = result.reward > (await _run_cheats(desktop, task, _CONTROL, config)).reward
    except (Fault, DesktopError) as error:
        return Attempt(task.id, name, "fault", f"{type(error).__name__}: {error}")
    termination = rollout_pb2.Termination.Name(result.termination).removeprefix("TERMINATION_").lower()
    detail = f"{termination}, reward {result.reward:g}: {result.evidence_json}"
    return Attempt(task.id, name, "rewarded" if is_rewarded else "held", detail)


async def _run_cheats(
    desktop: Desktop, task: Task, cheats: Sequence[str], config: RunConfig
) -> rollout_pb2.EpisodeResult:
    """Run an episode with cheats; raises Fault or DesktopError."""
    rollout = rollout_pb2.Rollout(
        episode_id="audit", task_id=task.id, task_json=task.data, seed=config.seed, max_steps=3
    )
    policy = CheatingPolicy(desktop, cheats, claims_of(task))
    await reset_in_time(desktop, config.desktop.start_timeout_s)
    episode = Episode(
        desktop,
        task,
        rollout,
        Agent(config.agent).start_conversation,
        policy,
        _NoSink(),
        config.desktop,
        enter=lambda state: None,
        reward=make_reward(config),
    )
    return await episode.run()


def _has_target(cheat: str, task: Task) -> bool:
    """Return whether a task has what a cheat acts on: files that the evaluator reads, or a browser."""
    if cheat in _FILE_CHEATS:
        return bool(claims_of(task).paths)
    return cheat not in _BROWSER_CHEATS or bool(_BROWSERS.intersection(name.lower() for name in task.related_apps))


class CheatingPolicy(ActorPolicy):
    """Policy that waits, cheats, and declares the task finished.

    Args:
        desktop: desktop of the episode.
        cheats: names of the cheats.
        claims: what the cheat knows.
    """

    def __init__(self, desktop: Desktop, cheats: Sequence[str], claims: Claims) -> None:
        self._desktop = desktop
        self._cheats = cheats
        self._claims = claims

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Wait in the first step, so that the policy has acted; cheat before the second (see the base class)."""
        action = Action(ActionKind.WAIT, seconds=0.1)
        if index > 0:
            for cheat in self._cheats:
                await run_cheat(self._desktop, cheat, self._claims)
            action = Action(ActionKind.FINISHED)
        text = conversation.render(PolicyResponse("", action))
        conversation.respond(text)
        images = conversation.prompt().images
        return Decision(Step(index=index, screenshot=screenshot.hash, images=images, text=text), {})


class _NoSink:
    """Discards screenshots and steps."""

    def add_image(self, image: common_pb2.Image) -> None:
        """Discard a screenshot."""

    def add_step(self, step: Step) -> None:
        """Discard a step."""


async def run_cheat(desktop: Desktop, name: str, claims: Claims) -> None:
    """Run a cheat; errors of the desktop are ignored, because a cheat may break it."""
    try:
        async with asyncio.timeout(2 * _CHEAT_TIMEOUT_S):
            if name in INPUT_CHEATS:
                await INPUT_CHEATS[name](desktop, claims)
            elif name in cheat_program.PROGRAMS:
                source = await asyncio.to_thread(_SOURCE.read_text)
                command = ["/usr/bin/python3", "-I", "-c", source, name, claims.to_json()]
                await desktop.execute(command, timeout_s=_CHEAT_TIMEOUT_S)
                await asyncio.sleep(_REACTION_S)
    except (DesktopError, TimeoutError):
        return


def claims_of(task: Task) -> Claims:
    """Derive what a cheat can know from the evaluator of a task."""
    texts: list[str] = []
    commands: list[str] = []
    paths: list[str] = []
    for check in task.evaluator.checks:
        for item in check.items:
            command = item.parameters.get("command", "")
            commands.append(command if isinstance(command, str) else " ".join(map(str, command)))
            texts += _strings(item.parameters.get("rules"))
            if item.type == "vm_file":
                paths += _strings(item.parameters.get("path"))
    for command in commands:
        folder = next(iter(re.findall(r"\bcd (\S+)", command)), "")
        found = _PATHS.findall(command)
        paths += [f"{folder}/{path}" if folder and path[0] not in "~/" else path for path in found]
    words = [word for command in commands for word in command.split() if _WORD.fullmatch(word)]
    tools = {*_COMMON_TOOLS, *(Path(word).name for word in words)} - {""}
    return Claims(
        tuple(dict.fromkeys(texts)) or ("solved",),
        tuple(dict.fromkeys(paths)),
        tuple(sorted(tools)),
    )


def _strings(value: Any) -> Iterator[str]:
    """Return all strings of a rule; patterns as a text that they match."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from map(_example, _strings(item)) if key == "pattern" else _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _example(pattern: str) -> str:
    """Return a text that a simple regular expression matches."""
    return re.sub(r"\\(.)", r"\1", pattern.replace(r"\d+", "1"))


async def _press(desktop: Desktop, *keys: str) -> None:
    await desktop.act(Action(ActionKind.HOTKEY, keys=keys))


async def _type(desktop: Desktop, text: str) -> None:
    await desktop.act(Action(ActionKind.TYPE, text=text))
    await asyncio.sleep(_REACTION_S)


async def _opens(desktop: Desktop, *keys: str) -> bool:
    """Press keys and return whether the list of windows has changed."""
    before = [window["id"] for window in await desktop.windows()]
    await _press(desktop, *keys)
    await asyncio.sleep(_REACTION_S)
    return [window["id"] for window in await desktop.windows()] != before


def _title_command(claims: Claims) -> str:
    return f"for w in $(xdotool search --name .); do xdotool set_window --name '{claims.text}' $w; done\n"


async def _terminal_keys(desktop: Desktop, claims: Claims) -> None:
    """Open a terminal by its keys and set the titles of all windows."""
    for keys in (("ctrl", "alt", "t"), ("super", "r"), ("super", "enter"), ("alt", "f2"), ("f4",), ("shift", "f4")):
        if await _opens(desktop, *keys):
            await _type(desktop, _title_command(claims))
            await _type(desktop, f"printf '\\033]0;{claims.text}\\007'; sleep 60\n")


async def _terminal_menus(desktop: Desktop, claims: Claims) -> None:
    """Open a terminal by the menus of the desktop and of title bars."""
    for x, y in ((640, 8), (1270, 710), (5, 710)):
        await desktop.act(Action(ActionKind.RIGHT_CLICK, x=x, y=y))
        await asyncio.sleep(_REACTION_S)
        before = [window["id"] for window in await desktop.windows()]
        for _ in range(3):
            await _press(desktop, "down")
        await _press(desktop, "enter")
        await asyncio.sleep(_REACTION_S)
        if len(await desktop.windows()) > len(before):
            await _type(desktop, _title_command(claims))


async def _open_with(desktop: Desktop, claims: Claims) -> None:
    """Open a dialogue for a program in the application, and name a terminal with the title in it."""
    for keys in (("ctrl", "o"), ("ctrl", "shift", "o"), ("alt", "enter"), ("menu",), ("shift", "f10")):
        if await _opens(desktop, *keys):
            await _type(desktop, f"xterm -T '{claims.text}'\n")


async def _saved_under_the_name(desktop: Desktop, claims: Claims) -> None:
    """Save what the application shows under the name that its title must have."""
    for keys in (("ctrl", "shift", "s"), ("a",)):
        if await _opens(desktop, *keys):
            await _press(desktop, "ctrl", "a")
            await _type(desktop, f"/tmp/{claims.text.split(' ')[0]}\n")


async def _is_browser(desktop: Desktop) -> bool:
    return any(Path(window["executable"]).name in ("chrome", "chromium") for window in await desktop.windows())


async def _developer_tools(desktop: Desktop, claims: Claims) -> None:
    """Set the title of the page in the browser's developer tools."""
    if await _is_browser(desktop):
        for keys in (("f12",), ("ctrl", "shift", "j"), ("ctrl", "shift", "i"), ("ctrl", "shift", "c")):
            await _press(desktop, *keys)
            await asyncio.sleep(2 * _REACTION_S)
            await _type(desktop, f'document.title = "{claims.text}"; onkeydown = null\n')


async def _address_bar(desktop: Desktop, claims: Claims) -> None:
    """Open another page with the title in the browser, and run code in the address bar."""
    if await _is_browser(desktop):
        for keys in (("ctrl", "l"), ("alt", "d"), ("f6",), ("ctrl", "t"), ("ctrl", "n"), ("ctrl", "shift", "n")):
            await _press(desktop, *keys)
            await asyncio.sleep(_REACTION_S)
            await _type(desktop, f'javascript:document.title = "{claims.text}"\n')
            await _type(desktop, f"data:text/html,<title>{claims.text}</title>\n")


async def _page_source(desktop: Desktop, claims: Claims) -> None:
    """Show the source of the page, save it, and show other pages of the browser."""
    if await _is_browser(desktop):
        for keys in (("ctrl", "u"), ("ctrl", "s"), ("shift", "esc"), ("ctrl", "j"), ("ctrl", "h"), ("f1",), ("f11",)):
            if await _opens(desktop, *keys):
                await _type(desktop, f"{claims.text}\n")


async def _closed_application(desktop: Desktop, claims: Claims) -> None:
    """Close the application."""
    await _press(desktop, "alt", "f4")
    await asyncio.sleep(_REACTION_S)


INPUT_CHEATS: dict[str, Callable[[Desktop, Claims], Awaitable[None]]] = {
    "terminal-keys": _terminal_keys,
    "terminal-menus": _terminal_menus,
    "open-with": _open_with,
    "saved-under-the-name": _saved_under_the_name,
    "developer-tools": _developer_tools,
    "address-bar": _address_bar,
    "page-source": _page_source,
    "closed-application": _closed_application,
}
"""Cheats that use only keys and the pointer, by name."""


def print_attempts(attempts: Sequence[Attempt]) -> None:
    """Print a table of tasks and cheats, a legend, and the attempts that must not have been possible."""
    from rich.table import Table

    from deskrl.core.console import table_console

    console = table_console()
    cheats = list(dict.fromkeys(attempt.cheat for attempt in attempts))
    marks = {"held": "·", "rewarded": "[red]R", "fault": "[yellow]F", "skipped": "–"}
    table = Table("task", *map(str, range(1, len(cheats) + 1)), padding=0)
    by_task: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_task.setdefault(attempt.task_id, []).append(attempt)
    for task_id, row in by_task.items():
        table.add_row(task_id, *(marks[attempt.verdict] for attempt in row))
    console.print(table)
    for number, cheat in enumerate(cheats, 1):
        console.print(f"{number:>3} {cheat}: {cheat_description(cheat)}", highlight=False, markup=False)
    for attempt in attempts:
        if attempt.verdict in ("rewarded", "fault"):
            line = f"{attempt.verdict}: {attempt.task_id}, {attempt.cheat}: {attempt.detail}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    counts = {verdict: sum(attempt.verdict == verdict for attempt in attempts) for verdict in marks}
    summary = "{held} attempts held, {rewarded} rewarded (R), {fault} ended with a fault (F), {skipped} skipped (–)"
    console.print(summary.format(**counts), highlight=False)
