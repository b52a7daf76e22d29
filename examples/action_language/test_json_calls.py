"""The language of JSON calls keeps the contract of action languages, is played on a desktop, and is learned."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from PIL import Image

from deskrl.actor import materialize_tasks
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.policies import ScriptedPolicy
from deskrl.actor.tasks.prove import prove
from deskrl.core.config import AgentConfig, RunConfig
from deskrl.core.prompt_rendering import read_image_sizing
from deskrl.core.run_dir import RunDir
from deskrl.learner.batches.packing import pack
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import build_model
from deskrl.learner.policy.policy_model import load_policy, load_processor, make_collator
from deskrl.learner.warm_start import demonstration
from deskrl.testing.action_languages import ActionLanguageSuite

LANGUAGE = "json_calls:JsonCalls"


class TestJsonCalls(ActionLanguageSuite):
    selection = LANGUAGE


def config_in(runs: Path) -> RunConfig:
    """Return a run of one simulated task with screenshots of 112 x 112 pixels."""
    agent = {"action_language": LANGUAGE, "prompt": "brief", "image_width": 112, "image_height": 112}
    desktop = {"provider": "simulated", "num_envs": 1, "simulated": {"time_scale": 1e-6, "hang_rate": 0}}
    return RunConfig.model_validate(
        {"runs": runs, "agent": agent, "desktop": desktop, "tasks": {"ids": ["type-amber"]}}
    )


def test_a_scripted_solution_is_played_in_the_language(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (proof,) = asyncio.run(prove(materialize_tasks.load(config)[0], config, num_repeats=1))
    assert proof.problems == []


def test_the_duration_of_a_pause_is_an_option() -> None:
    config = AgentConfig(action_language=LANGUAGE, action_language_options={"wait_s": 7.5})
    parsed = select_language(config).parse('{"thought": "", "tool": "wait"}', (1000, 1000))
    assert parsed.action.seconds == 7.5


def test_the_tiny_model_learns_a_scripted_solution_in_the_language(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (task,), _ = materialize_tasks.load(config)
    RunDir(config.run_dir).create()
    materialize_tasks.main(config)
    build_model.main(config)
    processor, sizing = load_processor(config.model_folder), read_image_sizing(config.model_folder)
    conversation, policy = Agent(config.agent).start_conversation(task.instruction), ScriptedPolicy(task)
    images, steps = {}, []
    for index in range(len(task.demonstrate())):
        image = conversation.observe(Image.new("RGB", (640, 480), (60 * index, 0, 0)))
        images[image.hash] = image.data
        steps.append(asyncio.run(policy.decide(conversation, image, index)).step)
    sizes = dict.fromkeys(images, config.image_size)
    episode = demonstration(Trajectory("", task.id, 1.0, tuple(steps)), processor.tokenizer, sizing, sizes)
    rows = pack(0, episode.steps, [[0] * len(step.action_ids) for step in episode.steps])
    learner = load_policy(config.model_folder, (), freeze_vision=True)
    batch = make_collator(learner, processor, lambda names: {name: images[name] for name in names}).collate(rows)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = imitation_loss(learner(batch, 1.0).logprobs_N, len(batch.target_N))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
