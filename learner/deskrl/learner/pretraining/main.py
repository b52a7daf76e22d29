"""Command `deskrl pretrain`: trains in a run directory, resumes what was interrupted, and writes the model folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object, report_write_errors, write_json
from deskrl.learner.pretraining.policy_folder import weight_checksums, write_policy_folder
from deskrl.learner.pretraining.pretrain_card import pretrain_card
from deskrl.learner.pretraining.pretrain_config import PretrainConfig, read_pretrain_config
from deskrl.learner.pretraining.screen_curriculum import LEVELS
from deskrl.learner.pretraining.trainer import Trainer

CONFIG = "config.json"
CURVES = "curves.jsonl"
CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
MODEL = "model"
_SAVE_EVERY_S = 120.0

_log = logging.getLogger(__name__)


def pretrain(path: Path) -> int:
    """Train the policy of a pretraining configuration, or continue its training; return the exit status.

    Raises:
        UserError: the configuration is invalid, the device is missing, or the directory belongs to another training.
    """
    config = read_pretrain_config(path)
    run_dir = config.run_dir
    _check_device(config)
    _check_recorded(run_dir, config)
    if (run_dir / RESULT).exists():
        _log.info("%s is complete; its policy is %s", run_dir, run_dir / MODEL)
        return 0
    trainer = Trainer(config)  # before the directory, which an invalid font must not leave behind
    with report_write_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    if (run_dir / CHECKPOINT).exists():
        trainer.load(run_dir / CHECKPOINT)
        drop_points_after(run_dir / CURVES, trainer.step)
        _log.info("continuing after %.0f s and %d screens", trainer.elapsed_s, trainer.screens)
    _train(trainer, run_dir)
    _finish(trainer, config)
    return 0


def drop_points_after(path: Path, step: int) -> None:
    """Remove the points of curves that come after a step, and a line that a crash has cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if point["step"] <= step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def final_styles() -> dict[str, Any]:
    """Return the distributions of the final evaluation, by name."""
    style = LEVELS[-1].style
    return {
        "large screens": style,
        "8 to 12 elements": replace(style, columns=(2, 4), rows=(4, 7), num_elements=(8, 12), window_rate=0.7),
        "similar names": replace(style, names=replace(style.names, similar_rate=0.5)),
        "small screens": LEVELS[-2].style,
    }


def _check_device(config: PretrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no GPU is available", "set device to cpu, for a small model and a short duration_s")


def _check_recorded(run_dir: Path, config: PretrainConfig) -> None:
    """Raise UserError if the directory has another configuration."""
    path, values = run_dir / CONFIG, config.model_dump(mode="json")
    if not path.exists():
        return
    recorded = read_json_object(path, "choose another name")
    if changed := sorted(key for key in values.keys() | recorded.keys() if values.get(key) != recorded.get(key)):
        problem = f"{run_dir}: has a training with another configuration ({', '.join(changed)})"
        raise UserError(problem, "choose another name, or remove the directory")


def _train(trainer: Trainer, run_dir: Path) -> None:
    saved = time.monotonic()

    def report(point: Mapping[str, Any]) -> None:
        with report_write_errors(run_dir), (run_dir / CURVES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        hit = f", held-out clicks {point['held_out_hit']:.3f}" if "held_out_hit" in point else ""
        _log.info(
            "%.0f s, %d screens (%d/s), %s: accuracy %.3f%s",
            *(point[name] for name in ("elapsed_s", "screens", "screens_per_s", "level", "accuracy")),
            hit,
        )
        if time.monotonic() - saved > _SAVE_EVERY_S:
            save()

    def save() -> None:
        nonlocal saved
        with report_write_errors(run_dir):
            trainer.save(run_dir / CHECKPOINT)
        saved = time.monotonic()

    torch.set_float32_matmul_precision("high")
    trainer.train(report)
    save()


def _finish(trainer: Trainer, config: PretrainConfig) -> None:
    """Evaluate the policy, and write its folder, its card and the result."""
    results = {
        name: {
            "training": trainer.evaluator.evaluate(style, config.num_eval_screens, held_out=False).as_json(),
            "held_out": trainer.evaluator.evaluate(style, config.num_eval_screens, held_out=True).as_json(),
        }
        for name, style in final_styles().items()
    }
    folder = config.run_dir / MODEL
    with report_write_errors(config.run_dir):
        write_policy_folder(folder, trainer.model, trainer.tokenizer, trainer.shape)
        result = {
            "step": trainer.step,
            "screens": trainer.screens,
            "elapsed_s": round(trainer.elapsed_s, 1),
            "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "evaluation": results,
            "sha256": weight_checksums(folder),
        }
        (folder / "README.md").write_text(pretrain_card(config, result), encoding="utf-8")
        write_json(config.run_dir / RESULT, result)
    _log.info("held-out clicks %.3f; the policy is %s", results["large screens"]["held_out"]["hit"], folder)
