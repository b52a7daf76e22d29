"""Task files: parser and validation of OSWorld's JSON format, in which task bundles are represented too.

A task file is a JSON object with these keys (* required; other keys are ignored):

    id*             string; unique within a run
    instruction*    string; what the policy is asked to do
    related_apps    array of strings; applications that the task uses. Default: []
    config          array of setup steps, executed in order on a freshly reset desktop. Default: []
    evaluator*      object; how the end state is turned into a reward, see below
    proxy           boolean; whether the task's web pages are reached through a proxy. Default: false
    deskrl          object; extension of this project, see below. OSWorld ignores it. Default: {}

A setup step is {"type": string*, "parameters": object}; the types are listed in `setup_steps.STEPS`. Keys of
`evaluator`:

    func*           name of a metric, or array of names. The metric "infeasible" is 1 if the policy declares the task
                    infeasible, and "reward_file" is the value of reward.py in the task's bundle (`task_bundles`)
    result          getter of the value that the metric examines; required unless func is one of these two
    expected        getter of the value that it is compared with; only for metrics that take one
    options         object; keyword arguments of the metric
    conj            "and" or "or"; how several metrics are combined. Default: "and"
    postconfig      array of setup steps, executed before the getters. Default: []

A getter is {"type": string*, ...parameters}. If `func` is an array, `result`, `expected` and `options` are arrays of
the same length, one item for each metric; `expected` and `options` may be left out. The built-in getters and metrics
are listed in `evaluators.GETTERS` and `evaluators.METRICS`. Keys of `deskrl`:

    solution            array of steps of a scripted solution. Default: []
    evaluate_within_s   number; time in seconds during which an evaluation below 1.0 is repeated before it is final, for
                        applications that save with a delay. Default: 0

A step of the solution is {"thought": string*, "action": object*}. The action has `kind`* and the fields of
`actions.Action`; coordinates are pixels of a 1280x720 screen. A pointer action may have `box` ([left, top, right,
bottom]) instead of `x` and `y`: the point is then sampled from the box. Example:

    "deskrl": {
        "solution": [{"thought": "Press save.", "action": {"kind": "hotkey", "keys": ["ctrl", "s"]}}],
        "evaluate_within_s": 1.0
    }
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.task import Check, Evaluator, SolutionStep, Task, TypedItem
from deskrl.actor.tasks.task_bundles import SETTINGS_FILE, find_bundles, read_bundle
from deskrl.core.errors import UserError

OWN_SUITE = Path(__file__).parents[1] / "suite"
"""Root of deskrl's own suite, which contains `examples/<domain>/<id>.json`."""

SIMULATED_SUITE = Path(__file__).parents[1] / "simulated_suite"
"""Root of the suite for simulated desktops."""

ENVIRONMENT_SUITE = Path(__file__).parents[1] / "environment_suite"
"""Root of the suite for desktops that are environments."""

SMOKE_TASKS = ("press-and-submit", "fill-the-disc", "write-a-word", "make-a-folder")
"""Ids of the four tasks of deskrl's suite with the fastest reset, each of another domain."""

METRICS_WITHOUT_RESULT = ("infeasible", "reward_file")
"""Names of metrics that examine no value of a getter."""

_Json = dict[str, Any]
_Value = TypeVar("_Value")

_HINT = "correct the task file"
_TYPE_NAMES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
}


def load_tasks(suite: Path | None = None, ids: Sequence[str] = ()) -> list[Task]:
    """Load tasks of a suite.

    Args:
        suite: root of the suite, as in `suite_files`; None: deskrl's own suite.
        ids: ids of the tasks to load, in this order; empty: all tasks, sorted by domain and id.

    Raises:
        UserError: the directory has no task files, an id is unknown, or a task file or bundle is invalid.
    """
    return [read_task(file) for file in choose_files(suite or OWN_SUITE, ids)]


def choose_files(suite: Path, ids: Sequence[str] = ()) -> list[Path]:
    """Return task files of a suite; arguments and errors are those of `load_tasks`."""
    files = suite_files(suite)
    unknown = [name for name in ids if name not in files]
    if unknown:
        raise UserError(
            f"{suite}: no task {', '.join(unknown)}",
            f"choose from the {len(files)} tasks of the suite ({_first_names(files)})",
        )
    return [files[name] for name in (ids or files)]


def read_task(path: Path) -> Task:
    """Read and validate a task file; the task's domain is the name of its directory.

    Args:
        path: task file, or task.toml of a task bundle.

    Raises:
        UserError: the file cannot be read, or it or its bundle is invalid.
    """
    if path.name == SETTINGS_FILE:
        data, domain = read_bundle(path.parent)
        return parse_task(data, str(path), domain)
    return parse_task(_read(path), str(path), domain=path.parent.name)


def parse_task(data: bytes, name: str, domain: str = "") -> Task:
    """Parse and validate the content of a task file.

    Args:
        data: content of the file.
        name: name of the file in error messages.
        domain: domain of the task; empty: the first of `related_apps`.

    Raises:
        UserError: the content is not a JSON object, a required key is missing, or a value is invalid.
    """
    reader = _Reader(name)
    raw = _parse_object(data, name)
    own = reader.get(raw, "deskrl", dict, {})
    solution = reader.get(own, "solution", list, [], "deskrl.")
    within_s = reader.get(own, "evaluate_within_s", float, 0.0, "deskrl.")
    apps = reader.get(raw, "related_apps", list, [])
    return Task(
        id=reader.get(raw, "id", str),
        domain=domain or (str(apps[0]) if apps else ""),
        instruction=reader.get(raw, "instruction", str),
        related_apps=tuple(map(str, apps)),
        config=tuple(reader.steps(reader.get(raw, "config", list, []), "config")),
        evaluator=reader.evaluator(reader.get(raw, "evaluator", dict)),
        solution=tuple(reader.solution_step(step, f"deskrl.solution[{i}]") for i, step in enumerate(solution)),
        evaluate_within_s=within_s,
        proxy=reader.get(raw, "proxy", bool, False),
        data=data,
    )


class _Reader:
    """Extracts values from parsed JSON; errors name the file and the dotted key."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fail(self, key: str, reason: str) -> NoReturn:
        raise UserError(f"{self.name}: {key}: {reason}", _HINT)

    def get(
        self, table: _Json, key: str, kind: type[_Value], default: _Value | None = None, prefix: str = ""
    ) -> _Value:
        value = table.get(key, default)
        if value is None:
            self.fail(prefix + key, "missing")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind):
            self.fail(prefix + key, f"must be {_TYPE_NAMES[kind]}, not {json.dumps(value)[:80]}")
        return value

    def steps(self, items: list[Any], key: str) -> Iterator[TypedItem]:
        for i, item in enumerate(items):
            path = f"{key}[{i}]"
            if not isinstance(item, dict):
                self.fail(path, "must be an object")
            kind = self.get(item, "type", str, prefix=f"{path}.")
            yield TypedItem(kind, self.get(item, "parameters", dict, {}, f"{path}."))

    def evaluator(self, raw: _Json) -> Evaluator:
        conj = self.get(raw, "conj", str, "and", "evaluator.")
        if conj not in ("and", "or"):
            self.fail("evaluator.conj", f'must be "and" or "or", not "{conj}"')
        func = raw.get("func")
        funcs = func if isinstance(func, list) else [func]
        if not funcs or not all(isinstance(name, str) for name in funcs):
            self.fail("evaluator.func", "must be the name of a metric or an array of names")
        parts = {key: self._parallel(raw, key, func) for key in ("result", "expected", "options")}
        checks = tuple(
            Check(
                name,
                self._typed(parts["result"][i], f"evaluator.result[{i}]"),
                self._typed(parts["expected"][i], f"evaluator.expected[{i}]"),
                parts["options"][i] or {},
            )
            for i, name in enumerate(funcs)
        )
        for check in checks:
            if check.func not in METRICS_WITHOUT_RESULT and check.result is None:
                self.fail("evaluator.result", f"missing: metric {check.func} requires it")
        postconfig = self.get(raw, "postconfig", list, [], "evaluator.")
        return Evaluator(checks, conj, tuple(self.steps(postconfig, "evaluator.postconfig")))

    def _parallel(self, raw: _Json, key: str, func: Any) -> list[Any]:
        """Return `raw[key]` as a list with one item for each metric of `func`."""
        value = raw.get(key)
        if not isinstance(func, list):
            return [value]
        if value is None:
            return [None] * len(func)
        if not isinstance(value, list) or len(value) != len(func):
            self.fail(f"evaluator.{key}", f"must be an array of {len(func)} items, one for each metric")
        return value

    def _typed(self, value: Any, key: str) -> TypedItem | None:
        if not value:
            return None
        if not isinstance(value, dict):
            self.fail(key, "must be an object")
        kind = self.get(value, "type", str, prefix=f"{key}.")
        return TypedItem(kind, {name: item for name, item in value.items() if name != "type"})

    def solution_step(self, raw: Any, key: str) -> SolutionStep:
        if not isinstance(raw, dict):
            self.fail(key, "must be an object")
        values = dict(self.get(raw, "action", dict, prefix=f"{key}."))
        box = values.pop("box", None)
        if box is not None and not _is_box(box):
            self.fail(f"{key}.action.box", "must be four integers [left, top, right, bottom]")
        thought = self.get(raw, "thought", str, prefix=f"{key}.")
        return SolutionStep(thought, self._action(values, f"{key}.action"), tuple(box) if box else None)

    def _action(self, values: _Json, key: str) -> Action:
        try:
            kind = ActionKind(values.pop("kind", ""))
        except ValueError:
            self.fail(f"{key}.kind", f"must be one of {', '.join(ActionKind)}")
        defaults = Action(kind)
        for name in values:
            if not hasattr(defaults, name) or name == "ends_episode":
                self.fail(f"{key}.{name}", "not a field of an action")
            default = getattr(defaults, name)
            self.get(values, name, list if isinstance(default, tuple) else type(default), prefix=f"{key}.")
        values["keys"] = tuple(values.get("keys", ()))
        return Action(kind, **values)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(type(side) is int for side in value):
        return False
    left, top, right, bottom = value
    return bool(left <= right and top <= bottom)


def suite_files(suite: Path) -> dict[str, Path]:
    """Return the task files of a suite by task id: the stem of a file's name, or the name of a bundle's folder.

    Args:
        suite: directory with task files `examples/<domain>/<id>.json`, with bundles `examples/<domain>/<id>/`, or with
            both; or a folder of bundles, or one bundle.

    Raises:
        UserError: there are none, or two have the same id.
    """
    bundles = find_bundles(suite / "examples" if (suite / "examples").is_dir() else suite)
    named = [(file.stem, file) for file in suite.glob("examples/*/*.json")]
    named += [(file.parent.name, file) for file in bundles]
    if not named:
        raise UserError(
            f"{suite}: no task files examples/<domain>/<id>.json found, and no task bundles <id>/{SETTINGS_FILE}",
            "give the root of a task suite",
        )
    files: dict[str, Path] = {}
    for name, file in sorted(named, key=lambda item: item[1]):
        if (other := files.setdefault(name, file)) is not file:
            raise UserError(f"{suite}: two tasks have the id {name}: {other} and {file}", "rename one of the two")
    return files


def _first_names(names: dict[str, Path]) -> str:
    shown = ", ".join(list(names)[:4])
    return f"{shown}, …" if len(names) > 4 else shown


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "give a readable task file") from error


def _parse_object(data: bytes, name: str) -> _Json:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON: {error}", _HINT) from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: not a JSON object", _HINT)
    return value
