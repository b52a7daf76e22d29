"""Reads one of ARPO's YAML files and overrides, and makes a run's configuration of them.

The file comes first, then dotted overrides (`worker.rollout.n=8`), then deskrl's own environment and options, which
win.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deskrl.core.arpo.translate import Note, Refusal, Translation, schedule, translate
from deskrl.core.config import RunConfig, dotted, load_values, overridden_keys
from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder

_CHECKPOINT = "trainer.load_checkpoint_path"
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")


def load_arpo(file: Path, arguments: Sequence[str] = (), *, must_resume: bool = True) -> tuple[RunConfig, list[Note]]:
    """A run's configuration, and what became of each key.

    Args:
        file: ARPO's YAML file.
        arguments: what follows it on the command line: ARPO's overrides, as `worker.rollout.n=8`, and options of
            deskrl, as `--model.build tiny`.
        must_resume: refuse a checkpoint that is to be gone on from and is not there.

    Raises:
        UserError: the file cannot be read, or keys fit no run; all of these are named, each with its mend.
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    arguments = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    stated = {**_read(file), **dict(_parse(override) for override in overrides)}
    overridden = overridden_keys(arguments)
    translation = translate(stated, file, overridden)
    _refuse(translation, file)
    config = load_values(translation.tree(), str(file), arguments)
    num_tasks = importlib.import_module("deskrl.actor.prepare").count(config)
    later = schedule(stated, num_tasks, overridden)
    if (path := stated.get(_CHECKPOINT)) is not None:
        _resume(str(path), config, later, must_resume)
    _refuse(later, file)
    translation.values |= later.values
    config = load_values(translation.tree(), str(file), arguments)
    return config, [_with_value(note, config) for note in translation.notes] + later.notes


def _with_value(note: Note, config: RunConfig) -> Note:
    """A note that names a key of the run, with the value that it has there."""
    place: Any = config.model_dump()
    for part in note.became.split("."):
        if not isinstance(place, dict) or part not in place:
            return note
        place = place[part]
    return replace(note, became=f"{note.became} = {'unset' if place is None else place}")


def _refuse(translation: Translation, file: Path) -> None:
    if translation.refusals:
        told = "; ".join(str(refusal) for refusal in translation.refusals)
        raise UserError(f"{file}: {told}", "give each mend after the file's name")


def _resume(path: str, config: RunConfig, result: Translation, must_resume: bool) -> None:
    """A checkpoint to go on from: the run's own newest, which it takes by itself, or the weights of another's."""
    own = RunFolder(config.folder).checkpoints
    place = next((place for place in (config.folder / path, Path(path)) if place.is_dir()), None)
    key = _CHECKPOINT
    if place is None:
        if must_resume:
            why = f"there is no such checkpoint here nor in {config.folder}"
            result.refusals.append(Refusal(key, path, why, f"{key}=null: a run goes on from its newest by itself"))
        result.notes.append(Note(key, path, "nothing to go on from yet"))
    elif place.resolve().parent == own.resolve():
        if place.resolve() != (own / "latest").resolve():
            why, mend = "a run goes on from its newest checkpoint", f"{key}=checkpoints/latest"
            result.refusals.append(Refusal(key, path, why, mend))
        result.notes.append(Note(key, path, "the run goes on from its newest checkpoint by itself"))
    elif not (place / "config.json").is_file():
        why = "no model folder that transformers loads: FSDP's shards have to be merged first"
        result.refusals.append(Refusal(key, path, why, f"{key}=FOLDER with config.json and model.safetensors"))
    else:
        result.values["model.path"] = place
        result.notes.append(Note(key, path, "model.path: its weights are gone on from, under a new optimizer"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}", "name one of ARPO's YAML files") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not readable as YAML: {error}", "mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no keys", "name one of ARPO's YAML files")
    return dict(dotted(content))


def _parse(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override}: the value is no YAML", "quote it") from error
