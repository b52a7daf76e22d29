"""Tiny vision-language model whose output is forced: scripts of tool calls in the format of Qwen3-VL's chat template.

Sampling and logprobs are those of the model, except that all tokens but the script's are masked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList, Qwen3VLForConditionalGeneration

from deskrl.learner.policy.tiny_model import build_tiny_model

Script = Sequence[tuple[str, dict[str, Any]]]
"""Calls of one episode, one for each turn: name and arguments of a tool."""


def build_processor_and_model(
    folder: Path, image_size: tuple[int, int], chat_template: str, scripts: Sequence[Script]
) -> tuple[Any, ScriptedToolModel]:
    """Return the processor and a model that plays the scripts in turn, one for each row of a batch.

    Args:
        folder: folder for the files of the model.
        image_size: (width, height) of images in pixels; multiples of 56.
        chat_template: template that renders tools.
        scripts: scripts; the first call of each must be distinct.
    """
    corpus = [_render(call) for script in scripts for call in script]
    build_tiny_model(folder, 0, image_size, [*corpus, chat_template], architecture="qwen3_vl")
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = chat_template
    model = ScriptedToolModel.from_pretrained(folder)
    model.play(processor.tokenizer, scripts)
    return processor, model


class ScriptedToolModel(Qwen3VLForConditionalGeneration):
    """Model whose `generate` samples only the tokens of scripts."""

    def play(self, tokenizer: Any, scripts: Sequence[Script]) -> None:
        """Force the output of `generate` to scripts."""
        self._tokenizer = tokenizer
        self._texts = [[_render(call) for call in script] for script in scripts]

    def generate(self, input_ids: torch.Tensor, **arguments: Any) -> Any:
        """Continue each row by the next call of its script; after the last one, by an empty answer."""
        prompts = self._tokenizer.batch_decode(input_ids)
        outputs = [self._tokenizer.encode(self._next_text(row, prompt)) for row, prompt in enumerate(prompts)]
        forcing = _ForcedOutput(outputs, input_ids.shape[1], self._tokenizer.eos_token_id)
        return super().generate(input_ids, logits_processor=LogitsProcessorList([forcing]), **arguments)

    def _next_text(self, row: int, prompt: str) -> str:
        for script in self._texts:
            if script[0] in prompt:
                num_played = sum(text in prompt for text in script)
                return script[num_played] if num_played < len(script) else ""
        return self._texts[row % len(self._texts)][0]


class _ForcedOutput(LogitsProcessor):
    def __init__(self, outputs: list[list[int]], prompt_length: int, eos_id: int) -> None:
        self._outputs = outputs
        self._prompt_length = prompt_length
        self._eos_id = eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self._prompt_length
        forced = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(self._outputs):
            token = ids[position] if position < len(ids) else self._eos_id
            forced[row, token] = scores[row, token]
        return forced


def _render(call: tuple[str, dict[str, Any]]) -> str:
    name, arguments = call
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
