"""Whose doing an episode's end is: results and faults.

The desktop here is a double that dies, hangs and refuses on command, at moments that a real one cannot be made to hit.
Prompt, grammar, setup and evaluators are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.conversation import Conversation, UiTarsAgent
from deskrl.actor.agent.players import Decision, Player, ScriptedPlayer
from deskrl.actor.agent.policy_client import InferenceFailed
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopError, DesktopGone
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.tasks.files import parse_task
from deskrl.core.config import AgentConfig, DesktopConfig
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import common_pb2, inference_pb2, rollout_pb2

CLICK = "Thought: It is there.\nAction: click(start_box='(60,60)')"
FINISHED = "Thought: It is done.\nAction: finished()"
GIVE_UP = "Thought: It cannot be done.\nAction: call_user()"
NONSENSE = "Action: frobnicate(start_box='(1,1)')"


def hangs() -> None:
    """An operation that does not come back; the double knows it by its name."""


@dataclass
class DoubleDesktop(Desktop):
    """A desktop whose operations do what a test says: by default they succeed, and the task is solved by one action."""

    on_setup: Callable[[], Any] | None = None
    on_settle: Callable[[], Any] | None = None
    on_act: Callable[[], Any] | None = None
    on_evaluate: Callable[[], Any] | None = None
    alive: bool = True
    runs_commands: bool = True
    acted: list[Action] = field(default_factory=list)
    rests_s: list[float] = field(default_factory=list)

    async def start(self) -> None: ...
    async def reset(self) -> None: ...
    async def close(self) -> None: ...

    async def is_alive(self) -> bool:
        return self.alive

    async def screenshot(self) -> Image.Image:
        return Image.new("RGB", (280, 280), (len(self.acted), 0, 0))

    async def settle(self, rest_s: float = 0.0) -> Image.Image:
        self.rests_s.append(rest_s)
        await self._do(self.on_settle)
        return await self.screenshot()

    async def act(self, action: Action) -> None:
        self.acted.append(action)
        await self._do(self.on_act)

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        if command == ["true"]:
            return CommandResult(0 if self.runs_commands else 127, "", "")
        await self._do(self.on_setup if command == "setup" else self.on_evaluate)
        return CommandResult(0, "solved" if self.acted else "untouched", "")

    async def _do(self, what: Callable[[], Any] | None) -> None:
        if what is hangs:
            await asyncio.Event().wait()
        elif what is not None:
            what()

    def die(self) -> None:
        """Be dead from now on, noticed by the operation that is under way."""
        self.alive = False
        raise DesktopGone("its processes are gone")

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None: ...
    async def write_file(self, path: str, data: bytes) -> None: ...
    async def open_path(self, path: str) -> None: ...
    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None: ...
    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None: ...
    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None: ...

    async def read_file(self, path: str) -> bytes:
        raise FileNotFoundError(path)


class Says(Player):
    """A policy that says these texts; a callable among them happens while the model is waited for."""

    def __init__(self, *words: str | Callable[[], Any]) -> None:
        self._words = list(words)

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        word = self._words.pop(0)
        while not isinstance(word, str):
            word()
            word = self._words.pop(0)
        images = conversation.prompt().images
        conversation.respond(word)
        return Decision(Step(index=index, screenshot=screenshot.hash, images=images, text=word), {"act": 1.0})


class Sink:
    """Keeps what replay would be sent."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.images: list[str] = []

    def add_image(self, image: common_pb2.Image) -> None:
        self.images.append(image.hash)

    def add_step(self, step: Step) -> None:
        self.steps.append(step)


TASK = {
    "id": "touch-it",
    "instruction": "Touch it.",
    "config": [{"type": "execute", "parameters": {"command": "setup"}}],
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": "evaluate"},
        "expected": {"type": "rule", "rules": {"expected": "solved"}},
    },
    "deskrl": {
        "solution": [
            {"thought": "It is there.", "action": {"kind": "click", "x": 60, "y": 60}},
            {"thought": "It is done.", "action": {"kind": "finished"}},
        ]
    },
}


def play(
    desktop: DoubleDesktop,
    player: Player,
    *,
    sink: Sink | None = None,
    acting: rollout_pb2.ActingPolicy = rollout_pb2.ACTING_POLICY_SAMPLED,
    blame_s: float = 60.0,
    max_steps: int = 4,
    evaluate_format_errors: bool = False,
) -> rollout_pb2.EpisodeResult:
    """Play one episode with deadlines that are over soon."""
    data = json.dumps(TASK).encode()
    rollout = rollout_pb2.Rollout(episode_id="e", task_json=data, seed=1, max_steps=max_steps, acting_policy=acting)
    config = DesktopConfig(setup_timeout_s=0.05, step_timeout_s=0.05, evaluate_timeout_s=0.05)
    conversation = UiTarsAgent(AgentConfig()).begin("Touch it.")
    task = parse_task(data, "task")

    async def scenario() -> rollout_pb2.EpisodeResult:
        episode = Episode(
            desktop,
            task,
            rollout,
            conversation,
            player,
            sink or Sink(),
            config,
            lambda state: None,
            blame_s,
            evaluate_format_errors=evaluate_format_errors,
        )
        return await episode.play(reset_ms=7.0)

    return asyncio.run(scenario())


def fault_of(desktop: DoubleDesktop, player: Player, **how: Any) -> rollout_pb2.FaultKind:
    """The kind of fault in which an episode ends."""
    with pytest.raises(Fault) as caught:
        play(desktop, player, **how)
    return caught.value.kind


def raises(error: Exception) -> Callable[[], Any]:
    """An operation that fails."""

    def fail() -> None:
        raise error

    return fail


def test_finished_is_judged_by_the_evaluator() -> None:
    result = play(DoubleDesktop(), Says(CLICK, FINISHED))
    assert (result.reward, result.termination, result.num_steps) == (1.0, rollout_pb2.TERMINATION_FINISHED, 2)
    assert result.format_ok and "solved" in result.evidence_json
    untouched = play(DoubleDesktop(), Says(FINISHED))
    assert (untouched.reward, untouched.termination) == (0.0, rollout_pb2.TERMINATION_FINISHED)


def test_at_the_step_limit_the_end_state_is_judged() -> None:
    result = play(DoubleDesktop(), Says(CLICK, CLICK), max_steps=2)
    assert (result.reward, result.termination, result.num_steps) == (1.0, rollout_pb2.TERMINATION_STEP_LIMIT, 2)


def test_what_cannot_be_parsed_ends_the_episode_unrewarded_whatever_the_desktop_looks_like() -> None:
    sink = Sink()
    result = play(DoubleDesktop(), Says(CLICK, NONSENSE), sink=sink)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert not result.format_ok and "frobnicate" in result.evidence_json
    assert [step.action.get("kind") for step in sink.steps] == ["click", None]


def test_what_cannot_be_parsed_can_be_judged_by_the_state_that_was_reached() -> None:
    result = play(DoubleDesktop(), Says(CLICK, NONSENSE), evaluate_format_errors=True)
    assert (result.reward, result.termination) == (1.0, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert not result.format_ok and "frobnicate" in result.evidence_json and "solved" in result.evidence_json
    assert play(DoubleDesktop(), Says(NONSENSE), evaluate_format_errors=True).reward == 0.0


def test_giving_up_a_feasible_task_is_unrewarded() -> None:
    result = play(DoubleDesktop(), Says(CLICK, GIVE_UP))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_INFEASIBLE)
    assert result.format_ok


def test_steps_carry_what_was_seen_done_and_how_long_it_took() -> None:
    sink = Sink()
    result = play(DoubleDesktop(), Says(CLICK, FINISHED), sink=sink)
    first, last = sink.steps
    assert first.action == {"kind": "click", "x": 60, "y": 60} and last.action == {"kind": "finished"}
    assert first.screenshot == sink.images[0] and last.images == tuple(sink.images)
    assert result.final_image_hash == sink.images[-1]
    assert first.timings_ms.keys() == {"reset", "setup", "act", "input", "settle"}
    assert first.timings_ms["reset"] == 7.0 and last.timings_ms.keys() == {"act"}


def test_a_desktop_that_dies_under_an_action_is_the_policys_failure() -> None:
    desktop = DoubleDesktop()
    desktop.on_act = desktop.die
    sink = Sink()
    result = play(desktop, Says(CLICK), sink=sink)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)
    assert result.num_steps == len(sink.steps) == 1 and result.format_ok


@pytest.mark.parametrize("operation", ["on_act", "on_settle"])
def test_a_desktop_that_hangs_after_an_action_is_the_policys_failure(operation: str) -> None:
    desktop = DoubleDesktop()
    result = play(desktop, Says(lambda: setattr(desktop, operation, hangs), CLICK))
    assert result.termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED


def test_a_desktop_that_dies_before_any_action_is_a_fault() -> None:
    desktop = DoubleDesktop()
    player = Says(lambda: setattr(desktop, "alive", False), CLICK)
    assert fault_of(desktop, player) == rollout_pb2.FAULT_KIND_DESKTOP_LOST
    assert desktop.acted == []


def test_a_desktop_that_dies_shortly_after_an_action_is_the_policys_failure() -> None:
    desktop = DoubleDesktop()
    result = play(desktop, Says(CLICK, lambda: setattr(desktop, "alive", False), CLICK))
    assert (result.termination, result.num_steps) == (rollout_pb2.TERMINATION_DESKTOP_DESTROYED, 1)


def test_a_desktop_that_dies_long_after_an_action_is_a_fault() -> None:
    desktop = DoubleDesktop()
    player = Says(CLICK, lambda: setattr(desktop, "alive", False), CLICK)
    assert fault_of(desktop, player, blame_s=0.0) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_an_action_that_a_living_desktop_fails_to_do_is_a_fault() -> None:
    desktop = DoubleDesktop(on_act=raises(DesktopError("nonsense from the guest")))
    assert fault_of(desktop, Says(CLICK)) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


@pytest.mark.parametrize("setup", [raises(DesktopError("refused")), raises(ValueError("our mistake")), hangs])
def test_a_setup_that_fails_is_a_fault(setup: Callable[[], Any]) -> None:
    assert fault_of(DoubleDesktop(on_setup=setup), Says()) == rollout_pb2.FAULT_KIND_TASK_SETUP


def test_a_desktop_that_dies_in_setup_is_lost() -> None:
    desktop = DoubleDesktop()
    desktop.on_setup = desktop.die
    assert fault_of(desktop, Says()) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_a_desktop_without_a_first_screenshot_is_hung() -> None:
    assert fault_of(DoubleDesktop(on_settle=hangs), Says()) == rollout_pb2.FAULT_KIND_DESKTOP_HUNG


@pytest.mark.parametrize("evaluator", [raises(RuntimeError("no such metric")), hangs])
def test_an_evaluator_that_fails_is_a_fault_and_no_reward(evaluator: Callable[[], Any]) -> None:
    desktop = DoubleDesktop(on_evaluate=evaluator)
    assert fault_of(desktop, Says(CLICK, FINISHED)) == rollout_pb2.FAULT_KIND_EVALUATOR


def test_a_desktop_that_dies_under_evaluation_right_after_an_action_is_the_policys_failure() -> None:
    desktop = DoubleDesktop()
    desktop.on_evaluate = desktop.die
    result = play(desktop, Says(CLICK, FINISHED))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)


def test_a_desktop_that_answers_but_can_run_nothing_was_destroyed() -> None:
    no_shell = raises(DesktopError("no such file: bash"))
    desktop = DoubleDesktop(on_evaluate=no_shell, runs_commands=False)
    assert play(desktop, Says(CLICK, FINISHED)).termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED
    untouched = DoubleDesktop(on_evaluate=no_shell, runs_commands=False)
    assert fault_of(untouched, Says(FINISHED)) == rollout_pb2.FAULT_KIND_EVALUATOR


def test_an_unreachable_policy_is_a_fault() -> None:
    player = Says(CLICK, raises(InferenceFailed("no action within 60 s")))
    assert fault_of(DoubleDesktop(), player) == rollout_pb2.FAULT_KIND_INFERENCE


def scripted(**changes: Any) -> ScriptedPlayer:
    return ScriptedPlayer(parse_task(json.dumps({**TASK, **changes}).encode(), "task"))


def test_a_scripted_episode_carries_the_conversation_that_is_to_be_imitated() -> None:
    sink = Sink()
    result = play(DoubleDesktop(), scripted(), sink=sink, acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert result.reward == 1.0
    for step in sink.steps:
        messages = [inference_pb2.ChatMessage.FromString(data) for data in step.messages]
        assert messages[-1].role == inference_pb2.MESSAGE_ROLE_ASSISTANT
        assert messages[-1].contents[0].text == step.text
        shown = [content.image_hash for message in messages for content in message.contents if content.image_hash]
        assert tuple(shown) == step.images and shown[-1] == step.screenshot
        assert step.action_ids == ()


def test_screens_rest_before_a_script_acts_on_them_as_they_need_not_for_a_policy() -> None:
    before_script, before_policy = DoubleDesktop(), DoubleDesktop()
    play(before_script, scripted(), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    play(before_policy, Says(CLICK, FINISHED))
    assert before_script.rests_s == [ScriptedPlayer.rest_s] * 2 and ScriptedPlayer.rest_s > 0
    assert before_policy.rests_s == [0.0] * 2


def test_a_scripted_episode_that_is_not_rewarded_is_a_fault_and_no_demonstration() -> None:
    script = {"solution": [{"thought": "It is done.", "action": {"kind": "finished"}}]}
    kind = fault_of(DoubleDesktop(), scripted(deskrl=script), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP


def test_a_script_without_an_end_is_a_fault() -> None:
    script = {"solution": [{"thought": "It is there.", "action": {"kind": "click", "x": 60, "y": 60}}]}
    kind = fault_of(DoubleDesktop(), scripted(deskrl=script), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP
