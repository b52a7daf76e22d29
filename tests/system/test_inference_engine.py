"""The engine gets screenshots as bytes, and makes of them what vLLM's own processing would."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from inference_kit import replica_config, screenshot, user
from PIL import Image

from deskrl.core.config import RunConfig
from deskrl.inference.acting import Prompter, PromptFormat
from deskrl.inference.engine import Engine
from deskrl.inference.engine_input import Prompt, engine_input
from deskrl.proto.v1 import common_pb2

FEW_TOKENS = 40
"""That the engine computes in a step: fewer than several prompts have."""


def test_screenshots_are_seen_as_vllm_would_show_them_and_prompts_at_once_act_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    # On a GPU, which this process may hold already: a forked engine could not use it.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    config = replica_config(tmp_path, port=1)
    in_parts = config.inference.model_copy(update={"engine_args": {"max_num_batched_tokens": FEW_TOKENS}})
    config = config.model_copy(update={"inference": in_parts})
    prompt_format = PromptFormat(config.model_folder, AutoTokenizer.from_pretrained(config.model_folder))

    async def scenario() -> None:
        engine = await Engine.start(config, prompt_format.facts)
        try:
            await both_ways_give_one_distribution(engine, config, prompt_format)
            await what_the_worker_lacks_is_sent_again(engine, config, prompt_format)
            await who_is_taken_in_parts_acts_as_alone(engine, config, prompt_format)
        finally:
            engine.shutdown()

    asyncio.run(scenario())


async def make_prompt(config: RunConfig, prompt_format: PromptFormat, *images: common_pb2.Image) -> Prompt:
    prompt = await Prompter(config, prompt_format).prompt([user("Look:", *images)], images, 8)
    assert isinstance(prompt, Prompt)
    return prompt


async def both_ways_give_one_distribution(engine: Engine, config: RunConfig, prompt_format: PromptFormat) -> None:
    from vllm import SamplingParams

    images = [screenshot(1), screenshot(2)]
    prompt = await make_prompt(config, prompt_format, *images)
    ours = await engine.sample(prompt, temperature=1.0, max_tokens=8, seed=3, name="ours")
    pictures = [Image.open(io.BytesIO(image.data)).convert("RGB") for image in images]
    theirs = {"prompt_token_ids": list(prompt.ids), "multi_modal_data": {"image": pictures}}
    params = SamplingParams(temperature=1.0, max_tokens=8, seed=3, logprobs=0, detokenize=False)
    async for output in engine.llm.generate(theirs, params, "theirs"):
        completion = output.outputs[0]
    assert list(output.prompt_token_ids) == list(ours.prompt_ids)
    assert list(completion.token_ids) == list(ours.action_ids)
    logprobs = [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert list(ours.logprobs) == pytest.approx(logprobs, abs=1e-6)


async def what_the_worker_lacks_is_sent_again(engine: Engine, config: RunConfig, prompt_format: PromptFormat) -> None:
    known = await make_prompt(config, prompt_format, screenshot(3))
    lost = await make_prompt(config, prompt_format, screenshot(4))
    # What a request leaves behind that is given up between the two: vLLM believes that the screenshot was sent.
    engine_input(engine.llm.input_processor, lost, prompt_format.facts.image_token_id)
    for prompt in (known, lost):
        sampled = await engine.sample(prompt, temperature=1.0, max_tokens=4, seed=3, name="after")
        assert len(sampled.action_ids) == 4 or sampled.stopped


async def who_is_taken_in_parts_acts_as_alone(engine: Engine, config: RunConfig, prompt_format: PromptFormat) -> None:
    prompts = [await make_prompt(config, prompt_format, screenshot(10 + number)) for number in range(6)]
    assert len(prompts[0].ids) < FEW_TOKENS < 2 * len(prompts[0].ids)

    async def act(seed: int) -> list[int]:
        sampled = await engine.sample(prompts[seed], temperature=1.0, max_tokens=8, seed=seed, name=f"part-{seed}")
        return list(sampled.action_ids)

    together = await asyncio.gather(*map(act, range(6)))
    await engine.llm.reset_prefix_cache()
    assert together == [await act(seed) for seed in range(6)]
