"""Bringing a desktop to a task's first state: OSWorld's setup steps. Knows no evaluator and no policy.

Steps mean what they mean in OSWorld, with two differences. `upload_file` also takes its files inline, as `content`
(text, or a list of its lines) or `base64`, in place of `local_path`, so that a task file stands alone. `download` reads
the asset cache (`assets.py`), which `deskrl tasks fetch` fills, and never the network.

In commands {SCREEN_WIDTH}, {SCREEN_HEIGHT}, their halves {SCREEN_WIDTH_HALF}, {SCREEN_HEIGHT_HALF}, {CLIENT_PASSWORD}
and {SEED}, the rollout's seed, are replaced.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import CommandResult, Desktop
from deskrl.actor.tasks.assets import find_asset
from deskrl.actor.tasks.chrome_tabs import close_tabs, open_tabs
from deskrl.actor.tasks.files import Task, TypedItem

_PASSWORD = "password"  # OSWorld's guest has this one; tasks spell it in their commands
_STREAMS = ("stdout", "stderr")
_RETRY_S = 0.3
_VERIFY_S = 10.0
_VERIFY_EVERY_S = 0.03


class SetupError(RuntimeError):
    """A task's first state was not reached: the infrastructure's fault, or the task file's."""


@dataclass(frozen=True)
class SetupContext:
    """What steps need besides the desktop and their parameters."""

    desktop: Desktop
    task_id: str
    seed: int
    placeholders: dict[str, str]
    outputs: dict[str, str]
    """What commands printed that their step keeps (`stdout`, `stderr`), by the file name that the step gives it."""


async def setup_task(desktop: Desktop, task: Task, seed: int) -> None:
    """Bring a freshly reset desktop to the task's first state; take a settled screenshot after it.

    Raises:
        SetupError: a step is of an unknown type, lacks what it needs or did not succeed.
        DesktopError: the desktop failed.
    """
    await run_steps(desktop, task.id, task.config, seed)


async def run_steps(desktop: Desktop, task_id: str, steps: Sequence[TypedItem], seed: int = 0) -> dict[str, str]:
    """Do setup steps in order, as `setup_task` does; an evaluator's postconfig is made of the same steps.

    Returns:
        What the steps' commands printed that they keep, by file name.
    """
    context = SetupContext(desktop, task_id, seed, await _placeholders(desktop, steps, seed), {})
    for index, step in enumerate(steps):
        do = STEPS.get(step.type)
        if do is None:
            raise SetupError(f"{task_id}: setup step {index} has the unknown type {step.type}")
        try:
            await do(context, step.parameters)
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SetupError(f"{task_id}: setup step {index} ({step.type}): {reason}") from error
    return context.outputs


def require_asset(task_id: str, url: str) -> Path:
    """The local copy of what `url` serves; raises SetupError if there is none."""
    path = find_asset(task_id, url)
    if path is None:
        raise SetupError(f"{task_id}: no local copy of {url}: `deskrl tasks fetch` gets it")
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
    """Run to the end, whatever the exit status; with `until`, again and again until its condition holds."""
    while True:
        result = await context.desktop.execute(_command(context, parameters), shell=_shell(parameters))
        if _holds(parameters.get("until") or {}, result):
            kept = {parameters[name]: getattr(result, name) for name in _STREAMS if parameters.get(name)}
            context.outputs.update(kept)
            return
        await asyncio.sleep(_RETRY_S)


def _holds(until: dict[str, Any], result: CommandResult) -> bool:
    if not until:
        return True
    return (
        ("returncode" in until and result.returncode == until["returncode"])
        or ("stdout" in until and until["stdout"] in result.stdout)
        or ("stderr" in until and until["stderr"] in result.stderr)
    )


async def _execute_with_verification(context: SetupContext, parameters: dict[str, Any]) -> None:
    """Run, then wait until a window exists and a command succeeds, as `verification` asks."""
    within_s = float(parameters.get("max_wait_time", _VERIFY_S))
    verification = parameters.get("verification") or {}
    await context.desktop.execute(_command(context, parameters), shell=_shell(parameters))
    if "window_exists" in verification:
        await context.desktop.wait_for_window(verification["window_exists"], timeout_s=within_s)
    if "command_success" in verification:
        await _until_success(context, verification["command_success"], within_s)


async def _until_success(context: SetupContext, command: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while (await context.desktop.execute(command, shell=True)).returncode != 0:
        if time.monotonic() > deadline:
            raise SetupError(f"{context.task_id}: {command!r} did not succeed in {within_s:g} s")
        await asyncio.sleep(_VERIFY_EVERY_S)


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


async def _chrome_open_tabs(context: SetupContext, parameters: dict[str, Any]) -> None:
    await open_tabs(context.desktop, parameters["urls_to_open"])


async def _chrome_close_tabs(context: SetupContext, parameters: dict[str, Any]) -> None:
    await close_tabs(context.desktop, parameters["urls_to_close"])


STEPS: dict[str, Callable[[SetupContext, dict[str, Any]], Awaitable[None]]] = {
    "launch": _launch,
    "execute": _execute,
    "command": _execute,
    "execute_with_verification": _execute_with_verification,
    "sleep": _sleep,
    "open": _open,
    "activate_window": _activate_window,
    "close_window": _close_window,
    "upload_file": _upload_file,
    "download": _download,
    "chrome_open_tabs": _chrome_open_tabs,
    "chrome_close_tabs": _chrome_close_tabs,
}
"""The setup steps that are built in, by type."""
