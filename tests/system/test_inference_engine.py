"""Engine: screenshots as preprocessed bytes yield the same results as vLLM's own image processing."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from inference_kit import replica_config, screenshot, user
from PIL import Image

from deskrl.core.config import RunConfig
from deskrl.inference.engine_prompt import EnginePrompt, to_vllm_input
from deskrl.inference.inference_service import ModelProcessor, PromptBuilder
from deskrl.inference.vllm_engine import VllmEngine
from deskrl.proto.v1 import common_pb2

MAX_BATCHED_TOKENS = 40
"""Number of tokens that the engine computes per step: fewer than two prompts have."""


def test_bytes_yield_the_results_of_vllms_image_processing_and_requests_do_not_affect_each_other(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    config = replica_config(tmp_path, port=1)
    with_small_steps = config.inference.model_copy(
        update={"engine_args": {"max_num_batched_tokens": MAX_BATCHED_TOKENS}}
    )
    config = config.model_copy(update={"inference": with_small_steps})
    model_processor = ModelProcessor(config.model_folder, AutoTokenizer.from_pretrained(config.model_folder))

    async def scenario() -> None:
        engine = await VllmEngine.start(config, model_processor.model_spec)
        try:
            await both_inputs_yield_the_same_distribution(engine, config, model_processor)
            await screenshots_that_the_worker_lacks_are_resent(engine, config, model_processor)
            await partly_computed_prompts_get_the_actions_that_they_get_alone(engine, config, model_processor)
        finally:
            engine.shutdown()

    asyncio.run(scenario())


async def make_prompt(config: RunConfig, model_processor: ModelProcessor, *images: common_pb2.Image) -> EnginePrompt:
    prompt = await PromptBuilder(config, model_processor).build([user("Look:", *images)], images, 8)
    assert isinstance(prompt, EnginePrompt)
    return prompt


async def both_inputs_yield_the_same_distribution(
    engine: VllmEngine, config: RunConfig, model_processor: ModelProcessor
) -> None:
    from vllm import SamplingParams

    images = [screenshot(1), screenshot(2)]
    prompt = await make_prompt(config, model_processor, *images)
    ours = await engine.sample(prompt, temperature=1.0, max_tokens=8, seed=3, name="ours")
    decoded = [Image.open(io.BytesIO(image.data)).convert("RGB") for image in images]
    theirs = {"prompt_token_ids": list(prompt.ids), "multi_modal_data": {"image": decoded}}
    params = SamplingParams(temperature=1.0, max_tokens=8, seed=3, logprobs=0, detokenize=False)
    async for output in engine.llm.generate(theirs, params, "theirs"):
        completion = output.outputs[0]
    assert list(output.prompt_token_ids) == list(ours.prompt_ids)
    assert list(completion.token_ids) == list(ours.action_ids)
    logprobs = [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert list(ours.logprobs) == pytest.approx(logprobs, abs=1e-6)


async def screenshots_that_the_worker_lacks_are_resent(
    engine: VllmEngine, config: RunConfig, model_processor: ModelProcessor
) -> None:
    known = await make_prompt(config, model_processor, screenshot(3))
    lost = await make_prompt(config, model_processor, screenshot(4))
    # The state after a request that was cancelled at this point: vLLM considers the screenshot sent.
    to_vllm_input(engine.llm.input_processor, lost, model_processor.model_spec.image_token_id)
    for prompt in (known, lost):
        sampled = await engine.sample(prompt, temperature=1.0, max_tokens=4, seed=3, name="after")
        assert len(sampled.action_ids) == 4 or sampled.stopped


async def partly_computed_prompts_get_the_actions_that_they_get_alone(
    engine: VllmEngine, config: RunConfig, model_processor: ModelProcessor
) -> None:
    prompts = [await make_prompt(config, model_processor, screenshot(10 + number)) for number in range(6)]
    assert len(prompts[0].ids) < MAX_BATCHED_TOKENS < 2 * len(prompts[0].ids)

    async def act(seed: int) -> list[int]:
        sampled = await engine.sample(prompts[seed], temperature=1.0, max_tokens=8, seed=seed, name=f"partial-{seed}")
        return list(sampled.action_ids)

    concurrent = await asyncio.gather(*map(act, range(6)))
    await engine.llm.reset_prefix_cache()
    assert concurrent == [await act(seed) for seed in range(6)]
