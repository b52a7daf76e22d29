"""Setup steps: bring a desktop to the initial state of a task, as in OSWorld.

Steps have OSWorld's meaning with two differences. `upload_file` also accepts file content inline, as `content` (a
string, or an array of lines) or `base64`, instead of `local_path`, so that a task file needs no other file. `download`
reads the asset cache (`assets.py`), which `deskrl tasks fetch` fills, and never the network. `setup_script` is the
setup.sh of a task bundle, whose exit status must be 0 and in which nothing is replaced. `miniwob` starts a page of
MiniWoB++, which gives the instruction of the episode. `environment` starts an episode of the environment that the
desktop shows, with `parameters` for it.

In commands, {SCREEN_WIDTH}, {SCREEN_HEIGHT}, {SCREEN_WIDTH_HALF}, {SCREEN_HEIGHT_HALF}, {CLIENT_PASSWORD} and {SEED},
the seed of the rollout, are replaced by their values.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import CommandResult, Desktop
from deskrl.actor.miniwob.page_run import page_seed, start_page
from deskrl.actor.task import Task, TypedItem
from deskrl.actor.tasks.assets import find_asset
from deskrl.actor.tasks.chrome_tabs import close_tabs, open_tabs
from deskrl.actor.tasks.setup_windows import note_setup_windows
from deskrl.actor.tasks.window_wait import WindowWait
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import one_line
from deskrl.core.ids import derive_seed

_PASSWORD = "password"  # the password of OSWorld's guest, which tasks contain in their commands
_STREAMS = ("stdout", "stderr")
_RETRY_S = 0.3
_VERIFY_TIMEOUT_S = 10.0
_VERIFY_POLL_S = 0.03
_SHOWN_CHARACTERS = 300
_NUM_SEEDS = 2**31  # environments may keep seeds in signed integers of 32 bits
_TERMINAL_APPLICATIONS = {"os", "terminal", "gnome-terminal"}  # in other tasks, no key opens a terminal


class SetupError(RuntimeError):
    """The initial state of a task was not reached: a fault of the infrastructure or of the task file."""


class UnmetConditionError(SetupError):
    """A step did not reach the condition that it waits for, which depends on the state of the desktop."""


@dataclass(frozen=True)
class SetupContext:
    """Context of setup steps: desktop, task and seeds."""

    desktop: Desktop
    task_id: str
    seed: int
    placeholders: dict[str, str]
    """Values of the placeholders in commands."""
    outputs: dict[str, str]
    """Command output that steps save, by the file name that the step gives in `stdout` or `stderr`."""
    group_seed: int = 0
    """Seed of what all episodes of a training group have in common."""
    instructions: list[str] = field(default_factory=list)
    """Instructions that steps give in place of the task's; the last one is used."""


async def setup_task(
    desktop: Desktop, task: Task, seed: int, config: DesktopConfig | None = None, group_seed: int | None = None
) -> str:
    """Bring a freshly reset desktop to the initial state of a task, and announce that the policy acts next.

    Args:
        desktop: desktop on which the task is set up.
        task: task to set up.
        seed: seed of the rollout.
        config: limits of the wait for the windows of the applications that the setup started; None: no wait.
        group_seed: seed that all episodes of a training group have in common; None: `seed`.

    Returns:
        The instruction of the episode: the task's, unless a step gives another one.

    Raises:
        SetupError: the type of a step is unknown, a parameter is missing, or a step failed.
        DesktopError: the desktop failed.
    """
    if _TERMINAL_APPLICATIONS.intersection(name.lower() for name in task.related_apps):
        await desktop.allow_terminal()
    windows = None if config is None else WindowWait(desktop, task.id, task.config, config)
    if windows is not None:
        await windows.begin()
    context = await _context(desktop, task.id, task.config, seed, seed if group_seed is None else group_seed)
    await _run_steps(context, task.config)
    if windows is not None:
        await windows.wait()
    await desktop.end_setup()
    if any(item.type.startswith("setup_window_") for check in task.evaluator.checks for item in check.items):
        await note_setup_windows(desktop)
    return context.instructions[-1] if context.instructions else task.instruction


async def run_steps(desktop: Desktop, task_id: str, steps: Sequence[TypedItem], seed: int = 0) -> dict[str, str]:
    """Run setup steps in order; also used for the `postconfig` of evaluators.

    Args:
        desktop: desktop on which the steps run.
        task_id: id of the task, for assets and errors.
        steps: steps to run.
        seed: seed of the rollout, the value of {SEED}.

    Returns:
        The command output that steps save, by file name.

    Raises:
        SetupError: as for `setup_task`.
        DesktopError: the desktop failed.
    """
    context = await _context(desktop, task_id, steps, seed, seed)
    await _run_steps(context, steps)
    return context.outputs


async def _context(
    desktop: Desktop, task_id: str, steps: Sequence[TypedItem], seed: int, group_seed: int
) -> SetupContext:
    return SetupContext(desktop, task_id, seed, await _placeholders(desktop, steps, seed), {}, group_seed)


async def _run_steps(context: SetupContext, steps: Sequence[TypedItem]) -> None:
    task_id = context.task_id
    for index, step in enumerate(steps):
        run = STEPS.get(step.type)
        if run is None:
            raise SetupError(f"{task_id}: setup step {index} has the unknown type {step.type}")
        try:
            await run(context, step.parameters)
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SetupError(f"{task_id}: setup step {index} ({step.type}): {reason}") from error


def require_asset(task_id: str, url: str, copied_as: str | None = None) -> Path:
    """Return the local copy of a URL, see `find_asset`; raises SetupError if there is none."""
    path = find_asset(task_id, url, copied_as)
    if path is None:
        raise SetupError(f"{task_id}: no local copy of {url}; `deskrl tasks fetch` downloads it")
    return path


async def _placeholders(desktop: Desktop, steps: Sequence[TypedItem], seed: int) -> dict[str, str]:
    values = {"{CLIENT_PASSWORD}": _PASSWORD, "{SEED}": str(seed)}
    if any("{SCREEN_" in str(step.parameters.get("command")) for step in steps):
        width, height = (await desktop.screenshot()).size
        values |= {"{SCREEN_WIDTH}": str(width), "{SCREEN_HEIGHT}": str(height)}
        values |= {"{SCREEN_WIDTH_HALF}": str(width // 2), "{SCREEN_HEIGHT_HALF}": str(height // 2)}
    return values


def _command(context: SetupContext, parameters: dict[str, Any]) -> str | list[str]:
    def fill(text: str) -> str:
        for name, value in context.placeholders.items():
            text = text.replace(name, value)
        return text

    command = parameters["command"]
    return fill(command) if isinstance(command, str) else [fill(str(part)) for part in command]


def _shell(parameters: dict[str, Any]) -> bool:
    return str(parameters.get("shell", False)).lower() == "true"


async def _launch(context: SetupContext, parameters: dict[str, Any]) -> None:
    await context.desktop.launch(_command(context, parameters), shell=_shell(parameters))


async def _execute(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Run a command to completion, whatever its exit status; with `until`, repeat it until the condition is met."""
    while True:
        result = await context.desktop.execute(_command(context, parameters), shell=_shell(parameters))
        if _is_met(parameters.get("until") or {}, result):
            saved = {parameters[name]: getattr(result, name) for name in _STREAMS if parameters.get(name)}
            context.outputs.update(saved)
            return
        await asyncio.sleep(_RETRY_S)


def _is_met(until: dict[str, Any], result: CommandResult) -> bool:
    if not until:
        return True
    return (
        ("returncode" in until and result.returncode == until["returncode"])
        or ("stdout" in until and until["stdout"] in result.stdout)
        or ("stderr" in until and until["stderr"] in result.stderr)
    )


async def _setup_script(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Run the setup.sh of a task bundle to its end."""
    result = await context.desktop.execute(parameters["command"], timeout_s=float(parameters["timeout_s"]))
    if result.returncode != 0:
        reason = one_line((result.stderr.strip() or result.stdout.strip() or "no output")[-_SHOWN_CHARACTERS:])
        raise SetupError(f"{context.task_id}: setup.sh ended with the exit status {result.returncode}: {reason}")


async def _execute_with_verification(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Run a command, then wait until a window exists and a command succeeds, as given by `verification`."""
    within_s = float(parameters.get("max_wait_time", _VERIFY_TIMEOUT_S))
    verification = parameters.get("verification") or {}
    await context.desktop.execute(_command(context, parameters), shell=_shell(parameters))
    if "window_exists" in verification:
        await context.desktop.wait_for_window(verification["window_exists"], timeout_s=within_s)
    if "command_success" in verification:
        await _wait_for_success(context, verification["command_success"], within_s)


async def _wait_for_success(context: SetupContext, command: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while (await context.desktop.execute(command, shell=True)).returncode != 0:
        if time.monotonic() > deadline:
            raise UnmetConditionError(f"{context.task_id}: {command!r} did not succeed within {within_s:g} s")
        await asyncio.sleep(_VERIFY_POLL_S)


async def _sleep(context: SetupContext, parameters: dict[str, Any]) -> None:
    await asyncio.sleep(float(parameters["seconds"]))


async def _open(context: SetupContext, parameters: dict[str, Any]) -> None:
    await context.desktop.open_path(parameters["path"])


async def _activate_window(context: SetupContext, parameters: dict[str, Any]) -> None:
    await context.desktop.activate_window(
        parameters["window_name"], strict=parameters.get("strict", False), by_class=parameters.get("by_class", False)
    )


async def _close_window(context: SetupContext, parameters: dict[str, Any]) -> None:
    await context.desktop.close_window(
        parameters["window_name"], strict=parameters.get("strict", False), by_class=parameters.get("by_class", False)
    )


async def _upload_file(context: SetupContext, parameters: dict[str, Any]) -> None:
    for file in parameters["files"]:
        if "content" in file:
            content = file["content"]
            data = (content if isinstance(content, str) else "\n".join(content)).encode()
        elif "base64" in file:
            data = base64.b64decode(file["base64"], validate=True)
        else:
            data = await asyncio.to_thread(Path(file["local_path"]).read_bytes)
        await context.desktop.write_file(file["path"], data)


async def _download(context: SetupContext, parameters: dict[str, Any]) -> None:
    for file in parameters["files"]:
        data = await asyncio.to_thread(require_asset(context.task_id, file["url"]).read_bytes)
        await context.desktop.write_file(file["path"], data)


async def _miniwob(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Start a page of MiniWoB++ with a seed of the split, the same for all episodes of a training group."""
    page = parameters["page"]
    seed = page_seed(page, parameters["split"], context.group_seed)
    context.instructions.append(await start_page(context.desktop, Path(parameters["html"]), page, seed))


async def _environment(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Start an episode of the desktop's environment with a seed that is the same for all episodes of a group."""
    seed = derive_seed("environment", context.group_seed) % _NUM_SEEDS
    instruction = await context.desktop.begin_episode(seed, parameters.get("parameters", {}))
    if instruction is not None:
        context.instructions.append(instruction)


async def _chrome_open_tabs(context: SetupContext, parameters: dict[str, Any]) -> None:
    await open_tabs(context.desktop, parameters["urls_to_open"])


async def _chrome_close_tabs(context: SetupContext, parameters: dict[str, Any]) -> None:
    await close_tabs(context.desktop, parameters["urls_to_close"])


STEPS: dict[str, Callable[[SetupContext, dict[str, Any]], Awaitable[None]]] = {
    "launch": _launch,
    "execute": _execute,
    "command": _execute,
    "execute_with_verification": _execute_with_verification,
    "miniwob": _miniwob,
    "setup_script": _setup_script,
    "sleep": _sleep,
    "open": _open,
    "activate_window": _activate_window,
    "close_window": _close_window,
    "upload_file": _upload_file,
    "download": _download,
    "environment": _environment,
    "chrome_open_tabs": _chrome_open_tabs,
    "chrome_close_tabs": _chrome_close_tabs,
}
"""Built-in setup steps by type."""
