"""Evaluators: compute the reward of a desktop's end state from OSWorld's getters and metrics.

Tasks whose metrics and getters are all built in are evaluated here, other tasks by OSWorld's own evaluators if they are
installed (`osworld_evaluators/`).

The order keeps what the policy started away from its evaluation:

1. The policy's programs are stopped. Applications that the setup started continue to run.
2. `postconfig` runs, and getters that need a running application (`needs_session`).
3. All programs are stopped. Other getters run now: files are read, and commands run, with nothing beside them.

A getter returns the value that a metric compares, or None if it does not exist, which scores 0. Two errors tell whose
failure it is if there is no reward: EvaluatorError is independent of what the policy did, UnreadableStateError is not.

Getters and metrics have OSWorld's names and meaning, with these additions:

    setup_window_title  getter; the title that an application of the setup gives its window after the keys `keys`.
                        `executable` lists file names of its program, one of which suffices
    setup_window_image  getter; pixels of such a window, redrawn after the keys `keys` (default: none)
    vm_command_line     `session`: true if the command needs windows or processes, such as `wmctrl -l`. Default: true if
                        the command names such a program
    check_script        getter; runs the check.sh of a task bundle, with the `session` of vm_command_line (no default)
    script_reward       metric; reward of that script, by the option `reward` (`check_script.script_reward`)
    miniwob_end         getter; how the page of MiniWoB++ ended that the setup started, or None
    miniwob_reward      metric; raw reward of that end, without its negative part
    environment_outcome getter; reward that the environment gives the episode, with its evidence
    environment_reward  metric; that reward
    compare_text_file   `expected` may be a rule {"expected": text}
    match_pattern       metric; whether the whole text matches the regular expression of the rule {"pattern": ...}
    check_image_pixels  metric; compares an image with the rule {"size": [w, h], "pixels": [{"at": [x, y], "rgb": [r, g,
                        b]}, ...], "tolerance": 8}, with the tolerance per channel

Files and output come from the policy. Metrics run in threads within a time limit. A value that a metric cannot use
scores 0: an image that is damaged, larger than 8K, or neither PNG nor JPEG (the option `formats` of `check_image_size`
and `check_image_pixels` allows BMP, GIF, TIFF or WEBP too), text above `MAX_TEXT_BYTES`, or text for which a task's
patterns take too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopError, DesktopGone, UnsupportedOperation
from deskrl.actor.image_decoding import DEFAULT_FORMATS, OPTIONAL_FORMATS, ImageError, decode_image
from deskrl.actor.miniwob.page_run import read_end
from deskrl.actor.osworld_evaluators.evaluator_client import OSWorldEvaluatorClient, OSWorldEvaluatorError
from deskrl.actor.osworld_evaluators.evaluator_environment import installed_evaluators
from deskrl.actor.task import Check, Task, TypedItem
from deskrl.actor.tasks.assets import cloud_file_names
from deskrl.actor.tasks.check_script import NoRewardError, ScriptResult, script_reward
from deskrl.actor.tasks.setup_steps import SetupError, UnmetConditionError, require_asset, run_steps
from deskrl.actor.tasks.setup_windows import has_noted_windows, redrawn_image, rewritten_title
from deskrl.actor.thread_pool import ThreadPool

_FIRST_POLL_S = 0.05  # doubled after each poll: most effects are immediate, and a poll may start a process
_EVIDENCE_CHARACTERS = 400
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # exit statuses of `Desktop.execute`, as in a shell
_READ_ONLY_FOLDERS = ("/usr/", "/bin/", "/sbin/", "/opt/", "/lib")
MAX_TEXT_BYTES = 8 * 1024**2
"""Size limit in bytes of a file that is compared as text; a larger file scores 0."""
_PATTERN_TIMEOUT_S = 5.0  # for all patterns of a check
_METRIC_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 30.0

_SESSION_PROGRAMS = re.compile(
    r"\b(?:busctl|curl|dbus-send|gdbus|import|lsof|netstat|nmcli|pacmd|pactl|pgrep|pidof|ps|pulseaudio|scrot|ss|wget"
    r"|wmctrl|xclip|xdotool|xinput|xprop|xrandr|xsel|xwininfo)\b"
)
"""Programs whose output depends on windows, processes or services of the session."""

_threads = ThreadPool(4, "metric")

_Value = Any  # result of a getter: text, bytes, a rule of the task file, the result of a script, or None


class EvaluatorError(RuntimeError):
    """The task or the infrastructure is defective: the evaluation fails whatever the desktop's state is.

    Examples: an unknown getter or metric, a missing parameter or asset, a program that this machine does not have.
    """


class UnreadableStateError(RuntimeError):
    """The desktop's state could not be read. After the policy's first action, this is the policy's failure.

    Examples: a command does not finish, post-configuration does not find its window, OSWorld's evaluators fail on a
    malformed file, or programs cannot be stopped. A desktop that no longer exists raises DesktopGone instead.
    """


class _UnusableValue(Exception):
    """A value from the desktop that a metric cannot use, so that it scores 0."""


@dataclass(frozen=True)
class Evaluation:
    """Reward of an end state, with the evidence for it."""

    reward: float
    """Reward in [0, 1]."""
    evidence: dict[str, Any]
    """Values and scores that led to the reward, for debugging."""

    @property
    def evidence_json(self) -> str:
        """Evidence as JSON, as it is stored with the episode."""
        return json.dumps(self.evidence, ensure_ascii=False)


async def evaluate_task(desktop: Desktop, task: Task, final_action: Action | None) -> Evaluation:
    """Evaluate the end state of an episode. The desktop can only be reset afterwards, because its programs are stopped.

    A policy that declares a feasible task infeasible gets 0, whatever the state of the desktop, and so does a policy
    that does not declare an infeasible task infeasible.

    Args:
        desktop: desktop in its end state; its setup was completed by `setup_task`.
        task: task of the episode.
        final_action: last action of the policy; None: the episode was truncated.

    Raises:
        EvaluatorError: the task or the infrastructure is defective.
        UnreadableStateError: the desktop's state cannot be read.
        DesktopGone: the desktop no longer exists.
    """
    if (declared := evaluate_declaration(task, final_action)) is not None:
        return declared
    with _classified_errors(task):
        await desktop.stop_policy_programs()
        outputs = await run_steps(desktop, task.id, task.evaluator.postconfig)
        if has_builtin_evaluator(task):
            return await _evaluate_builtin(desktop, task)
        evaluation = await evaluate_with_osworld(desktop, task, outputs)
        await desktop.stop_all_programs()
        return evaluation


def evaluate_declaration(task: Task, final_action: Action | None) -> Evaluation | None:
    """Return the evaluation if the task is infeasible or was declared so; None if the desktop's state decides."""
    declared_infeasible = final_action is not None and final_action.kind is ActionKind.INFEASIBLE
    if not (task.evaluator.is_infeasible or declared_infeasible):
        return None
    reward = float(task.evaluator.is_infeasible and declared_infeasible)
    return Evaluation(reward, {"infeasible": task.evaluator.is_infeasible, "called_infeasible": declared_infeasible})


@contextlib.contextmanager
def _classified_errors(task: Task) -> Iterator[None]:
    """Turn errors of setup steps and of the desktop into EvaluatorError and UnreadableStateError."""
    try:
        yield
    except DesktopGone:
        raise
    except UnsupportedOperation as error:
        raise EvaluatorError(f"{task.id}: {error}") from error
    except (DesktopError, UnmetConditionError) as error:
        raise UnreadableStateError(f"{task.id}: {error}") from error
    except SetupError as error:
        raise EvaluatorError(str(error)) from error


async def _evaluate_builtin(desktop: Desktop, task: Task) -> Evaluation:
    """Repeat a negative evaluation within `evaluate_within_s`; the decisive one runs with as few programs as possible.

    Applications that save with a delay must not be stopped before they have, and what is read while they run is not
    decisive if it can be read without them.
    """
    is_static = not any(needs_session(item) for check in task.evaluator.checks for item in check.items)
    deadline = time.monotonic() + task.evaluate_within_s
    pause_s = _FIRST_POLL_S
    num_polls = 0
    while not is_static or task.evaluate_within_s > 0:
        try:
            reward, checks = await _evaluate_checks(desktop, task)
        except (DesktopError, UnreadableStateError):
            if not is_static:
                raise
            break
        num_polls += 1
        remaining_s = deadline - time.monotonic()
        if reward >= 1.0 or remaining_s <= 0:
            break
        await asyncio.sleep(min(pause_s, remaining_s))
        pause_s *= 2
    await desktop.stop_all_programs()
    if is_static:
        reward, checks = await _evaluate_checks(desktop, task)
        num_polls += 1
    return Evaluation(reward, {"checks": checks, "asked": num_polls})


async def has_task_ended(desktop: Desktop, task: Task) -> bool:
    """Return whether a task has ended by itself, so that further actions have no effect on its reward.

    Raises:
        DesktopError: the desktop failed.
    """
    if await desktop.has_episode_ended():
        return True
    results = [check.result for check in task.evaluator.checks]
    is_page = any(result is not None and result.type == "miniwob_end" for result in results)
    return is_page and await read_end(desktop) is not None


def needs_session(item: TypedItem) -> bool:
    """Return whether a getter needs running applications, windows or services; others work on files alone."""
    if item.type in WINDOW_GETTERS:
        return True
    command = item.parameters.get("command")
    if command is None:
        return False
    words = command if isinstance(command, str) else " ".join(map(str, command))
    return bool(item.parameters.get("session", _SESSION_PROGRAMS.search(words)))


def has_builtin_evaluator(task: Task) -> bool:
    """Return whether all metrics and getters of a task's evaluator are built in."""
    return all(
        check.func in METRICS and all(item.type in GETTERS and not item.parameters.get("multi") for item in check.items)
        for check in task.evaluator.checks
    )


def has_osworld_evaluator(task: Task) -> bool:
    """Return whether OSWorld's evaluators are installed and have all metrics and getters of a task's evaluator."""
    installed = installed_evaluators()
    return all(
        check.func in installed.metrics and all(item.type in installed.getters for item in check.items)
        for check in task.evaluator.checks
    )


async def evaluate_with_osworld(desktop: Desktop, task: Task, outputs: dict[str, str]) -> Evaluation:
    """Evaluate the end state with OSWorld's own evaluators, which run in a process of their own.

    Args:
        desktop: desktop in its end state, after `postconfig`.
        task: task of the episode.
        outputs: output of the commands of `postconfig`, as returned by `run_steps`.

    Raises:
        EvaluatorError: the evaluators are not installed.
        UnreadableStateError: the evaluators failed. Most of them do on files that are not as they expect, so that a
            failure says nothing about the infrastructure.
        SetupError: a file that the evaluator needs is not in the asset cache.
    """
    if not has_osworld_evaluator(task):
        names = ", ".join(check.func for check in task.evaluator.checks)
        raise EvaluatorError(f"{task.id}: evaluator {names} is neither built in nor installed")
    urls = [
        url
        for check in task.evaluator.checks
        for item in check.items
        if item.type == "cloud_file"
        for url in ([item.parameters["path"]] if isinstance(item.parameters["path"], str) else item.parameters["path"])
    ]
    copied_as = cloud_file_names(task)
    assets = {url: require_asset(task.id, url, copied_as.get(url)) for url in urls}
    try:
        evaluation = await _osworld_client().evaluate(json.loads(task.data), desktop.address, assets, outputs)
    except OSWorldEvaluatorError as error:
        raise UnreadableStateError(f"{task.id}: OSWorld's evaluators failed: {error}") from error
    checks = [{"func": check.func, "score": check.score} for check in evaluation.checks]
    return Evaluation(evaluation.reward, {"checks": checks, "official": True})


_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, OSWorldEvaluatorClient] = WeakKeyDictionary()


def _osworld_client() -> OSWorldEvaluatorClient:
    """Return the evaluator client of the running event loop, of which an actor has one."""
    return _clients.setdefault(asyncio.get_running_loop(), OSWorldEvaluatorClient())


async def _evaluate_checks(desktop: Desktop, task: Task) -> tuple[float, list[dict[str, Any]]]:
    """Return reward and evidence. "and": mean of the scores, or 0 if one is 0; "or": maximum of the scores."""
    decisive_score = 0.0 if task.evaluator.conj == "and" else 1.0
    scores: list[float] = []
    evidence = []
    for check in task.evaluator.checks:
        result = await _get(desktop, task, check.result)
        expected = await _get(desktop, task, check.expected)
        score = await _score(task, check, result, expected)
        scores.append(score)
        evidence.append(
            {"func": check.func, "score": score, "result": _as_evidence(result), "expected": _as_evidence(expected)},
        )
        if score == decisive_score:
            break
    if task.evaluator.conj == "or":
        return max(scores), evidence
    return (0.0 if 0.0 in scores else sum(scores) / len(scores)), evidence


async def _score(task: Task, check: Check, result: _Value, expected: _Value) -> float:
    metric = METRICS.get(check.func)
    if metric is None:
        raise EvaluatorError(f"{task.id}: metric {check.func} is not built in")
    if result is None or (expected is None and check.expected is not None):
        return 0.0
    try:
        async with asyncio.timeout(_METRIC_TIMEOUT_S):
            compare = partial(metric, result, expected, check.options)
            return float(await _threads.run(compare))
    except _UnusableValue:
        return 0.0
    except TimeoutError as error:
        message = f"{task.id}: metric {check.func} did not finish within {_METRIC_TIMEOUT_S:g} s"
        raise UnreadableStateError(message) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluatorError(f"{task.id}: metric {check.func} failed: {error!r}") from error


async def _get(desktop: Desktop, task: Task, item: TypedItem | None) -> _Value:
    if item is None:
        return None
    getter = GETTERS.get(item.type)
    if getter is None:
        raise EvaluatorError(f"{task.id}: getter {item.type} is not built in")
    try:
        return await getter(desktop, task, item.parameters)
    except KeyError as error:
        raise EvaluatorError(f"{task.id}: getter {item.type}: parameter {error} is missing") from error


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
    """Run the getter's command; return None if the policy left the desktop in a state in which it cannot start."""
    command, shell = parameters["command"], bool(parameters.get("shell"))
    result = await desktop.execute(command, shell=shell, timeout_s=_COMMAND_TIMEOUT_S)
    if shell or result.returncode not in (_NOT_EXECUTABLE, _NOT_FOUND):
        return result
    program = next(iter(shlex.split(command) if isinstance(command, str) else command), "")
    if result.returncode == _NOT_FOUND and not _is_in_reach(program):
        # The program may also exist and have chosen this exit status, for example a shell.
        found = await desktop.execute(
            ["/bin/sh", "-c", 'command -v -- "$1"', "sh", program], timeout_s=_COMMAND_TIMEOUT_S
        )
        if found.returncode == 0:
            return result
        if found.returncode in (1, _NOT_FOUND):  # and not ended by a signal
            message = f"{task.id}: the desktop has no program {command!r}"
            raise EvaluatorError(message) if desktop.can_observe_host else UnreadableStateError(message)
    return None


def _is_in_reach(program: str) -> bool:
    """Return whether the policy can write to the folder of a program; those of PATH are read-only."""
    return "/" in program and not program.startswith(_READ_ONLY_FOLDERS)


async def _check_script(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> ScriptResult:
    result = await desktop.execute(parameters["command"], timeout_s=float(parameters["timeout_s"]))
    return ScriptResult(result.returncode, result.stdout, result.stderr)


async def _miniwob_end(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> dict[str, Any] | None:
    end = await read_end(desktop)
    return None if end is None else {"raw_reward": end.raw_reward, "reason": end.reason}


async def _environment_outcome(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> dict[str, Any]:
    outcome = await desktop.episode_outcome()
    return {"reward": outcome.reward, **outcome.evidence}


async def _setup_window_title(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> str | None:
    _require_windows(desktop, task)
    return await rewritten_title(desktop, parameters["executable"], parameters["keys"])


async def _setup_window_image(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> bytes | None:
    _require_windows(desktop, task)
    return await redrawn_image(desktop, parameters["executable"], parameters.get("keys", ()))


def _require_windows(desktop: Desktop, task: Task) -> None:
    if not has_noted_windows(desktop):
        raise EvaluatorError(f"{task.id}: the setup opened no window, or this provider cannot list windows")


async def _rule(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> _Value:
    return parameters["rules"]


async def _cloud_file(desktop: Desktop, task: Task, parameters: dict[str, Any]) -> bytes:
    url = parameters["path"]
    return await asyncio.to_thread(require_asset(task.id, url, cloud_file_names(task).get(url)).read_bytes)


def _exact_match(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return bool(result == rule["expected"])


def _match_in_list(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return result in rule["expected"]


def _is_in_list(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return bool(rule["expected"] in result)


def _check_include_exclude(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    included = all(text in result for text in rule.get("include", []))
    return included and all(text not in result for text in rule.get("exclude", []))


def _match_pattern(result: str, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    return re.fullmatch(rule["pattern"], result) is not None


def _compare_text_file(result: bytes, expected: bytes | dict[str, Any], options: dict[str, Any]) -> bool:
    """Compare text; option `ignore_blanks` treats runs of white space as one space, `ignore_case` ignores case."""
    texts = [_text(result), expected["expected"] if isinstance(expected, dict) else _text(expected)]
    if options.get("ignore_blanks"):
        texts = [" ".join(text.split()) for text in texts]
    if options.get("ignore_case"):
        texts = [text.lower() for text in texts]
    return texts[0] == texts[1]


def _file_contains(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    text = _text(result)
    return all(piece in text for piece in rule["expected"])


def _check_list(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    """Check that each pattern of `expect` matches in some line of the file, and no pattern of `unexpect` in any."""
    lines = _text(result).splitlines()
    deadline_s = time.monotonic() + _PATTERN_TIMEOUT_S
    found = all(_matches_a_line(pattern, lines, deadline_s) for pattern in rule.get("expect", []))
    return found and not any(_matches_a_line(pattern, lines, deadline_s) for pattern in rule.get("unexpect", []))


def _matches_a_line(pattern: str, lines: Sequence[str], deadline_s: float) -> bool:
    # Unlike `re`, this package has a time limit and releases the interpreter lock while it searches.
    import regex

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise EvaluatorError(f"invalid pattern {pattern!r}: {error}") from error
    try:
        for line in lines:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            if compiled.search(line, timeout=remaining_s, concurrent=True):
                return True
    except TimeoutError as error:
        raise _UnusableValue("the patterns take too long") from error
    return False


def _script_reward(result: ScriptResult, rule: None, options: dict[str, Any]) -> float:
    try:
        return script_reward(result, options["reward"])
    except NoRewardError as error:
        raise UnreadableStateError(f"check.sh: {error}") from error


def _miniwob_reward(result: dict[str, Any], rule: None, options: dict[str, Any]) -> float:
    return min(max(float(result["raw_reward"]), 0.0), 1.0)


def _environment_reward(result: dict[str, Any], rule: None, options: dict[str, Any]) -> float:
    return float(result["reward"])


def _check_image_size(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    """Compare the width and height that the rule gives."""
    image = _image(result, options)
    if image is None:
        return False
    return all(rule.get(side, getattr(image, side)) == getattr(image, side) for side in ("width", "height"))


def _check_image_pixels(result: bytes, rule: dict[str, Any], options: dict[str, Any]) -> bool:
    image = _image(result, options)
    if image is None or list(image.size) != rule.get("size", list(image.size)):
        return False
    tolerance = rule.get("tolerance", 0)
    for pixel in rule["pixels"]:
        x, y = pixel["at"]
        if x >= image.width or y >= image.height:
            return False
        rgb = image.getpixel((x, y))
        if not isinstance(rgb, tuple) or any(abs(a - b) > tolerance for a, b in zip(rgb, pixel["rgb"], strict=True)):
            return False
    return True


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise _UnusableValue(f"a text of {len(data)} bytes")
    return data.decode(errors="replace")


def _image(data: bytes, options: dict[str, Any]) -> Image.Image | None:
    """Decode an image; return None if the data are not a complete image, which scores 0."""
    named = options.get("formats", [])
    if not isinstance(named, list) or not all(name in (*DEFAULT_FORMATS, *OPTIONAL_FORMATS) for name in named):
        raise EvaluatorError(f"option formats: must be a list of {', '.join(OPTIONAL_FORMATS)}, not {named!r}")
    try:
        return decode_image(data, (*DEFAULT_FORMATS, *named))
    except ImageError:
        return None


def _as_evidence(value: _Value) -> Any:
    """Return a value in a JSON-compatible form of limited size."""
    if isinstance(value, ScriptResult):
        return value.summary()
    if isinstance(value, bytes):
        if b"\0" in value:
            return f"{len(value)} bytes"
        value = _text(value[: 4 * _EVIDENCE_CHARACTERS + 4])  # a character has at most 4 bytes
    if isinstance(value, str) and len(value) > _EVIDENCE_CHARACTERS:
        return value[:_EVIDENCE_CHARACTERS] + "…"
    return value


GETTERS: dict[str, Callable[[Desktop, Task, dict[str, Any]], Awaitable[_Value]]] = {
    "vm_file": _vm_file,
    "vm_command_line": _vm_command_line,
    "vm_command_error": _vm_command_error,
    "check_script": _check_script,
    "miniwob_end": _miniwob_end,
    "environment_outcome": _environment_outcome,
    "setup_window_title": _setup_window_title,
    "setup_window_image": _setup_window_image,
    "rule": _rule,
    "cloud_file": _cloud_file,
}
"""Built-in getters by type; none supports several files at once (`multi`)."""

WINDOW_GETTERS = ("setup_window_title", "setup_window_image")
"""Getters that use the windows which existed at the end of the setup."""

METRICS: dict[str, Callable[[Any, Any, dict[str, Any]], bool | float]] = {
    "script_reward": _script_reward,
    "miniwob_reward": _miniwob_reward,
    "environment_reward": _environment_reward,
    "exact_match": _exact_match,
    "match_in_list": _match_in_list,
    "is_in_list": _is_in_list,
    "check_include_exclude": _check_include_exclude,
    "match_pattern": _match_pattern,
    "compare_text_file": _compare_text_file,
    "file_contains": _file_contains,
    "check_list": _check_list,
    "check_image_size": _check_image_size,
    "check_image_pixels": _check_image_pixels,
}
"""Built-in metrics by name, without `infeasible`, which depends only on the final action, and without `reward_file`,
which is a reward in Python (`bundle_rewards`)."""
