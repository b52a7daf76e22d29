"""Pretraining with transformers: the batched forward pass, a whole small training, resuming, and the model folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import image_token_id, read_image_sizing, read_vocab_size, suppressed_ids
from deskrl.learner.policy.policy_model import load_policy, load_processor
from deskrl.learner.pretraining.answer_sequences import merge_order
from deskrl.learner.pretraining.main import pretrain
from deskrl.learner.pretraining.pretrain_config import PretrainConfig, read_pretrain_config
from deskrl.learner.pretraining.screen_curriculum import LEVELS
from deskrl.learner.pretraining.trainer import Trainer
from deskrl.learner.weights.canary import make_canary

_RECIPE = """\
name = "toy"
runs = "{runs}"
device = "cpu"
duration_s = {duration_s}
fonts = ["DejaVuSans.ttf"]
text_width = 64
text_layers = 2
vision_width = 64
vision_layers = 2
batch_size = 2
report_every_s = 0.5
num_eval_screens = 8
"""


def write_recipe(folder: Path, duration_s: float) -> Path:
    path = folder / "recipe.toml"
    path.write_text(_RECIPE.format(runs=folder, duration_s=duration_s))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    assert pretrain(write_recipe(folder, 2)) == 0
    return folder / "toy"


def test_the_batched_forward_pass_computes_what_transformers_computes(tmp_path: Path) -> None:
    trainer = Trainer(read_pretrain_config(write_recipe(tmp_path, 1)))
    style = LEVELS[3].style
    batch = trainer.source.draw(style, 3, held_out=False)
    hidden = trainer.forward(batch.pictures, batch.sequences)
    logits = trainer.forward.logits(hidden.answer)
    image_token, num_answer = image_token_id(trainer.tokenizer), batch.sequences.num_answer
    rows, columns = style.height // 14, style.width // 14
    for row in range(3):
        before = batch.sequences.before[row, int(batch.sequences.num_padding[row]) :].tolist()
        tokens = torch.tensor([[*before, *[image_token] * (rows * columns // 4), *batch.sequences.after[row].tolist()]])
        patches = batch.pictures[row].view(3, rows, 14, columns, 14).permute(1, 3, 0, 2, 4)[None]
        frames = (2 * merge_order(patches)[0] - 1)[:, :, None].expand(-1, -1, 2, -1, -1)
        outputs = trainer.model(
            input_ids=tokens,
            pixel_values=frames.reshape(len(frames), -1),
            image_grid_thw=torch.tensor([[1, rows, columns]]),
            mm_token_type_ids=(tokens == image_token).int(),
        )
        torch.testing.assert_close(logits[row], outputs.logits[0, -num_answer - 1 : -1], atol=1e-5, rtol=1e-4)


def test_a_training_writes_curves_weights_checksums_and_a_card(trained: Path) -> None:
    points = [json.loads(line) for line in (trained / "curves.jsonl").read_text().splitlines()]
    result: dict[str, Any] = json.loads((trained / "result.json").read_text())
    assert points[-1]["step"] == result["step"]
    assert 0 <= result["evaluation"]["large screens"]["held_out"]["hit"] <= 1
    files = sorted((trained / "model").glob("*.safetensors"))
    assert result["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert (trained / "model/SHA256SUMS").read_text().splitlines() == [
        f"{digest}  {name}" for name, digest in result["sha256"].items()
    ]
    assert "8 to 12 elements" in (trained / "model/README.md").read_text()


def test_the_model_folder_is_a_policy_of_the_learner(trained: Path) -> None:
    folder = trained / "model"
    processor = load_processor(folder)
    policy = load_policy(folder, suppressed_ids(processor.tokenizer, read_vocab_size(folder)), freeze_vision=True)
    probe = make_canary(policy, processor, read_image_sizing(folder), 504, 280)
    with torch.no_grad():
        scores = policy(probe.batch, 1.0, suppress=False)
    assert bool(scores.logprobs_N.isfinite().all())


def test_a_complete_training_is_not_repeated(trained: Path) -> None:
    written = (trained / "result.json").stat().st_mtime_ns
    assert pretrain(trained.parent / "recipe.toml") == 0
    assert (trained / "result.json").stat().st_mtime_ns == written


def test_a_directory_of_another_configuration_is_kept(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(_RECIPE.format(runs=trained.parent, duration_s=3))
    with pytest.raises(UserError, match=r"another configuration \(duration_s\)"):
        pretrain(other)


def test_a_font_that_is_not_found_leaves_no_directory_behind(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, 1)
    recipe.write_text(recipe.read_text().replace("DejaVuSans.ttf", "Unknown.ttf"))
    with pytest.raises(UserError, match=r"font Unknown\.ttf not found"):
        pretrain(recipe)
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_loaded_checkpoint_continues_with_the_same_weights_and_screens(tmp_path: Path) -> None:
    config: PretrainConfig = read_pretrain_config(write_recipe(tmp_path, 1))
    first, second = Trainer(config), Trainer(config)
    for _ in range(4):
        first.take_step(LEVELS[2])
    first.level, first.elapsed_s = 2, 0.5
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert (second.step, second.level, second.elapsed_s) == (4, 2, 0.5)
    for trainer in (first, second):
        trainer.take_step(LEVELS[2])
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value)
