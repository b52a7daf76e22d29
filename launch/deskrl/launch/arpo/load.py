"""Loading of a run configuration from one of ARPO's YAML files.

Sources by increasing precedence: the file, ARPO's dotted overrides (`worker.rollout.n=8`), and deskrl's environment
variables and options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deskrl.core.config import RunConfig, dotted, load_values, overridden_keys
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.arpo.translate import Note, Problem, Translation, schedule, translate

_CHECKPOINT = "trainer.load_checkpoint_path"
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")


def load_arpo(file: Path, arguments: Sequence[str] = (), *, must_resume: bool = True) -> tuple[RunConfig, list[Note]]:
    """Load a run configuration and notes on the outcome of each of ARPO's keys.

    Args:
        file: ARPO's YAML file.
        arguments: further arguments of the command line: ARPO's overrides, such as `worker.rollout.n=8`, and options
            of deskrl, such as `--model.build tiny`.
        must_resume: reject a missing checkpoint to resume from.

    Raises:
        UserError: the file cannot be read, or keys cannot be translated; all of these are named.
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    arguments = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    stated = {**_read(file), **dict(_parse(override) for override in overrides)}
    overridden = overridden_keys(arguments)
    translation = translate(stated, file, overridden)
    _check_problems(translation, file)
    config = load_values(translation.tree(), str(file), arguments)
    from deskrl.actor import materialize_tasks

    num_tasks = materialize_tasks.count(config)
    later = schedule(stated, num_tasks, overridden)
    if (path := stated.get(_CHECKPOINT)) is not None:
        _resume(str(path), config, later, must_resume)
    _check_problems(later, file)
    translation.values |= later.values
    config = load_values(translation.tree(), str(file), arguments)
    return config, [_with_value(note, config) for note in translation.notes] + later.notes


def _with_value(note: Note, config: RunConfig) -> Note:
    """Add the value to a note whose outcome is a key of the run."""
    place: Any = config.model_dump()
    for part in note.outcome.split("."):
        if not isinstance(place, dict) or part not in place:
            return note
        place = place[part]
    return replace(note, outcome=f"{note.outcome} = {'unset' if place is None else place}")


def _check_problems(translation: Translation, file: Path) -> None:
    """Raise UserError if keys could not be translated."""
    if translation.problems:
        hints = dict.fromkeys(problem.hint for problem in translation.problems)
        raise UserError(f"{file}: {'; '.join(map(str, translation.problems))}", "; ".join(hints))


def _resume(path: str, config: RunConfig, result: Translation, must_resume: bool) -> None:
    """Translate the checkpoint to resume from: the newest of the run, or the weights of another run."""
    own = RunDir(config.run_dir).checkpoints
    place = next((place for place in (config.run_dir / path, Path(path)) if place.is_dir()), None)
    key = _CHECKPOINT
    if place is None:
        if must_resume:
            reason = f"no such checkpoint here or in {config.run_dir}"
            result.problems.append(
                Problem(key, path, reason, f"set {key}=null; a run resumes from its newest checkpoint automatically")
            )
        result.notes.append(Note(key, path, "there is no checkpoint yet"))
    elif place.resolve().parent == own.resolve():
        if place.resolve() != (own / "latest").resolve():
            reason, hint = "a run can only resume from its newest checkpoint", f"set {key}=checkpoints/latest"
            result.problems.append(Problem(key, path, reason, hint))
        result.notes.append(Note(key, path, "the run resumes from its newest checkpoint automatically"))
    elif not (place / "config.json").is_file():
        reason = "not a model directory in Hugging Face layout; shards of FSDP must be merged first"
        result.problems.append(
            Problem(key, path, reason, f"set {key}=DIRECTORY with config.json and model.safetensors")
        )
    else:
        result.values["model.path"] = place
        result.notes.append(Note(key, path, "model.path: training starts from its weights, with a new optimizer state"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}", "give one of ARPO's YAML files") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a number or a date out of range
        raise UserError(f"{file}: not readable as YAML: {error}", "correct the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: has no keys", "give one of ARPO's YAML files")
    return dict(dotted(content))


def _parse(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    try:
        return key, yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{override}: the value is not valid YAML", "quote the value") from error
