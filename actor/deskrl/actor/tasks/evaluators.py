"""Judging a desktop's end state: OSWorld's evaluators, the common ones built in. Knows no policy and no setup's why.

A task whose metrics and getters are all built in is judged here; any other one by OSWorld's own evaluators, where they
are installed (`official/`).

A getter fetches what a metric compares; what is absent is None, and scores 0. An evaluator that cannot do its work
raises: that is a fault of the infrastructure and never a reward.

Metrics are OSWorld's by name and meaning, and one of our own: `check_image_pixels` compares a picture with the rule
{"size": [w, h], "pixels": [{"at": [x, y], "rgb": [r, g, b]}, …], "tolerance": 8}; tolerance is per channel.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image, UnidentifiedImageError

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import CommandResult, Desktop
from deskrl.actor.official.client import OfficialEvaluators, OfficialFault
from deskrl.actor.official.environment import provided
from deskrl.actor.tasks.files import Check, Task, TypedItem
from deskrl.actor.tasks.setup_steps import require_asset, run_steps

_FIRST_POLL_S = 0.05  # doubled from one to the next: most effects are there at once, and an asking costs a process
_EVIDENCE_CHARACTERS = 400
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # what `Desktop.execute` says, as a shell does

_Value = Any  # what a getter fetched: text, bytes, a rule of the task file, or None


class EvaluatorError(RuntimeError):
    """The end state could not be judged."""


@dataclass(frozen=True)
class Evaluation:
    """A reward in [0, 1], and what it rests on for a person who doubts it."""

    reward: float
    evidence: dict[str, Any]

    @property
    def evidence_json(self) -> str:
        """The evidence as it is stored with a result."""
        return json.dumps(self.evidence, ensure_ascii=False)


async def evaluate_task(desktop: Desktop, task: Task, final_action: Action | None) -> Evaluation:
    """Judge the end state of an episode whose last action was `final_action` (None: it was cut off).

    A policy that calls a feasible task infeasible gets 0, whatever the desktop looks like, and the other way round.

    Raises:
        EvaluatorError: getter or metric unknown or unable.
        DesktopError, SetupError: as the desktop and `postconfig` raise them.
    """
    gave_up = final_action is not None and final_action.kind is ActionKind.INFEASIBLE
    if task.evaluator.infeasible or gave_up:
        reward = float(task.evaluator.infeasible and gave_up)
        return Evaluation(reward, {"infeasible": task.evaluator.infeasible, "called_infeasible": gave_up})
    outputs = await run_steps(desktop, task.id, task.evaluator.postconfig)
    if not is_built_in(task):
        return await judge_officially(desktop, task, outputs)
    deadline = time.monotonic() + task.evaluate_within_s
    pause_s = _FIRST_POLL_S
    num_asked = 0
    while True:
        reward, checks = await _judge(desktop, task)
        num_asked += 1
        left_s = deadline - time.monotonic()
        if reward >= 1.0 or left_s <= 0:
            return Evaluation(reward, {"checks": checks, "asked": num_asked})
        await asyncio.sleep(min(pause_s, left_s))
        pause_s *= 2


def is_built_in(task: Task) -> bool:
    """Whether every metric and getter of a task's evaluator is built in."""
    return all(
        check.func in METRICS and all(item.type in GETTERS and not item.parameters.get("multi") for item in check.items)
        for check in task.evaluator.checks
    )


def is_official(task: Task) -> bool:
    """Whether OSWorld's own evaluators are installed and judge by every metric and getter of the task's evaluator."""
    known = provided()
    return all(
        check.func in known.metrics and all(item.type in known.getters for item in check.items)
        for check in task.evaluator.checks
    )


async def judge_officially(desktop: Desktop, task: Task, outputs: dict[str, str]) -> Evaluation:
    if not is_official(task):
        names = ", ".join(check.func for check in task.evaluator.checks)
        raise EvaluatorError(f"{task.id}: {names}: neither built in nor among the installed official evaluators")
    urls = [
        url
        for check in task.evaluator.checks
        for item in check.items
        if item.type == "cloud_file"
        for url in ([item.parameters["path"]] if isinstance(item.parameters["path"], str) else item.parameters["path"])
    ]
    assets = {url: require_asset(task.id, url) for url in urls}
    try:
        answer = await _official().judge(json.loads(task.data), desktop.address, assets, outputs)
    except OfficialFault as error:
        raise EvaluatorError(f"{task.id}: the official evaluators: {error}") from error
    return Evaluation(float(answer["reward"]), {"checks": answer["checks"], "official": True})


_processes: WeakKeyDictionary[asyncio.AbstractEventLoop, OfficialEvaluators] = WeakKeyDictionary()


def _official() -> OfficialEvaluators:
    """The evaluator process of this actor, which is its event loop's."""
    return _processes.setdefault(asyncio.get_running_loop(), OfficialEvaluators())


async def _judge(desktop: Desktop, task: Task) -> tuple[float, list[dict[str, Any]]]:
    """All checks joined: with "and" the mean unless one is 0, with "or" the best."""
    deciding = 0.0 if task.evaluator.conj == "and" else 1.0
    scores: list[float] = []
    evidence = []
    for check in task.evaluator.checks:
        result = await _get(desktop, task, check.result)
        expected = await _get(desktop, task, check.expected)
        score = _score(task, check, result, expected)
        scores.append(score)
        evidence.append(
            {"func": check.func, "score": score, "result": _shown(result), "expected": _shown(expected)},
        )
        if score == deciding:
            break
    if task.evaluator.conj == "or":
        return max(scores), evidence
    return (0.0 if 0.0 in scores else sum(scores) / len(scores)), evidence


def _score(task: Task, check: Check, result: _Value, expected: _Value) -> float:
    metric = METRICS.get(check.func)
    if metric is None:
        raise EvaluatorError(f"{task.id}: metric {check.func} is not built in")
    if result is None or (expected is None and check.expected is not None):
        return 0.0
    try:
        return float(metric(result, expected, check.options))
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise EvaluatorError(f"{task.id}: {check.func} cannot compare: {error!r}") from error


async def _get(desktop: Desktop, task: Task, item: TypedItem | None) -> _Value:
    if item is None:
        return None
    getter = GETTERS.get(item.type)
    if getter is None:
        raise EvaluatorError(f"{task.id}: getter {item.type} is not built in")
    try:
        return await getter(desktop, task, item.parameters)
    except KeyError as error:
        raise EvaluatorError(f"{task.id}: getter {item.type} lacks {error}") from error


async def _vm_file(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> bytes | None:
    try:
        return await desktop.read_file(parameters["path"])
    except FileNotFoundError:
        return None


async def _vm_command_line(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> str | None:
    result = await _run(desktop, task, parameters)
    return None if result is None else result.stdout


async def _vm_command_error(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> str | None:
    result = await _run(desktop, task, parameters)
    return None if result is None else result.stderr


async def _run(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> CommandResult | None:
    """A command that ran; None if it could not be run in what the policy left, such as no room for a process."""
    command, shell = parameters["command"], bool(parameters.get("shell"))
    result = await desktop.execute(command, shell=shell)
    if not shell and result.returncode == _NOT_FOUND:
        raise EvaluatorError(f"{task.id}: the desktop has no program for {command!r}")
    return None if not shell and result.returncode == _NOT_EXECUTABLE else result


async def _rule(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> _Value:
    return parameters["rules"]


async def _cloud_file(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> bytes:
    return await asyncio.to_thread(require_asset(task.id, parameters["path"]).read_bytes)


def _exact_match(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return bool(result == rule["expected"])


def _match_in_list(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return result in rule["expected"]


def _is_in_list(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return bool(rule["expected"] in result)


def _check_include_exclude(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    included = all(text in result for text in rule.get("include", []))
    return included and all(text not in result for text in rule.get("exclude", []))


def _compare_text_file(result: bytes, expected: bytes, options: dict[str, Any]) -> bool:
    """Equal text; options `ignore_blanks` (runs of white space are one space) and `ignore_case`."""
    texts = [_text(result), _text(expected)]
    if options.get("ignore_blanks"):
        texts = [" ".join(text.split()) for text in texts]
    if options.get("ignore_case"):
        texts = [text.lower() for text in texts]
    return texts[0] == texts[1]


def _file_contains(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return all(piece in _text(result) for piece in rule["expected"])


def _check_list(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    """Each pattern of `expect` is found in some line of the file, and none of `unexpect` in any."""
    lines = _text(result).splitlines()
    found = all(any(re.search(pattern, line) for line in lines) for pattern in rule.get("expect", []))
    return found and not any(re.search(pattern, line) for pattern in rule.get("unexpect", []) for line in lines)


def _check_image_size(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    """Width and height, each where the rule gives it."""
    image = _image(result)
    if image is None:
        return False
    return all(rule.get(side, getattr(image, side)) == getattr(image, side) for side in ("width", "height"))


def _check_image_pixels(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    image = _image(result)
    if image is None or list(image.size) != rule.get("size", list(image.size)):
        return False
    tolerance = rule.get("tolerance", 0)
    for pixel in rule["pixels"]:
        x, y = pixel["at"]
        if x >= image.width or y >= image.height:
            return False
        seen = image.getpixel((x, y))
        if not isinstance(seen, tuple) or any(abs(a - b) > tolerance for a, b in zip(seen, pixel["rgb"], strict=True)):
            return False
    return True


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _image(data: bytes) -> Image.Image | None:
    """The picture in `data`; None if it is none (half a file, or what the policy put in its place)."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None


def _shown(value: _Value) -> Any:
    """A value as evidence: bounded, and JSON."""
    if isinstance(value, bytes):
        if b"\0" in value:
            return f"{len(value)} bytes"
        value = _text(value)
    if isinstance(value, str) and len(value) > _EVIDENCE_CHARACTERS:
        return value[:_EVIDENCE_CHARACTERS] + "…"
    return value


GETTERS: dict[str, Callable[[Desktop, Task, dict[str, Any]], Awaitable[_Value]]] = {
    "vm_file": _vm_file,
    "vm_command_line": _vm_command_line,
    "vm_command_error": _vm_command_error,
    "rule": _rule,
    "cloud_file": _cloud_file,
}
"""The getters that are built in, by type; none of them fetches several files at once (`multi`)."""

METRICS: dict[str, Callable[[Any, Any, dict[str, Any]], bool]] = {
    "exact_match": _exact_match,
    "match_in_list": _match_in_list,
    "is_in_list": _is_in_list,
    "check_include_exclude": _check_include_exclude,
    "compare_text_file": _compare_text_file,
    "file_contains": _file_contains,
    "check_list": _check_list,
    "check_image_size": _check_image_size,
    "check_image_pixels": _check_image_pixels,
}
"""The metrics that are built in, by name; `infeasible` is none: it is judged by how the episode ended."""
