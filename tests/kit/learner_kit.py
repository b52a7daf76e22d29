"""What learner tests are made of: a tiny model, a toy task that it learns in seconds, and one who plays it.

The player is both actor and inference server in one thread: it leases from a real replay service, samples with
transformers' own forward pass, and takes weights over the real contract. Real desktops and vLLM are for the system
tests of the whole run; here the learner alone is examined.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deskrl.core import ids
from deskrl.core.families import Architecture
from deskrl.core.rendering import (
    end_of_turn_id,
    expand_images,
    image_sizing_of,
    image_token_id,
    processor_hash,
    render,
    suppressed_ids,
    vocab_size_of,
)
from deskrl.core.trajectory import Span, Step
from deskrl.learner.policy.shaped_model import UI_TARS_7B, Shape
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.proto.v1 import inference_pb2

SIZE = (112, 112)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "grey": (128, 128, 128)}
TASKS = {name: {"id": name, "instruction": f"press the {name} button"} for name in COLOURS}
SMALL_SHAPE = Shape(
    text={
        **UI_TARS_7B.text,
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
    },
    vision={**UI_TARS_7B.vision, "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
    | {"fullatt_block_indexes": [1]},
    min_pixels=UI_TARS_7B.min_pixels,
    max_pixels=UI_TARS_7B.max_pixels,
    shard_bytes=300_000,
)
"""All that the architecture of the 7B depends on, small: grouped heads, M-RoPE sections, windows, merging."""
_ROLES = {
    "user": inference_pb2.MESSAGE_ROLE_USER,
    "assistant": inference_pb2.MESSAGE_ROLE_ASSISTANT,
}


def build_model(folder: Path, seed: int = 0, architecture: Architecture = "qwen2_5_vl") -> Path:
    """A tiny model whose words are those of the toy task."""
    corpus = [f"{task['instruction']} screen press {name} finished" for name, task in TASKS.items()] * 4
    build_tiny_model(folder, seed, SIZE, corpus, architecture)
    return folder


def screenshot(task_id: str, index: int) -> bytes:
    """The toy screen: the task's colour, and a stripe that tells the step."""
    picture = Image.new("RGB", SIZE, COLOURS[task_id])
    picture.paste((255, 255, 255), (0, 0, 112, 56 * (index % 3)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def right_action(task_id: str, index: int) -> str:
    """What solves the toy task: press the colour, then finish."""
    return f"press {task_id}" if index == 0 else "finished"


def message(role: str, *contents: inference_pb2.Content) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=_ROLES[role], contents=contents)


def observation(task_id: str, index: int) -> inference_pb2.ChatMessage:
    """What the policy is shown before a step."""
    shot = inference_pb2.Content(image_hash=ids.image_hash(screenshot(task_id, index)))
    if index:
        return message("user", shot)
    return message("user", inference_pb2.Content(text=str(TASKS[task_id]["instruction"])), shot)


class ToyPolicy:
    """Samples as the served policy would, with transformers' own forward pass."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor_hash = processor_hash(folder, self.tokenizer)
        self._suppressed = list(suppressed_ids(self.tokenizer, vocab_size_of(folder)))
        self._tokens_per_image = image_sizing_of(folder).num_tokens(*SIZE)

    def prompt_ids(self, messages: Sequence[inference_pb2.ChatMessage]) -> list[int]:
        prompt = render(messages, self.tokenizer)
        per_image = [self._tokens_per_image] * len(prompt.image_hashes)
        return expand_images(prompt.ids, image_token_id(self.tokenizer), per_image)

    def logprobs(self, token_ids: Sequence[int], images: Sequence[bytes], suppress: bool = True) -> Tensor:
        """(length, vocabulary): of the token after each position."""
        batch = self._vision_inputs(images)
        input_ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids,
                mm_token_type_ids=(input_ids == image_token_id(self.tokenizer)).int(),
                **batch,
            ).logits[0]
        if suppress:
            logits[:, self._suppressed] = float("-inf")
        result: Tensor = logits.float().log_softmax(-1)
        return result

    def act(
        self,
        messages: Sequence[inference_pb2.ChatMessage],
        images: Sequence[bytes],
        generator: torch.Generator,
        max_tokens: int = 6,
    ) -> tuple[list[int], list[int], list[float]]:
        """Prompt ids, sampled ids, their logprobs."""
        prompt = self.prompt_ids(messages)
        action: list[int] = []
        logprobs: list[float] = []
        while len(action) < max_tokens and end_of_turn_id(self.tokenizer) not in action:
            row = self.logprobs([*prompt, *action], images)[-1]
            token = int(torch.multinomial(row.exp(), 1, generator=generator))
            action.append(token)
            logprobs.append(float(row[token]))
        return prompt, action, logprobs

    def _vision_inputs(self, images: Sequence[bytes]) -> dict[str, Any]:
        entries = [_processed(self.processor.image_processor, data) for data in images]
        return {
            "pixel_values": torch.cat([pixels for pixels, _ in entries]),
            "image_grid_thw": torch.cat([grid for _, grid in entries]),
        }


_CACHE: dict[bytes, tuple[Tensor, Tensor]] = {}


def _processed(image_processor: Any, data: bytes) -> tuple[Tensor, Tensor]:
    if data not in _CACHE:
        output = image_processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")
        _CACHE[data] = (output["pixel_values"], output["image_grid_thw"])
    return _CACHE[data]


def play(
    policy: ToyPolicy, task_id: str, seed: int, version: tuple[str, int] = ("test", 0), max_steps: int = 3
) -> tuple[list[Step], list[bytes], float]:
    """One sampled episode: steps, screenshots, reward."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    messages: list[inference_pb2.ChatMessage] = []
    steps: list[Step] = []
    shots: list[bytes] = []
    solved = True
    for index in range(max_steps):
        messages.append(observation(task_id, index))
        shots.append(screenshot(task_id, index))
        hashes = tuple(ids.image_hash(shot) for shot in shots)
        prompt, action, logprobs = policy.act(messages, shots, generator)
        text = policy.tokenizer.decode(action, skip_special_tokens=True)
        steps.append(
            Step(
                index=index,
                screenshot=hashes[-1],
                images=hashes,
                text=text,
                prompt_ids=tuple(prompt),
                action_ids=tuple(action),
                logprobs=tuple(logprobs),
                spans=(Span(*version, 0, len(action)),),
                processor_hash=policy.processor_hash,
            )
        )
        messages.append(message("assistant", inference_pb2.Content(token_ids=inference_pb2.TokenIds(ids=action))))
        solved = solved and text == right_action(task_id, min(index, 1))
        if "finished" in text:
            break
    return steps, shots, float(solved and len(steps) == 2)


def demonstrate(task_id: str) -> tuple[list[Step], list[bytes], float]:
    """One scripted episode, as an actor records it: conversations instead of ids."""
    messages: list[inference_pb2.ChatMessage] = []
    steps: list[Step] = []
    shots: list[bytes] = []
    for index in range(2):
        text = right_action(task_id, index)
        messages.append(observation(task_id, index))
        messages.append(message("assistant", inference_pb2.Content(text=text)))
        shots.append(screenshot(task_id, index))
        hashes = tuple(ids.image_hash(shot) for shot in shots)
        steps.append(
            Step(
                index=index,
                screenshot=hashes[-1],
                images=hashes,
                text=text,
                messages=tuple(part.SerializeToString() for part in messages),
            )
        )
    return steps, shots, 1.0
