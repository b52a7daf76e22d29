"""Rendering of recorded demonstrations in the action language of a run, for the learner's warm start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.demonstrations import (
    Demonstration,
    DemonstrationStep,
    find_demonstrations,
    read_demonstration,
    read_screenshot,
)
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.group_outcome import is_success
from deskrl.core.imitation_data import ImitationDataWriter, RenderedDemonstration, is_complete
from deskrl.core.left_out import LeftOut, count_of
from deskrl.core.run_dir import RunDir
from deskrl.core.screenshot_png import open_screenshot
from deskrl.core.step_codec import Step


def render_demonstrations(config: RunConfig, source: Path) -> LeftOut:
    """Write the demonstrations that a run imitates into its run directory, and print what is left out.

    Nothing is done if that was completed before.

    Args:
        config: run configuration.
        source: folder of demonstrations.

    Returns:
        What was left out; empty if nothing was done.

    Raises:
        UserError: `source` contains no demonstrations, or none that can be imitated.
    """
    folder = RunDir(config.run_dir).demonstrations
    left_out = LeftOut()
    facts = {
        "source": str(source),
        "agent": config.agent.model_dump(mode="json"),
        "max_steps": config.tasks.max_steps,
        "success_threshold": config.replay.success_threshold,
    }
    if is_complete(folder, facts):
        return left_out
    try:
        found = find_demonstrations(source)
    except UserError as error:
        raise UserError(f"learner.warm_start.demonstrations: {error.message}", error.hint) from error
    writer = ImitationDataWriter(folder)
    renderer = _Renderer(config, left_out)
    num_episodes = num_steps = 0
    for path in found:
        rendered = renderer.render(path)
        if rendered is not None:
            writer.add(rendered.demonstration, rendered.images)
            num_episodes += 1
            num_steps += len(rendered.demonstration.steps)
    left_out.print_table()
    counts = f"{count_of(num_episodes, 'demonstration')} with {count_of(num_steps, 'step')}"
    print(
        f"{source}: {counts} to imitate; {count_of(left_out.count('demonstration'), 'demonstration')} and "
        f"{count_of(left_out.count('step'), 'step')} left out",
        flush=True,
    )
    if num_episodes == 0:
        raise UserError(f"learner.warm_start.demonstrations: {source}: none can be imitated", "the table shows why")
    writer.complete(**facts)
    return left_out


@dataclass(frozen=True)
class _Rendered:
    demonstration: RenderedDemonstration
    images: dict[str, bytes]
    """Screenshots as the policy sees them, by hash."""


class _Renderer:
    """Renders demonstrations, and counts what the run cannot imitate."""

    def __init__(self, config: RunConfig, left_out: LeftOut) -> None:
        self._config = config
        self._agent = Agent(config.agent)
        self._left_out = left_out

    def render(self, folder: Path) -> _Rendered | None:
        """Return a demonstration with conversations, or None if it cannot be imitated."""
        try:
            demonstration = read_demonstration(folder)
            reward = demonstration.reward
            if reward is None or not is_success(reward, self._config.replay.success_threshold):
                self._left_out.add("demonstration", "its reward is not above the success threshold", str(folder))
                return None
            return self._render(folder, demonstration)
        except UserError as error:
            self._left_out.add("demonstration", "it is damaged", error.message)
            return None

    def _render(self, folder: Path, demonstration: Demonstration) -> _Rendered | None:
        conversation = self._agent.start_conversation(demonstration.instruction)
        probe = self._agent.start_conversation(demonstration.instruction)
        probe.observe(Image.new("RGB", demonstration.screen_size))
        steps: list[Step] = []
        images: dict[str, bytes] = {}
        for number, recorded in enumerate(demonstration.steps):
            problem = self._problem(probe, recorded, len(steps))
            if problem:
                self._left_out.add("step", problem, f"{folder.name} step {number} ({recorded.action.kind})")
                continue
            with open_screenshot(read_screenshot(folder, demonstration, recorded.screenshot)) as screenshot:
                image = conversation.observe(screenshot)
            images[image.hash] = image.data
            steps.append(_respond(conversation, recorded, image.hash, len(steps)))
        if not steps:
            self._left_out.add("demonstration", "none of its steps can be imitated", str(folder))
            return None
        return _Rendered(RenderedDemonstration(demonstration.task_id, tuple(steps)), images)

    def _problem(self, probe: Conversation, recorded: DemonstrationStep, num_steps: int) -> str:
        """Return why a step cannot be imitated; empty if it can.

        Args:
            probe: conversation with a screenshot of the same size, which has no effect on the prompts.
            recorded: the step.
            num_steps: number of steps before it that can be imitated.
        """
        if num_steps >= self._config.tasks.max_steps:
            return "the episode has more steps than tasks.max_steps"
        response = PolicyResponse(recorded.thought, recorded.action)
        try:
            parsed = probe.parse(probe.render(response)).action
        except ValueError:  # FormatError is one too
            parsed = None
        if parsed is None or not _has_same_effect(parsed, recorded.action):
            return "the action language of the run cannot express it"
        return ""


def _has_same_effect(parsed: Action, recorded: Action) -> bool:
    """Return whether two actions are the same but for roundings of points, durations and distances of scrolling."""

    def essence(action: Action) -> tuple[Any, ...]:
        directions = [(distance > 0) - (distance < 0) for distance in (action.scroll_x, action.scroll_y)]
        return action.kind, action.keys, action.text, action.repeat, *directions

    return essence(parsed) == essence(recorded)


def _respond(conversation: Conversation, recorded: DemonstrationStep, screenshot: str, index: int) -> Step:
    """Add the response of a step to the conversation after its screenshot, and return the step."""
    text = conversation.render(PolicyResponse(recorded.thought, recorded.action))
    conversation.respond(text)
    prompt = conversation.prompt()
    return Step(
        index=index,
        screenshot=screenshot,
        images=prompt.images,
        text=text,
        messages=tuple(message.SerializeToString() for message in prompt.messages),
        action=recorded.action.to_record(),
    )
