"""Contract suite of model architectures: a tiny model is checked against transformers' own forward pass, in float32.

Derive from `ArchitectureSuite` in a test module, and run it with pytest:

    from deskrl.testing.architectures import ArchitectureSuite

    class TestMine(ArchitectureSuite):
        selection = "my_architecture:Mine"

It needs torch and transformers, runs on a CPU, and takes about 20 seconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from deskrl.core.file_io import read_json_object
from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import (
    end_of_turn_id,
    expand_images,
    image_token_id,
    read_image_sizing,
    render_prompt,
)
from deskrl.learner.batches.collator import Collator, MicroBatch
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy import activation_checkpointing
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor, make_collator
from deskrl.learner.policy.state_dict_names import checkpoint_tensors
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.models.architectures import load_architecture
from deskrl.models.model_checks import check_complete
from deskrl.proto.v1 import inference_pb2

_SIZE = (112, 112)
_WORDS = ("press", "the", "red", "green", "blue", "button", "finished")
_TEMPERATURE = 0.7
_RTOL, _ATOL = 1e-4, 1e-6


@dataclass(frozen=True)
class Outcome:
    """Logprobs of the action tokens of some rows, and gradients of their sum."""

    logprobs_N: Tensor
    gradients: dict[str, Tensor]


class TinyPolicy:
    """A tiny model, three rows of different lengths, and transformers' results for each row alone.

    Args:
        folder: folder in which the model is built.
        selection: value of `model.architecture`.
    """

    def __init__(self, folder: Path, selection: str) -> None:
        self.folder = folder
        self.selection = selection
        build_tiny_model(folder, 0, _SIZE, [" ".join(_WORDS)] * 8, selection)
        _perturb_vectors(folder / "model.safetensors")
        self.processor = load_processor(folder)
        self.screenshots = {image_hash(data): data for data in (_screenshot(shade) for shade in (40, 120, 200))}
        names = tuple(self.screenshots)
        # The second row repeats a screenshot of the first, the third has none.
        self.rows = [self._row(0, names[:2]), self._row(1, (names[2], names[0], names[2])), self._row(2, ())]
        self.reference = self._reference()

    def load(self, folder: Path | None = None, freeze_vision: bool = False) -> tuple[Policy, Collator]:
        """Load the policy, with its cache of image features if the vision tower is frozen, and its collator."""
        policy = load_policy(
            folder or self.folder, (), freeze_vision, feature_cache_bytes=10**8, architecture=self.selection
        )
        return policy, make_collator(policy, self.processor, lambda names: {it: self.screenshots[it] for it in names})

    def _row(self, index: int, screenshots: Sequence[str]) -> Row:
        """Return a row with an action after each screenshot, or after the text if there is none."""
        messages = [_message("USER", inference_pb2.Content(text=" ".join(_WORDS[: 3 + index])))]
        token_ids: list[int] = []
        targets: list[int] = []
        per_image = read_image_sizing(self.folder).num_tokens(*_SIZE)
        for number, name in enumerate(screenshots or [""]):
            if name:
                messages.append(_message("USER", inference_pb2.Content(image_hash=name)))
            rendered = render_prompt(messages, self.processor.tokenizer)
            count = [per_image] * len(rendered.image_hashes)
            token_ids = expand_images(rendered.ids, image_token_id(self.processor.tokenizer), count)
            action = self.processor.tokenizer.encode(_WORDS[index + number], add_special_tokens=False)
            action = [*action, end_of_turn_id(self.processor.tokenizer)]
            targets += range(len(token_ids), len(token_ids) + len(action))
            token_ids += action
            messages.append(_message("ASSISTANT", inference_pb2.Content(token_ids=inference_pb2.TokenIds(ids=action))))
        zeros = (0,) * len(targets)
        return Row(index, tuple(token_ids), tuple(screenshots), tuple(targets), tuple(map(float, zeros)), zeros)

    def _reference(self) -> Outcome:
        """Compute each row alone with transformers' own forward pass, without any replaced layer."""
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        logprobs = []
        for row in self.rows:
            ids_1L = torch.tensor([row.token_ids])
            images = [Image.open(io.BytesIO(self.screenshots[name])).convert("RGB") for name in row.images]
            vision = self.processor.image_processor(images=images, return_tensors="pt") if images else {}
            is_image_1L = (ids_1L == image_token_id(self.processor.tokenizer)).int()
            logits_LV = model(input_ids=ids_1L, mm_token_type_ids=is_image_1L, **vision).logits[0] / _TEMPERATURE
            place_N = torch.tensor(row.targets)
            logprobs_NV = logits_LV[place_N - 1].log_softmax(-1)
            logprobs.append(logprobs_NV.gather(1, ids_1L[0, place_N][:, None])[:, 0])
        logprobs_N = torch.cat(logprobs)
        logprobs_N.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types here
        gradients = {f"model.{name}": it.grad for name, it in model.named_parameters() if it.grad is not None}
        return Outcome(logprobs_N.detach(), gradients)


class ArchitectureSuite:
    """Tests of an architecture; derive from it in a class whose name starts with Test."""

    selection: ClassVar[str]
    """Value of `model.architecture`."""

    @pytest.fixture(scope="class")
    @classmethod
    def tiny(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPolicy]:
        """Provide the tiny model."""
        yield TinyPolicy(tmp_path_factory.mktemp("model"), cls.selection)

    def test_a_tiny_model_is_small_and_passes_the_checks_of_model_folders(self, tiny: TinyPolicy) -> None:
        check_complete(tiny.folder, self.selection)
        config = read_json_object(tiny.folder / "config.json", "")
        architecture = load_architecture(self.selection)
        assert architecture.model_type == config["model_type"], "core and learner have different architectures"
        num_parameters = sum(it.numel() for it in tiny.load()[0].parameters())
        assert num_parameters < 10_000_000, f"{num_parameters} parameters"
        assert architecture.vision_sizes(config).intermediate_size > 0

    def test_packed_rows_give_logprobs_and_gradients_of_single_rows(self, tiny: TinyPolicy) -> None:
        policy, collator = tiny.load()
        outcome = _differentiate(policy, [collator.collate(tiny.rows)])
        assert outcome.gradients.keys() == tiny.reference.gradients.keys()
        _assert_same(outcome, tiny.reference)

    def test_one_row_at_a_time_gives_the_same_logprobs_and_gradients(self, tiny: TinyPolicy) -> None:
        policy, collator = tiny.load()
        _assert_same(_differentiate(policy, [collator.collate([row]) for row in tiny.rows]), tiny.reference)

    def test_rows_before_and_after_a_row_do_not_matter(self, tiny: TinyPolicy) -> None:
        policy, collator = tiny.load()
        first, second, third = tiny.rows
        with torch.no_grad():
            (alone,) = _logprobs(policy, [collator.collate([second])])
            (packed,) = _logprobs(policy, [collator.collate([third, first, second, first])])
        start = len(third.targets) + len(first.targets)
        torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=_RTOL, atol=_ATOL)

    @pytest.mark.parametrize("mode", ["selective", "full"])
    def test_activation_checkpointing_changes_neither_logprobs_nor_gradients(
        self, tiny: TinyPolicy, mode: activation_checkpointing.Mode
    ) -> None:
        policy, collator = tiny.load()
        for part in (policy.architecture.language_model, policy.architecture.vision_tower):
            activation_checkpointing.enable(part(policy.model), mode)
        _assert_same(_differentiate(policy, [collator.collate(tiny.rows)]), tiny.reference)

    def test_a_frozen_vision_tower_encodes_each_screenshot_once_with_the_same_results(
        self, tiny: TinyPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy, collator = tiny.load(freeze_vision=True)
        num_encoded: list[int] = []
        encode = policy.architecture.encode_images

        def count(model: Any, pixel_values: Tensor, grid_thw_U3: Tensor) -> Sequence[Tensor]:
            num_encoded.append(len(grid_thw_U3))
            return encode(model, pixel_values, grid_thw_U3)

        monkeypatch.setattr(policy.architecture, "encode_images", count)
        frozen = {name for name, it in policy.named_parameters() if not it.requires_grad}
        assert frozen, "no parameter is frozen"
        expected = {name: it for name, it in tiny.reference.gradients.items() if name not in frozen}
        for _ in range(2):
            outcome = _differentiate(policy, [collator.collate([row]) for row in tiny.rows])
            assert outcome.gradients.keys() == expected.keys()
            _assert_same(outcome, tiny.reference)
        assert sum(num_encoded) == len(tiny.screenshots)

    def test_weights_are_saved_under_the_names_of_published_models_and_loaded_again(
        self, tiny: TinyPolicy, tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        policy, collator = tiny.load()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
        saved = checkpoint_tensors(policy.model)
        layout = load_architecture(self.selection).layout(read_json_object(tiny.folder / "config.json", ""))
        shapes = {_published(name): tuple(it.shape) for name, it in saved.items()}
        assert shapes == dict(layout.tensors)
        for path in tiny.folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        held = {name: it.detach().clone() for name, it in saved.items()}
        save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, _ = tiny.load(tmp_path)
        with torch.no_grad():
            batch = [collator.collate(tiny.rows)]
            torch.testing.assert_close(_logprobs(loaded, batch), _logprobs(policy, batch), rtol=0, atol=0)


def _perturb_vectors(path: Path) -> None:
    """Add noise to biases and norms, which are zeros and ones in a new model: a dropped one would not be noticed."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: it + 0.1 * torch.randn(it.shape, generator=generator) if it.ndim == 1 else it
        for name, it in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _published(name: str) -> str:
    """Return the name of a tensor as `TensorLayout` has it."""
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def _logprobs(policy: Policy, batches: Sequence[MicroBatch]) -> list[Tensor]:
    return [policy(batch, _TEMPERATURE, suppress=False).logprobs_N for batch in batches]


def _differentiate(policy: Policy, batches: Sequence[MicroBatch]) -> Outcome:
    policy.zero_grad()
    logprobs = []
    for batch in batches:
        (logprobs_N,) = _logprobs(policy, [batch])
        logprobs_N.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types here
        logprobs.append(logprobs_N.detach())
    gradients = {name: it.grad for name, it in policy.named_parameters() if it.grad is not None}
    return Outcome(torch.cat(logprobs), gradients)


def _assert_same(found: Outcome, expected: Outcome) -> None:
    """Compare the logprobs, and the gradients that were found."""
    torch.testing.assert_close(found.logprobs_N, expected.logprobs_N, rtol=_RTOL, atol=_ATOL)
    for name, gradient in found.gradients.items():
        reference = expected.gradients[name]
        limit = max(_ATOL, 1e-4 * float(reference.abs().max()))
        difference = float((gradient - reference).abs().max())
        assert difference <= limit, f"the gradient of {name} differs by {difference}, more than {limit}"


def _message(role: str, content: inference_pb2.Content) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=f"MESSAGE_ROLE_{role}", contents=[content])


def _screenshot(shade: int) -> bytes:
    """Return a PNG image in which patches differ."""
    picture = Image.merge(
        "RGB", (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), shade))
    )
    buffer = io.BytesIO()
    picture.resize(_SIZE).save(buffer, "PNG")
    return buffer.getvalue()
