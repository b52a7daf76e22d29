"""Targets of pretraining: answers, image tokens of the named element, sequences, curriculum, curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import encode_action, image_token_id, render_prompt
from deskrl.learner.pretraining.answer_sequences import STEP, SequenceBuilder, merge_order, point_targets, target_cells
from deskrl.learner.pretraining.layouts import Random
from deskrl.learner.pretraining.main import drop_points_after
from deskrl.learner.pretraining.names import MAX_LENGTH, NUM_CLASSES, name_codes
from deskrl.learner.pretraining.policy_folder import SYSTEM_PROMPT, build_character_tokenizer
from deskrl.learner.pretraining.pretrain_config import read_pretrain_config
from deskrl.learner.pretraining.pretrain_losses import Answers, answer_loss, finding_loss, hits, reading_loss
from deskrl.learner.pretraining.rendering import SLOTS
from deskrl.learner.pretraining.screen_curriculum import LEVELS, learning_rate_scale, next_level
from deskrl.proto.v1 import inference_pb2

RECIPE = Path(__file__).parents[2] / "deploy/pretraining/sight.toml"


def test_right_coordinates_are_the_multiples_of_the_step_inside_the_box() -> None:
    weights = point_targets(torch.tensor([10, 7]), torch.tensor([29, 14]), 56)
    assert (weights[0].nonzero().flatten() * STEP).tolist() == [14, 21, 28]
    assert (weights[1].nonzero().flatten() * STEP).tolist() == [7]
    assert weights.sum(1).tolist() == pytest.approx([1, 1])
    assert weights[0].argmax() * STEP == 21


def test_an_image_token_belongs_to_a_box_that_covers_a_fifth_of_it_or_has_its_middle_there() -> None:
    wide = torch.tensor([0, 0, 34, 28])  # 6 of the 28 columns of the second token
    tiny = torch.tensor([58, 30, 62, 34])
    cells = target_cells(torch.stack([wide, tiny]), 84, 56)
    assert cells[0].tolist() == [[True, True, False], [False, False, False]]
    assert cells[1].tolist() == [[False, False, False], [False, False, True]]


def test_patches_are_listed_block_by_block() -> None:
    assert merge_order(torch.arange(16).view(1, 4, 4)).tolist() == [
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    ]


def test_sequences_are_the_prompts_and_actions_of_the_policys_conversations() -> None:
    tokenizer = build_character_tokenizer()
    builder = SequenceBuilder(tokenizer, torch.device("cpu"))
    texts = ["Save as", "xyz7abc", "OK then", "Quit"] * 4
    names = torch.tensor([[*name_codes(text), *[0] * (MAX_LENGTH - len(text))] for text in texts])
    points = torch.tensor([[7 * row, 280 - 7 * row] for row in range(len(texts))])
    sequences = builder.build(Random(torch.Generator().manual_seed(0)), names, points)
    for row, text in enumerate(texts):
        before = sequences.before[row, int(sequences.num_padding[row]) :].tolist()
        after = sequences.after[row].tolist()
        instruction = tokenizer.decode(before).split("user\n")[1].removesuffix("<|vision_start|>")
        assert text in instruction
        messages = [
            inference_pb2.ChatMessage(
                role=inference_pb2.MESSAGE_ROLE_SYSTEM, contents=[inference_pb2.Content(text=SYSTEM_PROMPT)]
            ),
            inference_pb2.ChatMessage(
                role=inference_pb2.MESSAGE_ROLE_USER,
                contents=[inference_pb2.Content(text=instruction), inference_pb2.Content(image_hash="shot")],
            ),
        ]
        prompt, answer = after[: -sequences.num_answer], after[-sequences.num_answer :]
        assert [*before, image_token_id(tokenizer), *prompt] == list(render_prompt(messages, tokenizer).ids)
        x, y = points[row].tolist()
        assert answer == encode_action(f"Thought: \nAction: click(start_box='({x},{y})')", tokenizer)
        assert builder.number(torch.tensor(answer))[builder.x_place] == x


def test_reading_is_perfect_when_every_slot_has_its_character() -> None:
    targets = torch.tensor([[[1, 0, 0, 5]]])
    bias = torch.zeros(SLOTS * NUM_CLASSES)
    for slot, code in enumerate([1, 0, 0, 5]):
        bias[slot * NUM_CLASSES + code] = 50.0
    loss, read = reading_loss(torch.zeros(1, 1, 2), torch.zeros(SLOTS * NUM_CLASSES, 2), bias, targets)
    assert (float(loss), float(read)) == pytest.approx((0, 1))


def test_blank_slots_do_not_count_as_read() -> None:
    targets = torch.tensor([[[1, 0, 0, 0]]])
    bias = torch.zeros(SLOTS * NUM_CLASSES)
    bias[::NUM_CLASSES] = 50.0  # blank everywhere
    _, read = reading_loss(torch.zeros(1, 1, 2), torch.zeros(SLOTS * NUM_CLASSES, 2), bias, targets)
    assert float(read) == 0


def test_screens_without_an_element_do_not_change_the_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 10, generator=generator)
    numbers = (torch.tensor([3, 4]), torch.tensor([3, 4]))
    rights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    tokens = torch.zeros(2, 4, dtype=torch.long)
    answers = Answers(rights, rights, torch.zeros(2, 4), torch.tensor([1.0, 0.0]))
    first = Answers(rights[:1], rights[:1], torch.zeros(1, 4), torch.ones(1))
    both = answer_loss(logits, tokens, (1, 3), numbers, answers)
    assert float(both) == pytest.approx(float(answer_loss(logits[:1], tokens[:1], (1, 3), numbers, first)))
    logprobs = logits[0].log_softmax(-1)
    expected = -logprobs[[0, 2], 0].sum() - logprobs[[1, 3]][:, [3, 4]].mean(1).sum()
    assert float(both) == pytest.approx(float(expected))


def test_marking_the_named_element_lowers_the_loss_of_finding() -> None:
    targets = torch.tensor([[[True, False]]])
    weight, bias = torch.zeros(129, 1), torch.zeros(129)
    weight[0] = 10.0
    right, wrong = (
        finding_loss(torch.tensor([[[a], [-a]]]), weight, bias, targets, torch.ones(1)) for a in (1.0, -1.0)
    )
    assert float(right) < float(wrong)


def test_a_hit_is_inside_the_box_whose_right_and_bottom_edges_are_outside() -> None:
    boxes = torch.tensor([[10, 10, 20, 20]]).expand(3, 4)
    assert hits(torch.tensor([10, 20, 19]), torch.tensor([10, 15, 20]), boxes).tolist() == [True, False, False]


def test_a_level_ends_when_it_is_passed_or_its_time_is_over_and_the_last_one_never_does() -> None:
    assert next_level(0, accuracy=0.1, share_of_level=0.0) == 0
    assert next_level(0, accuracy=LEVELS[0].pass_rate, share_of_level=0.0) == 1
    assert next_level(0, accuracy=0.1, share_of_level=LEVELS[0].most_share) == 1
    assert next_level(len(LEVELS) - 1, accuracy=1.0, share_of_level=1.0) == len(LEVELS) - 1


def test_the_learning_rate_rises_stays_and_falls() -> None:
    scales = [learning_rate_scale(step, progress, 10, 0.5) for step, progress in ((0, 0.0), (9, 0.2), (99, 0.5))]
    assert scales == pytest.approx([0.1, 1, 1])
    assert learning_rate_scale(99, 0.75, 10, 0.5) == pytest.approx(0.5)
    assert learning_rate_scale(99, 1.0, 10, 0.5) == pytest.approx(0.02)


def test_points_after_the_checkpoint_and_lines_cut_off_by_a_crash_are_removed_from_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    path.write_text('{"step": 20}\n{"step": 40}\n{"step": 6')
    drop_points_after(path, 20)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 20}]


def test_the_recipe_of_the_repository_is_valid() -> None:
    config = read_pretrain_config(RECIPE)
    assert config.duration_s <= 1800
    assert config.text_width == 384


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("learning_rat = 0.1", "learning_rat"),
        ("text_width = 100", "text_width"),
        ('fonts = ["a.ttf", "a.ttf"]', "fonts: Value error, a font occurs twice"),
        ("duration_s = 0", "duration_s"),
    ],
)
def test_an_invalid_key_is_named(tmp_path: Path, line: str, problem: str) -> None:
    keys = {"name": 'name = "x"', "duration_s": "duration_s = 5", "fonts": 'fonts = ["a.ttf"]'}
    keys[line.partition(" ")[0]] = line
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(keys.values()))
    with pytest.raises(UserError, match=problem):
        read_pretrain_config(path)
