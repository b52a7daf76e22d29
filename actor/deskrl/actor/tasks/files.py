"""Task files: OSWorld's JSON format, read and checked. Knows no desktop, and not what a setup step or a metric does.

A task file is OSWorld's, with one key of our own, `deskrl`, that OSWorld ignores:

    "deskrl": {
        "solution": [{"thought": "Press save.", "action": {"kind": "hotkey", "keys": ["ctrl", "s"]}}, …],
        "evaluate_within_s": 1.0
    }

`solution` is a scripted solution in the vocabulary of `actions.Action`, in pixels of a 1280×720 screen. A pointer
action may give `box` ([left, top, right, bottom]) in place of `x` and `y`: the point is then drawn from it.
`evaluate_within_s` is how long the evaluator is asked again before its verdict stands, for applications that save a
moment late.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from deskrl.actor.actions import Action, ActionKind
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed

OWN_SUITE = Path(__file__).parents[1] / "suite"
"""deskrl's own tasks, `examples/<domain>/<id>.json` below it."""

SIMULATED_SUITE = Path(__file__).parents[1] / "simulated_suite"
"""Tasks for simulated desktops."""

SMOKE_TASKS = ("press-and-submit", "fill-the-disc", "write-a-word", "make-a-folder")
"""The four of the own suite that reset cheapest: a browser, an image editor, a text editor, the operating system."""

_Json = dict[str, Any]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TypedItem:
    """A setup step, a getter: a type and what goes with it."""

    type: str
    parameters: _Json


@dataclass(frozen=True)
class Check:
    """One metric with what it compares."""

    func: str
    result: TypedItem | None
    expected: TypedItem | None
    options: _Json

    @property
    def items(self) -> tuple[TypedItem, ...]:
        """Its getters: of the result, and of what is expected where that is given."""
        return tuple(item for item in (self.result, self.expected) if item is not None)


@dataclass(frozen=True)
class Evaluator:
    """How an end state is judged: `checks` joined by `conj`, after the steps of `postconfig`."""

    checks: tuple[Check, ...]
    conj: str
    postconfig: tuple[TypedItem, ...]

    @property
    def infeasible(self) -> bool:
        """Whether the right answer is that the task cannot be done."""
        return any(check.func == "infeasible" for check in self.checks)


@dataclass(frozen=True)
class SolutionStep:
    """One step of a scripted solution; `box` is (left, top, right, bottom), None where the point is given."""

    thought: str
    action: Action
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Task:
    """A checked task file."""

    id: str
    domain: str
    instruction: str
    related_apps: tuple[str, ...]
    config: tuple[TypedItem, ...]
    evaluator: Evaluator
    solution: tuple[SolutionStep, ...]
    evaluate_within_s: float
    proxy: bool
    """Whether OSWorld reaches the task's pages by a proxy: they are on the live web."""
    data: bytes
    """The file as it was read: what travels in a rollout."""

    def solve(self, seed: int) -> list[tuple[str, Action]]:
        """The scripted solution as (thought, action), its points drawn from their boxes by `seed`."""
        drawn = random.Random(derive_seed("solution", self.id, seed))
        return [(step.thought, _draw(step, drawn)) for step in self.solution]

    def demonstrate(self) -> list[tuple[str, Action]]:
        """The scripted solution as (thought, action), aimed at the middle of its boxes: what a policy imitates."""
        return [(step.thought, _aim(step)) for step in self.solution]


def load_tasks(suite: Path | None = None, ids: Sequence[str] = ()) -> list[Task]:
    """Tasks of a suite, sorted by domain and id, or exactly those named, in that order.

    Args:
        suite: folder with `examples/<domain>/<id>.json`; None is deskrl's own suite.
        ids: task ids; none named means all.

    Raises:
        UserError: no such folder, an id that it lacks, or an invalid file (named with its key).
    """
    files = _task_files(suite or OWN_SUITE)
    unknown = [name for name in ids if name not in files]
    if unknown:
        raise UserError(
            f"{suite or OWN_SUITE}: no task {', '.join(unknown)}", f"choose from its {len(files)} tasks ({_few(files)})"
        )
    return [read_task(files[name]) for name in (ids or files)]


def read_task(path: Path) -> Task:
    """The task in a file."""
    return parse_task(_read(path), str(path), domain=path.parent.name)


def parse_task(data: bytes, name: str, domain: str = "") -> Task:
    """The task in `data`; `name` is what an error calls it.

    Raises:
        UserError: it is no JSON, or a key is missing or of the wrong type.
    """
    reader = _Reader(name)
    raw = _parse_json(data, name)
    if not isinstance(raw, dict):
        reader.refuse("", "is no object")
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
    """Takes keys out of parsed JSON and refuses what is not there, by file and dotted key."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuse(self, key: str, reason: str) -> NoReturn:
        place = f"{self.name}: {key}" if key else self.name
        raise UserError(f"{place}: {reason}" if key else f"{place} {reason}", "mend the task file")

    def get(
        self, table: _Json, key: str, kind: type[_Value], default: _Value | None = None, prefix: str = ""
    ) -> _Value:
        value = table.get(key, default)
        if value is None:
            self.refuse(prefix + key, "is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind):
            self.refuse(prefix + key, f"is {type(value).__name__}, not {kind.__name__}")
        return value

    def steps(self, items: list[Any], key: str) -> Iterator[TypedItem]:
        for i, item in enumerate(items):
            place = f"{key}[{i}]"
            if not isinstance(item, dict):
                self.refuse(place, "is no object")
            kind = self.get(item, "type", str, prefix=f"{place}.")
            yield TypedItem(kind, self.get(item, "parameters", dict, {}, f"{place}."))

    def evaluator(self, raw: _Json) -> Evaluator:
        conj = self.get(raw, "conj", str, "and", "evaluator.")
        if conj not in ("and", "or"):
            self.refuse("evaluator.conj", f'is "{conj}", not "and" or "or"')
        func = raw.get("func")
        funcs = func if isinstance(func, list) else [func]
        if not funcs or not all(isinstance(name, str) for name in funcs):
            self.refuse("evaluator.func", "is neither a metric's name nor a list of such")
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
            if check.func != "infeasible" and check.result is None:
                self.refuse("evaluator.result", f"is missing for {check.func}")
        postconfig = self.get(raw, "postconfig", list, [], "evaluator.")
        return Evaluator(checks, conj, tuple(self.steps(postconfig, "evaluator.postconfig")))

    def _parallel(self, raw: _Json, key: str, func: Any) -> list[Any]:
        """`raw[key]` as one item for each metric: with a list of metrics it is a list of the same length."""
        value = raw.get(key)
        if not isinstance(func, list):
            return [value]
        if value is None:
            return [None] * len(func)
        if not isinstance(value, list) or len(value) != len(func):
            self.refuse(f"evaluator.{key}", f"is not a list of {len(func)}, one for each metric of evaluator.func")
        return value

    def _typed(self, value: Any, key: str) -> TypedItem | None:
        if not value:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "is no object")
        kind = self.get(value, "type", str, prefix=f"{key}.")
        return TypedItem(kind, {name: item for name, item in value.items() if name != "type"})

    def solution_step(self, raw: Any, key: str) -> SolutionStep:
        if not isinstance(raw, dict):
            self.refuse(key, "is no object")
        values = dict(self.get(raw, "action", dict, prefix=f"{key}."))
        box = values.pop("box", None)
        if box is not None and not _is_box(box):
            self.refuse(f"{key}.action.box", "is not [left, top, right, bottom]")
        thought = self.get(raw, "thought", str, prefix=f"{key}.")
        return SolutionStep(thought, self._action(values, f"{key}.action"), tuple(box) if box else None)

    def _action(self, values: _Json, key: str) -> Action:
        try:
            kind = ActionKind(values.pop("kind", ""))
        except ValueError:
            self.refuse(f"{key}.kind", f"is missing or not one of {', '.join(ActionKind)}")
        blank = Action(kind)
        for name in values:
            if not hasattr(blank, name) or name == "ends_episode":
                self.refuse(f"{key}.{name}", "is no field of an action")
            default = getattr(blank, name)
            self.get(values, name, list if isinstance(default, tuple) else type(default), prefix=f"{key}.")
        values["keys"] = tuple(values.get("keys", ()))
        return Action(kind, **values)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(type(side) is int for side in value):
        return False
    left, top, right, bottom = value
    return bool(left <= right and top <= bottom)


def _draw(step: SolutionStep, drawn: random.Random) -> Action:
    if step.box is None:
        return step.action
    left, top, right, bottom = step.box
    return replace(step.action, x=drawn.randint(left, right), y=drawn.randint(top, bottom))


def _aim(step: SolutionStep) -> Action:
    if step.box is None:
        return step.action
    left, top, right, bottom = step.box
    return replace(step.action, x=(left + right) // 2, y=(top + bottom) // 2)


def _task_files(suite: Path) -> dict[str, Path]:
    """Task files of a suite by id, which is the file's name."""
    files = sorted(suite.glob("examples/*/*.json"))
    if not files:
        raise UserError(f"{suite}: holds no examples/<domain>/<id>.json", "name the root of a task suite")
    return {file.stem: file for file in files}


def _few(names: dict[str, Path]) -> str:
    shown = ", ".join(list(names)[:4])
    return f"{shown}, …" if len(names) > 4 else shown


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "name a readable file") from error


def _parse_json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{name}: is no JSON: {error}", "mend the task file") from error
