"""Results and faults: how the problems of an episode are recognised and attributed (table: test_actor_end_causes.py).

The desktop is a double that dies, hangs or fails at moments that cannot be hit with a real one. Prompt, action parser,
setup and evaluators are the real ones.
"""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.policies import ActorPolicy, Decision, ScriptedPolicy
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopError, DesktopGone
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.rewards.episode_reward import EpisodeReward
from deskrl.actor.rewards.reward_interface import EndedEpisode
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import AgentConfig, DesktopConfig, RewardConfig
from deskrl.core.errors import UserError
from deskrl.core.reward_evidence import reward_terms
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, inference_pb2, rollout_pb2

CLICK = "Thought: It is there.\nAction: click(start_box='(60,60)')"
FINISHED = "Thought: It is done.\nAction: finished()"
GIVE_UP = "Thought: It cannot be done.\nAction: call_user()"
NONSENSE = "Action: frobnicate(start_box='(1,1)')"


def hangs() -> None:
    """Marker of an operation that never returns; the double recognises it by identity."""


@dataclass
class DoubleDesktop(Desktop):
    """Desktop with configurable operations. By default they succeed, and one action solves the task."""

    on_setup: Callable[[], Any] | None = None
    on_settle: Callable[[], Any] | None = None
    on_act: Callable[[], Any] | None = None
    on_evaluate: Callable[[], Any] | None = None
    alive: bool = True
    observable: bool = True
    cause: str | None = None
    acted: list[Action] = field(default_factory=list)
    min_quiets_s: list[float] = field(default_factory=list)

    async def start(self) -> None: ...
    async def reset(self) -> None: ...
    async def close(self) -> None: ...

    async def is_alive(self) -> bool:
        return self.alive

    @property
    def can_observe_host(self) -> bool:
        return self.observable

    async def death_cause(self) -> str | None:
        return self.cause

    async def screenshot(self) -> Image.Image:
        return Image.new("RGB", (280, 280), (len(self.acted), 0, 0))

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        self.min_quiets_s.append(min_quiet_s)
        await self._do(self.on_settle)
        return await self.screenshot()

    async def act(self, action: Action) -> None:
        self.acted.append(action)
        await self._do(self.on_act)

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        await self._do(self.on_setup if command == "setup" else self.on_evaluate)
        return CommandResult(0, "solved" if self.acted else "untouched", "")

    async def _do(self, what: Callable[[], Any] | None) -> None:
        if what is hangs:
            await asyncio.Event().wait()
        elif what is not None:
            what()

    def die(self) -> None:
        """Die, and let the operation in progress fail."""
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


class PolicyDouble(ActorPolicy):
    """Policy that responds with these texts; a callable among them is called while the model is sampling."""

    def __init__(self, *responses: str | Callable[[], Any]) -> None:
        self._responses = list(responses)

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        response = self._responses.pop(0)
        while not isinstance(response, str):
            response()
            response = self._responses.pop(0)
        images = conversation.prompt().images
        conversation.respond(response)
        return Decision(Step(index=index, screenshot=screenshot.hash, images=images, text=response), {"act": 1.0})


class SinkDouble:
    """Records the steps and screenshots that would be sent to the replay service."""

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


def run_episode(
    desktop: DoubleDesktop,
    policy: ActorPolicy,
    *,
    sink: SinkDouble | None = None,
    acting: rollout_pb2.ActingPolicy = rollout_pb2.ACTING_POLICY_SAMPLED,
    max_steps: int = 4,
    evaluate_format_errors: bool = False,
    reward: RewardConfig | None = None,
) -> rollout_pb2.EpisodeResult:
    """Run one episode with short timeouts."""
    data = json.dumps(TASK).encode()
    rollout = rollout_pb2.Rollout(episode_id="e", task_json=data, seed=1, max_steps=max_steps, acting_policy=acting)
    config = DesktopConfig(setup_timeout_s=0.05, step_timeout_s=0.05, evaluate_timeout_s=0.05)
    task = parse_task(data, "task")

    async def scenario() -> rollout_pb2.EpisodeResult:
        episode = Episode(
            desktop,
            task,
            rollout,
            Agent(AgentConfig()).start_conversation,
            policy,
            sink or SinkDouble(),
            config,
            lambda state: None,
            evaluate_format_errors=evaluate_format_errors,
            reward=EpisodeReward(reward or RewardConfig(), config.evaluate_timeout_s, success_threshold=0.1),
        )
        return await episode.run(reset_ms=7.0)

    return asyncio.run(scenario())


def fault_kind_of(desktop: DoubleDesktop, policy: ActorPolicy, **options: Any) -> rollout_pb2.FaultKind:
    """Return the kind of fault in which an episode ends."""
    with pytest.raises(Fault) as caught:
        run_episode(desktop, policy, **options)
    return caught.value.kind


def raises(error: Exception) -> Callable[[], Any]:
    """Return an operation that fails with an error."""

    def fail() -> None:
        raise error

    return fail


def test_after_finished_the_evaluator_decides_the_reward() -> None:
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, FINISHED))
    assert (result.reward, result.termination, result.num_steps) == (1.0, rollout_pb2.TERMINATION_FINISHED, 2)
    assert result.format_ok and "solved" in result.evidence_json
    untouched = run_episode(DoubleDesktop(), PolicyDouble(FINISHED))
    assert (untouched.reward, untouched.termination) == (0.0, rollout_pb2.TERMINATION_FINISHED)


def test_at_the_step_limit_the_end_state_is_evaluated() -> None:
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, CLICK), max_steps=2)
    assert (result.reward, result.termination, result.num_steps) == (1.0, rollout_pb2.TERMINATION_STEP_LIMIT, 2)


def test_an_action_that_cannot_be_parsed_gets_reward_0_even_if_the_task_is_solved() -> None:
    sink = SinkDouble()
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, NONSENSE), sink=sink)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert not result.format_ok and "frobnicate" in result.evidence_json
    assert [step.action.get("kind") for step in sink.steps] == ["click", None]


def test_the_end_state_after_a_format_error_is_evaluated_if_configured() -> None:
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, NONSENSE), evaluate_format_errors=True)
    assert (result.reward, result.termination) == (1.0, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert not result.format_ok and "frobnicate" in result.evidence_json and "solved" in result.evidence_json
    assert run_episode(DoubleDesktop(), PolicyDouble(NONSENSE), evaluate_format_errors=True).reward == 0.0


def test_declaring_a_feasible_task_infeasible_gets_reward_0() -> None:
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, GIVE_UP))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_INFEASIBLE)
    assert result.format_ok


def test_a_step_contains_its_screenshots_action_and_durations() -> None:
    sink = SinkDouble()
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, FINISHED), sink=sink)
    first, last = sink.steps
    assert first.action == {"kind": "click", "x": 60, "y": 60} and last.action == {"kind": "finished"}
    assert first.screenshot == sink.images[0] and last.images == tuple(sink.images)
    assert result.final_image_hash == sink.images[-1]
    assert first.timings_ms.keys() == {"reset", "setup", "act", "input", "settle"}
    assert first.timings_ms["reset"] == 7.0 and last.timings_ms.keys() == {"act"}


def test_a_policy_can_decide_on_a_newer_screenshot_which_rewards_then_see(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = Image.new("RGB", (280, 280), "green")

    class LateDouble(PolicyDouble):
        async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
            image = conversation.observe(newer)
            return replace(await super().decide(conversation, image, index), screenshot=image)

    def sees_newer(episode: EndedEpisode) -> float:
        return float([picture.tobytes() for picture in episode.screenshots] == [newer.tobytes()] * 2)

    sink = SinkDouble()
    reward = reward_of(monkeypatch, sees_newer)
    outcome = run_episode(DoubleDesktop(), LateDouble(CLICK, FINISHED), sink=sink, reward=reward)
    assert outcome.reward == 1.0
    assert {step.screenshot for step in sink.steps} == {outcome.final_image_hash} <= set(sink.images)


def test_a_desktop_that_dies_while_the_policy_looks_at_it_after_an_action_is_a_failure_of_the_policy() -> None:
    desktop = DoubleDesktop()
    outcome = run_episode(desktop, PolicyDouble(CLICK, desktop.die))
    assert outcome.termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED


def test_a_desktop_that_dies_during_an_action_is_a_failure_of_the_policy() -> None:
    desktop = DoubleDesktop()
    desktop.on_act = desktop.die
    sink = SinkDouble()
    result = run_episode(desktop, PolicyDouble(CLICK), sink=sink)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)
    assert result.num_steps == len(sink.steps) == 1 and result.format_ok


@pytest.mark.parametrize("operation", ["on_act", "on_settle"])
def test_a_desktop_that_hangs_after_an_action_is_a_failure_of_the_policy(operation: str) -> None:
    desktop = DoubleDesktop()
    result = run_episode(desktop, PolicyDouble(lambda: setattr(desktop, operation, hangs), CLICK))
    assert result.termination == rollout_pb2.TERMINATION_DESKTOP_DESTROYED


def test_a_desktop_that_dies_before_any_action_is_a_fault() -> None:
    desktop = DoubleDesktop()
    policy = PolicyDouble(lambda: setattr(desktop, "alive", False), CLICK)
    assert fault_kind_of(desktop, policy) == rollout_pb2.FAULT_KIND_DESKTOP_LOST
    assert desktop.acted == []


def dies_while_the_model_thinks(desktop: DoubleDesktop) -> PolicyDouble:
    """Return a policy after whose first action the desktop dies."""
    return PolicyDouble(CLICK, lambda: setattr(desktop, "alive", False), CLICK)


def test_a_desktop_that_dies_while_the_model_thinks_after_an_action_is_a_failure_of_the_policy() -> None:
    desktop = DoubleDesktop()
    result = run_episode(desktop, dies_while_the_model_thinks(desktop))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)
    assert result.num_steps == 1 and "while the policy was sampling" in result.evidence_json


def test_a_desktop_that_was_ended_from_outside_after_an_action_is_a_fault() -> None:
    desktop = DoubleDesktop(cause="the desktop was ended from outside by SIGKILL")
    with pytest.raises(Fault, match="ended from outside by SIGKILL") as caught:
        run_episode(desktop, dies_while_the_model_thinks(desktop))
    assert caught.value.kind == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_evidence_of_the_host_that_appears_after_the_loss_is_waited_for() -> None:
    desktop = DoubleDesktop()
    asked: list[str] = []

    async def death_cause() -> str | None:
        asked.append("")
        return "the machine ran out of memory" if len(asked) > 2 else None

    desktop.death_cause = death_cause  # type: ignore[method-assign]
    assert fault_kind_of(desktop, dies_while_the_model_thinks(desktop)) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_a_connection_that_is_lost_after_an_action_is_a_fault_of_its_own_if_the_host_cannot_observe_the_guest() -> None:
    desktop = DoubleDesktop(observable=False)
    kind = fault_kind_of(desktop, dies_while_the_model_thinks(desktop))
    assert kind == rollout_pb2.FAULT_KIND_CONNECTION_LOST
    untouched = DoubleDesktop(observable=False)
    policy = PolicyDouble(lambda: setattr(untouched, "alive", False), CLICK)
    assert fault_kind_of(untouched, policy) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_input_that_does_not_work_on_a_guest_of_the_user_is_a_fault_of_the_setup() -> None:
    broken = DoubleDesktop(observable=False, on_act=raises(DesktopError("No module named Xlib")))
    assert fault_kind_of(broken, PolicyDouble(CLICK)) == rollout_pb2.FAULT_KIND_TASK_SETUP


@pytest.mark.parametrize("error", [DesktopError("invalid answer of the guest"), ValueError("a defect")])
def test_an_action_that_fails_on_a_living_desktop_is_a_failure_of_the_policy(error: Exception) -> None:
    result = run_episode(DoubleDesktop(on_act=raises(error)), PolicyDouble(CLICK))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)


def test_an_action_that_fails_because_this_machine_lacks_resources_is_a_fault() -> None:
    desktop = DoubleDesktop(on_act=raises(OSError(errno.EMFILE, "too many open files")))
    assert fault_kind_of(desktop, PolicyDouble(CLICK)) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


@pytest.mark.parametrize("setup", [raises(DesktopError("refused")), raises(ValueError("a defect")), hangs])
def test_a_setup_that_fails_is_a_fault(setup: Callable[[], Any]) -> None:
    assert fault_kind_of(DoubleDesktop(on_setup=setup), PolicyDouble()) == rollout_pb2.FAULT_KIND_TASK_SETUP


def test_a_desktop_that_dies_during_setup_is_the_fault_desktop_lost() -> None:
    desktop = DoubleDesktop()
    desktop.on_setup = desktop.die
    assert fault_kind_of(desktop, PolicyDouble()) == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_a_desktop_without_a_first_screenshot_is_the_fault_desktop_hung() -> None:
    assert fault_kind_of(DoubleDesktop(on_settle=hangs), PolicyDouble()) == rollout_pb2.FAULT_KIND_DESKTOP_HUNG


@pytest.mark.parametrize(
    "evaluator", [raises(EvaluatorError("no such metric")), raises(UserError("no evaluators", "install them"))]
)
def test_a_defective_evaluator_is_a_fault_whatever_the_policy_did(evaluator: Callable[[], Any]) -> None:
    for policy in (PolicyDouble(CLICK, FINISHED), PolicyDouble(FINISHED)):
        assert fault_kind_of(DoubleDesktop(on_evaluate=evaluator), policy) == rollout_pb2.FAULT_KIND_EVALUATOR


@pytest.mark.parametrize(
    "evaluator",
    [
        raises(UnreadableStateError("the command does not finish")),
        raises(DesktopError("no such file: bash")),
        raises(RuntimeError("a decoder failed")),
        hangs,
    ],
)
def test_a_state_that_cannot_be_evaluated_is_a_failure_after_an_action_and_a_fault_before(
    evaluator: Callable[[], Any],
) -> None:
    result = run_episode(DoubleDesktop(on_evaluate=evaluator), PolicyDouble(CLICK, FINISHED))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_STATE_UNREADABLE)
    assert "unreadable" in result.evidence_json and result.format_ok
    untouched = fault_kind_of(DoubleDesktop(on_evaluate=evaluator), PolicyDouble(FINISHED))
    assert untouched == rollout_pb2.FAULT_KIND_EVALUATOR


def test_a_state_that_cannot_be_evaluated_after_a_format_error_remains_a_format_error() -> None:
    desktop = DoubleDesktop(on_evaluate=hangs)
    result = run_episode(desktop, PolicyDouble(CLICK, NONSENSE), evaluate_format_errors=True)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert not result.format_ok


@pytest.mark.parametrize("policy", [PolicyDouble(CLICK, FINISHED), PolicyDouble(CLICK, *["Action: wait()"] * 3)])
def test_a_desktop_that_dies_during_evaluation_after_an_action_is_a_failure_of_the_policy(policy: PolicyDouble) -> None:
    desktop = DoubleDesktop()
    desktop.on_evaluate = desktop.die
    result = run_episode(desktop, policy)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)


def test_unavailable_inference_is_a_fault() -> None:
    policy = PolicyDouble(CLICK, raises(InferenceError("no action within 60 s")))
    assert fault_kind_of(DoubleDesktop(), policy) == rollout_pb2.FAULT_KIND_INFERENCE


def scripted(**changes: Any) -> ScriptedPolicy:
    return ScriptedPolicy(parse_task(json.dumps({**TASK, **changes}).encode(), "task"))


def test_a_scripted_episode_contains_the_conversation_to_imitate() -> None:
    sink = SinkDouble()
    result = run_episode(DoubleDesktop(), scripted(), sink=sink, acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert result.reward == 1.0
    for step in sink.steps:
        messages = [inference_pb2.ChatMessage.FromString(data) for data in step.messages]
        assert messages[-1].role == inference_pb2.MESSAGE_ROLE_ASSISTANT
        assert messages[-1].contents[0].text == step.text
        hashes = [content.image_hash for message in messages for content in message.contents if content.image_hash]
        assert tuple(hashes) == step.images and hashes[-1] == step.screenshot
        assert step.action_ids == ()


def test_screens_must_be_quiet_for_longer_before_a_script_acts_than_before_a_policy_does() -> None:
    before_script, before_policy = DoubleDesktop(), DoubleDesktop()
    run_episode(before_script, scripted(), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    run_episode(before_policy, PolicyDouble(CLICK, FINISHED))
    assert before_script.min_quiets_s == [ScriptedPolicy.min_quiet_s] * 2 and ScriptedPolicy.min_quiet_s > 0
    assert before_policy.min_quiets_s == [0.0] * 2


def test_a_scripted_episode_without_full_reward_is_a_fault() -> None:
    script = {"solution": [{"thought": "It is done.", "action": {"kind": "finished"}}]}
    kind = fault_kind_of(DoubleDesktop(), scripted(deskrl=script), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP


def test_a_scripted_episode_that_breaks_its_desktop_is_a_fault() -> None:
    desktop = DoubleDesktop()
    desktop.on_act = desktop.die
    kind = fault_kind_of(desktop, scripted(), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP


def test_a_script_that_ends_before_the_episode_is_a_fault() -> None:
    script = {"solution": [{"thought": "It is there.", "action": {"kind": "click", "x": 60, "y": 60}}]}
    kind = fault_kind_of(DoubleDesktop(), scripted(deskrl=script), acting=rollout_pb2.ACTING_POLICY_SCRIPTED)
    assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP


async def half(episode: EndedEpisode) -> float:
    return 0.5


async def defective(episode: EndedEpisode) -> float:
    raise ValueError("a defect of the reward")


async def hanging(episode: EndedEpisode) -> float:
    await asyncio.Event().wait()
    return 1.0


async def reads_notes(episode: EndedEpisode) -> float:
    return float(len((await episode.desktop.execute("evaluate")).stdout) > 100)


async def counts_actions(episode: EndedEpisode) -> float:
    assert len(episode.screenshots) == len(episode.actions) == 2 and episode.final_action is not None
    return 1 / len(episode.actions)


def reward_of(monkeypatch: pytest.MonkeyPatch, *rewards: Callable[..., Any], **task: Any) -> RewardConfig:
    """Return the task's own evaluator and these rewards, as terms of equal weight unless `task` says otherwise."""
    module = sys.modules.get("rewards_of_this_test") or ModuleType("rewards_of_this_test")
    for reward in rewards:
        setattr(module, reward.__name__, reward)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    terms = {reward.__name__: {"kind": f"{module.__name__}:{reward.__name__}"} for reward in rewards}
    return RewardConfig.model_validate({"terms": {"task": task, **terms}})


def test_a_partial_reward_is_the_weighted_mean_of_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_of(monkeypatch, counts_actions, weight=3)
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, FINISHED), reward=reward)
    assert (result.reward, result.termination) == (0.875, rollout_pb2.TERMINATION_FINISHED)
    assert reward_terms(result.evidence_json) == {"task": 1.0, "counts_actions": 0.5}


def test_terms_after_a_format_error_are_in_the_evidence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_of(monkeypatch, half)
    result = run_episode(DoubleDesktop(), PolicyDouble(CLICK, NONSENSE), reward=reward, evaluate_format_errors=True)
    assert (result.reward, result.termination) == (0.75, rollout_pb2.TERMINATION_FORMAT_ERROR)
    assert reward_terms(result.evidence_json) == {"task": 1.0, "half": 0.5}


@pytest.mark.parametrize("reward", [defective, hanging])
def test_a_reward_that_raises_or_takes_too_long_is_a_fault_whatever_the_policy_did(
    reward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for policy in (PolicyDouble(CLICK, FINISHED), PolicyDouble(FINISHED)):
        with pytest.raises(Fault, match=f"evaluation: EvaluatorError: reward {reward.__name__}: ") as caught:
            run_episode(DoubleDesktop(), policy, reward=reward_of(monkeypatch, reward))
        assert caught.value.kind == rollout_pb2.FAULT_KIND_EVALUATOR


def notes_only(monkeypatch: pytest.MonkeyPatch) -> RewardConfig:
    terms = reward_of(monkeypatch, reads_notes).terms
    return RewardConfig(terms={"reads_notes": terms["reads_notes"]})


def test_a_state_that_a_reward_cannot_read_is_a_failure_after_an_action_and_a_fault_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for problem in (raises(DesktopError("no answer")), hangs):
        desktop = DoubleDesktop(on_evaluate=problem)
        result = run_episode(desktop, PolicyDouble(CLICK, FINISHED), reward=notes_only(monkeypatch))
        assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_STATE_UNREADABLE)
        kind = fault_kind_of(desktop, PolicyDouble(FINISHED), reward=notes_only(monkeypatch))
        assert kind == rollout_pb2.FAULT_KIND_EVALUATOR


def test_a_desktop_that_dies_during_a_reward_is_classified_as_during_an_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desktop = DoubleDesktop()
    desktop.on_evaluate = desktop.die
    result = run_episode(desktop, PolicyDouble(CLICK, FINISHED), reward=notes_only(monkeypatch))
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_DESKTOP_DESTROYED)
    killed = DoubleDesktop(cause="the desktop was ended from outside by SIGKILL")
    killed.on_evaluate = killed.die
    kind = fault_kind_of(killed, PolicyDouble(CLICK, FINISHED), reward=notes_only(monkeypatch))
    assert kind == rollout_pb2.FAULT_KIND_DESKTOP_LOST


def test_a_scripted_episode_is_a_demonstration_if_the_evaluator_gives_1_and_the_reward_is_a_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acting = rollout_pb2.ACTING_POLICY_SCRIPTED
    result = run_episode(DoubleDesktop(), scripted(), acting=acting, reward=reward_of(monkeypatch, half))
    assert result.reward == 0.75
    unsolved = scripted(deskrl={"solution": [{"thought": "Done.", "action": {"kind": "finished"}}]})
    low = reward_of(monkeypatch, reads_notes, weight=0.1)
    for policy, reward in ((unsolved, reward_of(monkeypatch, half)), (scripted(), low)):
        kind = fault_kind_of(DoubleDesktop(), policy, acting=acting, reward=reward)
        assert kind == rollout_pb2.FAULT_KIND_TASK_SETUP
