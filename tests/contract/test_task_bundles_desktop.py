"""Specification of task bundles on a real desktop: setup.sh, check.sh, reward.py, and whose failure a problem is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.episode import Episode, Fault
from deskrl.actor.rewards.episode_reward import make_task_reward
from deskrl.actor.rewards.reward_interface import ended_episode
from deskrl.actor.tasks.evaluators import Evaluation, EvaluatorError, UnreadableStateError
from deskrl.actor.tasks.setup_steps import SetupError, setup_task
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason="the packages of embedded desktops are missing")

CHECK = "grep -qx done ~/result\n"
NUMBER = '[check]\nreward = "number"\n'
REWARD = """
from deskrl.actor.rewards.reward_interface import Score

async def reward(episode):
    text = await episode.desktop.read_file("~/result")
    return Score(0.5 if text == b"half" else 1.0, {"num_screenshots": len(episode.screenshots)})
"""


class Stage:
    """Desktop with the event loop on which it runs, and the bundle that is tried on it."""

    def __init__(self, runner: asyncio.Runner, desktop: Desktop) -> None:
        self._runner = runner
        self.desktop = desktop
        self.folder = Path()

    def bundle(self, **files: str | None) -> None:
        """Write the bundle; `settings` are added to task.toml."""
        content = {"settings": "", "check.sh": CHECK} | {name.replace("_", "."): text for name, text in files.items()}
        settings = content.pop("settings")
        (self.folder / "files").mkdir(parents=True)
        (self.folder / "task.toml").write_text(f'instruction = "Write the result."\n{settings}')
        for name, text in content.items():
            if text is not None:
                (self.folder / name).write_text(text)

    def set_up(self) -> None:
        """Reset the desktop and set up the bundle's task."""
        (task,) = load_tasks(self.folder)
        self._runner.run(self.desktop.reset())
        self._runner.run(setup_task(self.desktop, task, 0))

    def run(self, command: str) -> str:
        return self._runner.run(self.desktop.execute(command, shell=True)).stdout

    def evaluate(self, final: ActionKind = ActionKind.FINISHED) -> Evaluation:
        (task,) = load_tasks(self.folder)
        reward = make_task_reward(RunConfig.model_validate({"tasks": {"suite": self.folder}}))

        async def scenario() -> Evaluation:
            return await reward.evaluate(self.desktop, ended_episode(self.desktop, task, [], [], Action(final), 0))

        return self._runner.run(scenario())

    def play(self, *actions: Action) -> rollout_pb2.EpisodeResult:
        """Run a whole episode on the desktop."""
        (task,) = load_tasks(self.folder)
        config = RunConfig.model_validate({"tasks": {"suite": self.folder}})
        rollout = rollout_pb2.Rollout(episode_id="e", task_json=task.data, max_steps=3)
        episode = Episode(
            self.desktop,
            task,
            rollout,
            Agent(config.agent).start_conversation,
            Actions(*actions),
            NoSink(),
            config.desktop,
            lambda state: None,
            reward=make_task_reward(config),
        )
        self._runner.run(self.desktop.reset())
        return self._runner.run(episode.run())


class Actions(ActorPolicy):
    """Policy with a fixed sequence of actions."""

    def __init__(self, *actions: Action) -> None:
        self._actions = list(actions)

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        text = conversation.render(PolicyResponse("", self._actions.pop(0)))
        images = conversation.prompt().images
        conversation.respond(text)
        return Decision(Step(index=index, screenshot=screenshot.hash, images=images, text=text), {})


class NoSink:
    """Discards screenshots and steps."""

    def add_image(self, image: common_pb2.Image) -> None: ...

    def add_step(self, step: Step) -> None: ...


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    desktop = EmbeddedDesktop(DesktopConfig(), "d", tmp_path_factory.mktemp("bundles"))
    with asyncio.Runner() as runner:
        yield Stage(runner, desktop)
        runner.run(desktop.close())


@pytest.fixture
def stage(shared: Stage, tmp_path: Path) -> Stage:
    shared.folder = tmp_path / "bundle"
    return shared


CLICK, FINISHED = Action(ActionKind.CLICK, x=640, y=360), Action(ActionKind.FINISHED)


def test_the_setup_runs_as_the_desktop_s_user_in_its_home_over_the_uploaded_files(stage: Stage) -> None:
    stage.bundle(setup_sh="{ pwd; whoami; cat notes.txt; echo ${SEED-unset}; } > ~/result\n")
    (stage.folder / "files/notes.txt").write_text("hello\n")
    stage.set_up()
    assert stage.run("cat ~/result").split() == ["/home/user", "user", "hello", "unset"]


def test_a_setup_that_fails_ends_with_its_last_words(stage: Stage) -> None:
    stage.bundle(setup_sh="echo no such font >&2; exit 3\n")
    with pytest.raises(SetupError, match=r"bundle: setup\.sh ended with the exit status 3: no such font"):
        stage.set_up()


def test_the_exit_status_of_the_check_is_the_reward(stage: Stage) -> None:
    stage.bundle()
    stage.set_up()
    assert stage.evaluate().reward == 0.0
    stage.set_up()
    stage.run("echo done > ~/result")
    assert stage.evaluate().reward == 1.0
    assert stage.evaluate(ActionKind.INFEASIBLE).reward == 0.0


def test_a_check_may_print_a_partial_reward_which_is_evidence(stage: Stage) -> None:
    stage.bundle(settings=NUMBER, check_sh="echo half; echo warning >&2; echo 0.5\n")
    stage.set_up()
    evaluation = stage.evaluate()
    assert evaluation.reward == 0.5
    result = {"status": 0, "last_line": "0.5", "stderr": "warning"}
    assert json.loads(evaluation.evidence_json)["checks"][0]["result"] == result


def test_the_check_runs_without_programs_and_modules_of_the_policy(stage: Stage) -> None:
    stage.bundle(check_sh='python3 -c "import json; print(json.dumps(1))" | grep -qx 1 && ! pgrep -x sleep\n')
    stage.set_up()
    fake = "mkdir -p ~/bin ~/.local/bin; printf '#!/bin/sh\\nexit 1\\n' | tee ~/bin/grep > ~/.local/bin/grep"
    stage.run(f"{fake}; chmod +x ~/bin/grep ~/.local/bin/grep; echo 'exit 1' > ~/.bashrc; echo 'raise' > ~/json.py")
    stage.run("setsid sleep 100 >/dev/null 2>&1 &")
    assert stage.evaluate().reward == 1.0


def test_a_check_with_a_session_sees_the_windows_of_the_setup(stage: Stage) -> None:
    launched = 'launch = [["xterm", "-T", "the list"]]\napplications = ["xterm"]\n'
    stage.bundle(
        settings=launched + "[check]\nsession = true\nwithin_s = 5\n", check_sh='wmctrl -l | grep -q "the list"\n'
    )
    stage.set_up()
    assert stage.evaluate().reward == 1.0


@pytest.mark.parametrize(
    ("settings", "check", "problem"),
    [
        ("", "no_such_program\n", "exit status 127 .*no_such_program: command not found"),
        ("", "/etc/passwd\n", "exit status 126 .*Permission denied"),
        ("", "kill -9 $$\n", "exit status 137"),
        ("[check]\ntimeout_s = 0.2\n", "sleep 60\n", "did not finish within 0.2 s"),
        (NUMBER, "echo nan\n", "the last line 'nan' is not a number"),
        (NUMBER, "echo 2\n", "the last line '2' is not a number"),
        (NUMBER, "true\n", "printed nothing, where a number"),
    ],
)
def test_a_check_without_a_reward_is_a_state_that_cannot_be_read(
    stage: Stage, settings: str, check: str, problem: str
) -> None:
    stage.bundle(settings=settings, check_sh=check)
    stage.set_up()
    with pytest.raises(UnreadableStateError, match=problem):
        stage.evaluate()


def test_a_broken_check_is_a_fault_on_an_untouched_desktop_and_the_policy_s_failure_after_its_first_action(
    stage: Stage,
) -> None:
    stage.bundle(check_sh="no_such_program\n")
    with pytest.raises(Fault, match="exit status 127") as caught:
        stage.play(FINISHED)
    assert caught.value.kind == rollout_pb2.FAULT_KIND_EVALUATOR
    result = stage.play(CLICK, FINISHED)
    assert (result.reward, result.termination) == (0.0, rollout_pb2.TERMINATION_STATE_UNREADABLE)


def test_a_reward_in_python_reads_files_and_screenshots(stage: Stage) -> None:
    stage.bundle(check_sh=None, reward_py=REWARD, setup_sh="printf half > ~/result\n")
    result = stage.play(CLICK, FINISHED)
    assert (result.reward, json.loads(result.evidence_json)) == (0.5, {"num_screenshots": 2})
    assert stage.play(Action(ActionKind.INFEASIBLE)).reward == 0.0


def test_a_defective_reward_in_python_is_a_fault_also_after_the_policy_s_first_action(stage: Stage) -> None:
    stage.bundle(check_sh=None, reward_py="def reward(episode):\n    raise ValueError('a defect')\n")
    with pytest.raises(Fault, match="ValueError: a defect") as caught:
        stage.play(CLICK, FINISHED)
    assert caught.value.kind == rollout_pb2.FAULT_KIND_EVALUATOR


def test_an_actor_without_the_bundle_does_not_evaluate_by_its_reward(stage: Stage) -> None:
    stage.bundle(check_sh=None, reward_py=REWARD)
    (task,) = load_tasks(stage.folder)

    async def scenario() -> None:
        ended = ended_episode(stage.desktop, task, [], [], FINISHED, 0)
        await make_task_reward(RunConfig()).evaluate(stage.desktop, ended)

    with pytest.raises(EvaluatorError, match=r"this machine has no reward\.py of it \(set tasks\.suite"):
        asyncio.run(scenario())
