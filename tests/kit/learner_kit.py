"""Helpers for learner tests: a tiny model, and a toy task that it can be trained on within seconds.

Actions are sampled with transformers' own forward pass; no desktop and no vLLM is involved.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deskrl.actor.agent.conversation import Agent
from deskrl.core import ids
from deskrl.core.config import AgentConfig
from deskrl.core.prompt_rendering import (
    end_of_turn_id,
    expand_images,
    image_token_id,
    processor_hash,
    read_image_sizing,
    read_vocab_size,
    render_prompt,
    suppressed_ids,
)
from deskrl.core.step_codec import Step, VersionSpan
from deskrl.learner.policy.random_weight_model import UI_TARS_7B, ModelShape
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.proto.v1 import inference_pb2

SIZE = (112, 112)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "grey": (128, 128, 128)}
TASKS = {name: {"id": name, "instruction": f"press the {name} button"} for name in COLOURS}
SMALL_SHAPE = ModelShape(
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
"""Small model with all features of the 7B's architecture: grouped heads, M-RoPE sections, windows, merging."""
_ROLES = {
    "user": inference_pb2.MESSAGE_ROLE_USER,
    "assistant": inference_pb2.MESSAGE_ROLE_ASSISTANT,
}


def build_model(folder: Path, seed: int = 0, architecture: str = "qwen2_5_vl") -> Path:
    """Build a tiny model whose vocabulary covers the toy task; return its folder."""
    corpus = [f"{task['instruction']} screen press {name} finished" for name, task in TASKS.items()] * 4
    build_tiny_model(folder, seed, SIZE, corpus, architecture)
    return folder


def screenshot(task_id: str, index: int) -> bytes:
    """Return a screenshot of the toy task: the task's colour, with a stripe whose height depends on the step."""
    picture = Image.new("RGB", SIZE, COLOURS[task_id])
    picture.paste((255, 255, 255), (0, 0, 112, 56 * (index % 3)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def correct_action(task_id: str, index: int) -> str:
    """Return the correct action of a step of the toy task: press the colour, then finish."""
    return f"press {task_id}" if index == 0 else "finished"


def message(role: str, *contents: inference_pb2.Content) -> inference_pb2.ChatMessage:
    """Return a chat message."""
    return inference_pb2.ChatMessage(role=_ROLES[role], contents=contents)


def observation(task_id: str, index: int) -> inference_pb2.ChatMessage:
    """Return the user message before a step."""
    shot = inference_pb2.Content(image_hash=ids.image_hash(screenshot(task_id, index)))
    if index:
        return message("user", shot)
    return message("user", inference_pb2.Content(text=str(TASKS[task_id]["instruction"])), shot)


class ToyPolicy:
    """Policy that samples like the served one, with transformers' own forward pass."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor_hash = processor_hash(folder, self.tokenizer)
        self._suppressed = list(suppressed_ids(self.tokenizer, read_vocab_size(folder)))
        self._tokens_per_image = read_image_sizing(folder).num_tokens(*SIZE)

    def prompt_ids(self, messages: Sequence[inference_pb2.ChatMessage]) -> list[int]:
        """Return the token ids of a prompt."""
        prompt = render_prompt(messages, self.tokenizer)
        per_image = [self._tokens_per_image] * len(prompt.image_hashes)
        return expand_images(prompt.ids, image_token_id(self.tokenizer), per_image)

    def logprobs(self, token_ids: Sequence[int], images: Sequence[bytes], suppress: bool = True) -> Tensor:
        """Return logprobs of the token after each position, with shape (length, vocabulary)."""
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
        """Sample an action; return prompt ids, action ids and their logprobs."""
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


_CACHE: dict[tuple[str, bytes], tuple[Tensor, Tensor]] = {}


def _processed(image_processor: Any, data: bytes) -> tuple[Tensor, Tensor]:
    key = (type(image_processor).__name__, data)
    if key not in _CACHE:
        output = image_processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")
        _CACHE[key] = (output["pixel_values"], output["image_grid_thw"])
    return _CACHE[key]


def run_episode(
    policy: ToyPolicy, task_id: str, seed: int, version: tuple[str, int] = ("test", 0), max_steps: int = 3
) -> tuple[list[Step], list[bytes], float]:
    """Sample one episode; return steps, screenshots and reward."""
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
                spans=(VersionSpan(*version, 0, len(action)),),
                processor_hash=policy.processor_hash,
            )
        )
        messages.append(message("assistant", inference_pb2.Content(token_ids=inference_pb2.TokenIds(ids=action))))
        solved = solved and text == correct_action(task_id, min(index, 1))
        if "finished" in text:
            break
    return steps, shots, float(solved and len(steps) == 2)


def run_conversation(policy: ToyPolicy, config: AgentConfig, num_steps: int) -> tuple[list[Step], list[bytes], float]:
    """Sample one episode in a conversation of the actor, with a new screenshot in each step.

    Returns:
        Steps, screenshots and reward.
    """
    generator = torch.Generator().manual_seed(0)
    conversation = Agent(config).start_conversation("press the red button")
    steps: list[Step] = []
    shots: dict[str, bytes] = {}
    for index in range(num_steps):
        image = conversation.observe(Image.new("RGB", SIZE, (20 * index, 255 - 20 * index, 90)))
        shots[image.hash] = image.data
        prompt = conversation.prompt()
        ids_of_prompt, action, logprobs = policy.act(
            prompt.messages, [shots[name] for name in prompt.images], generator
        )
        steps.append(
            Step(
                index=index,
                screenshot=image.hash,
                images=prompt.images,
                text="",
                prompt_ids=tuple(ids_of_prompt),
                action_ids=tuple(action),
                logprobs=tuple(logprobs),
                processor_hash=policy.processor_hash,
            )
        )
        conversation.respond(action)
    return steps, list(shots.values()), 0.0


def demonstrate(task_id: str) -> tuple[list[Step], list[bytes], float]:
    """Return steps, screenshots and reward of a scripted episode, which has conversations instead of token ids."""
    messages: list[inference_pb2.ChatMessage] = []
    steps: list[Step] = []
    shots: list[bytes] = []
    for index in range(2):
        text = correct_action(task_id, index)
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
