"""Episodes that are played by plain calls, on simulated desktops: results, limits, bad input and faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.env.desktop_env import DesktopEnv, env_config
from deskrl.env.desktop_fault import DesktopFault
from deskrl.env.episode_player import EpisodePlayer

SIMULATED = {"provider": "simulated", "simulated": {"time_scale": 1e-9, "hang_rate": 0.0}, "width": 560, "height": 280}
AMBER = Action(ActionKind.TYPE, text="amber")
CLICK = Action(ActionKind.CLICK, 10, 20)
FINISHED = Action(ActionKind.FINISHED)


def config(tmp_path: Path, **tables: Any) -> dict[str, Any]:
    return {"runs": str(tmp_path), "desktop": SIMULATED, **tables}


@pytest.fixture
def env(tmp_path: Path) -> Iterator[DesktopEnv]:
    env = DesktopEnv(config(tmp_path, tasks={"max_steps": 3}, agent={"image_width": 280, "image_height": 140}))
    yield env
    env.close()


def test_an_episode_gives_screenshots_and_ends_with_the_reward_of_the_task(env: DesktopEnv) -> None:
    turn = env.reset(1, "type-amber")
    assert (turn.task_id, turn.seed, turn.instruction, turn.num_steps) == ("type-amber", 1, "Type the word amber.", 0)
    assert turn.screenshot.size == (280, 140) and turn.end is None
    typed = env.step(AMBER)
    assert typed.png != turn.png and (typed.num_steps, typed.end) == (1, None)
    end = env.step(FINISHED).end
    assert end is not None and (end.reward, end.termination, end.is_truncated) == (1.0, "finished", False)
    assert end.evidence["checks"][0]["result"] == "1\n"
    env.reset(1, "type-amber")
    untouched = env.step(FINISHED).end
    assert untouched is not None and untouched.reward == 0.0


def test_the_step_limit_truncates_an_episode_whose_state_is_evaluated(env: DesktopEnv) -> None:
    env.reset(1, "type-amber")
    assert env.step(AMBER).end is None and env.step(CLICK).end is None
    end = env.step(CLICK).end
    assert end is not None and (end.reward, end.termination, end.is_truncated) == (1.0, "step_limit", True)


def test_a_text_is_a_response_in_the_action_language_of_the_run(env: DesktopEnv) -> None:
    env.reset(1, "type-amber")
    env.step("Thought: I type it.\nAction: type(content='amber')")
    end = env.step("Action: finished()").end
    assert end is not None and end.reward == 1.0
    env.reset(1, "type-amber")
    end = env.step("Action: frobnicate()").end
    assert end is not None and (end.reward, end.termination) == (0.0, "format_error")


def test_points_are_pixels_of_the_screenshot_that_the_policy_sees(
    env: DesktopEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted: list[Action] = []

    async def act(desktop: SimulatedDesktop, action: Action) -> None:
        acted.append(action)

    monkeypatch.setattr(SimulatedDesktop, "act", act)
    env.reset(1)
    env.step(Action(ActionKind.DRAG, 10, 20, 279, 139, seconds=1.5))
    assert acted == [Action(ActionKind.DRAG, 20, 40, 558, 278, seconds=1.5)]


def test_the_seed_chooses_the_task_if_none_is_named(env: DesktopEnv) -> None:
    names = [env.reset(seed).task_id for seed in range(12)]
    assert names == [env.reset(seed).task_id for seed in range(12)]
    assert len(set(names)) > 1


def test_a_new_episode_abandons_the_running_one(env: DesktopEnv) -> None:
    env.reset(1, "type-amber")
    env.step(AMBER)
    env.reset(2, "type-amber")
    end = env.step(FINISHED).end
    assert end is not None and end.reward == 0.0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action(ActionKind.CLICK, 280, 0), "click: (280, 0) is outside the screenshot of 280x140 pixels"),
        (Action(ActionKind.DRAG, 0, 0, 0, -1), "drag: (0, -1) is outside the screenshot"),
        (Action(ActionKind.HOTKEY), "hotkey: no keys"),
        (Action(ActionKind.HOTKEY, keys=("ctrl", "frob")), "hotkey: 'frob' is not a key"),
        (Action(ActionKind.WAIT, seconds=-1.0), "wait: -1.0 s is not a duration"),
        (Action(ActionKind.WAIT, seconds=float("nan")), "wait: nan s is not a duration"),
    ],
)
def test_an_action_that_cannot_be_executed_is_an_error_and_the_episode_continues(
    env: DesktopEnv, action: Action, message: str
) -> None:
    env.reset(1, "type-amber")
    with pytest.raises(UserError) as caught:
        env.step(action)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert env.step(AMBER).num_steps == 1


def test_bad_input_is_an_error_that_names_it(env: DesktopEnv, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no episode is running"):
        env.step(FINISHED)
    with pytest.raises(UserError, match=r"there is no task 'type-umber'.*type-amber"):
        env.reset(1, "type-umber")
    with pytest.raises(UserError, match="the seed -1 is invalid"):
        env.reset(-1)
    with pytest.raises(UserError, match=r"tasks\.max_stepz"):
        DesktopEnv(config(tmp_path, tasks={"max_stepz": 3}))
    with pytest.raises(UserError, match="frob"):
        DesktopEnv({"runs": str(tmp_path), "desktop": {"provider": "frob"}})
    with pytest.raises(UserError, match="vmrun"):
        DesktopEnv({"desktop": {"provider": "vmware", "vmware": {"machines": ["/none.vmx"], "vmrun": "/none/vmrun"}}})
    with pytest.raises(UserError, match=r"none\.toml: not found"):
        DesktopEnv(tmp_path / "none.toml")


def test_a_configuration_is_a_run_configuration_a_file_or_tables(tmp_path: Path) -> None:
    assert env_config().tasks.unmet_requirements == "skip"
    assert env_config({"tasks": {"max_steps": 7, "unmet_requirements": "run"}}).tasks.unmet_requirements == "run"
    file = tmp_path / "run.toml"
    file.write_text("[tasks]\nmax_steps = 7\n")
    from_file = env_config(str(file))
    assert (from_file.tasks.max_steps, from_file.tasks.unmet_requirements) == (7, "reject")
    given = RunConfig()
    assert env_config(given) is given


def fail_first(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, num_failures: int) -> list[str]:
    """Let the first calls of a method of simulated desktops fail; return a list that each call extends."""
    calls: list[str] = []
    real = getattr(SimulatedDesktop, method)

    async def failing(desktop: SimulatedDesktop, *arguments: Any, **keywords: Any) -> Any:
        calls.append(method)
        if len(calls) <= num_failures:
            raise error
        return await real(desktop, *arguments, **keywords)

    monkeypatch.setattr(SimulatedDesktop, method, failing)
    return calls


@pytest.mark.parametrize("method", ["reset", "execute"])
def test_a_reset_is_repeated_after_a_fault(env: DesktopEnv, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    calls = fail_first(monkeypatch, method, DesktopError("it broke"), num_failures=2)
    assert env.reset(1, "type-amber").end is None
    assert len(calls) == 3


@pytest.mark.parametrize(("method", "kind"), [("reset", "desktop_start"), ("execute", "task_setup")])
def test_a_fault_that_repeats_is_raised_with_its_kind(
    env: DesktopEnv, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    calls = fail_first(monkeypatch, method, DesktopError("it broke"), num_failures=100)
    with pytest.raises(DesktopFault, match=rf"desktop fault {kind}: .*it broke") as caught:
        env.reset(1, "type-amber")
    assert caught.value.kind == kind
    assert len(calls) == 1 + env.config.replay.max_faults


def test_a_fault_during_an_episode_is_raised_and_the_next_reset_starts_a_fresh_desktop(
    env: DesktopEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cause(desktop: SimulatedDesktop) -> str:
        return "the machine ended it"

    env.reset(1, "type-amber")
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedDesktop, "death_cause", cause)
        fail_first(patch, "act", DesktopGone("it is gone"), num_failures=1)
        with pytest.raises(DesktopFault, match="the machine ended it") as caught:
            env.step(AMBER)
    assert caught.value.kind == "desktop_lost"
    with pytest.raises(UserError, match="no episode is running"):
        env.step(AMBER)
    env.reset(1, "type-amber")
    env.step(AMBER)
    end = env.step(FINISHED).end
    assert end is not None and end.reward == 1.0


def test_what_the_policy_breaks_is_its_failure(env: DesktopEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(1, "type-amber")
    fail_first(monkeypatch, "act", DesktopGone("it is gone"), num_failures=1)
    end = env.step(AMBER).end
    assert end is not None and (end.reward, end.termination) == (0.0, "desktop_destroyed")
    assert env.reset(1, "type-amber").end is None


def test_an_action_that_is_interrupted_costs_the_desktop_and_not_the_next_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[SimulatedDesktop] = []

    async def scenario() -> None:
        is_acting = asyncio.Event()

        async def act(desktop: SimulatedDesktop, action: Action) -> None:
            is_acting.set()
            await asyncio.Event().wait()

        async def close(desktop: SimulatedDesktop) -> None:
            closed.append(desktop)

        monkeypatch.setattr(SimulatedDesktop, "close", close)
        player = EpisodePlayer(env_config(config(tmp_path)))
        await player.start(1, "type-amber")
        with monkeypatch.context() as patch:
            patch.setattr(SimulatedDesktop, "act", act)
            acting = asyncio.create_task(player.act(AMBER))
            await is_acting.wait()
            acting.cancel()
            await asyncio.wait({acting})
        await player.start(2, "type-amber")
        assert len(closed) == 1
        await player.act(AMBER)
        end = (await player.act(FINISHED)).end
        assert end is not None and end.reward == 1.0
        await player.close()

    asyncio.run(scenario())
    assert len(set(closed)) == 2


def test_a_fault_is_found_in_the_text_of_another_error() -> None:
    fault = DesktopFault.of_kind("desktop_lost", "it ended")
    assert (fault.kind, str(fault)) == ("desktop_lost", "desktop fault desktop_lost: it ended")
    found = DesktopFault.find_in(f"Server error: {fault}")
    assert found is not None and found.kind == "desktop_lost"
    assert DesktopFault.find_in("Server error: there is no task") is None
    assert DesktopFault(fault).kind == "desktop_lost"  # as vector environments raise it again


@contextlib.contextmanager
def interrupted_when(begun: threading.Event) -> Iterator[None]:
    """Send the signal of Ctrl-C to this process when an operation has begun."""

    def interrupt() -> None:
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("operation", ["reset", "act"])
def test_an_interrupted_operation_ends_its_episode_and_replaces_its_desktop(
    env: DesktopEnv, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    begun, closed, original = threading.Event(), [], SimulatedDesktop.close

    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    async def close(desktop: SimulatedDesktop) -> None:
        closed.append(desktop)
        await original(desktop)

    monkeypatch.setattr(SimulatedDesktop, "close", close)
    if operation == "act":
        env.reset(1, "type-amber")
    with monkeypatch.context() as patch, interrupted_when(begun):
        patch.setattr(SimulatedDesktop, operation, hang)
        env.reset(1, "type-amber") if operation == "reset" else env.step(AMBER)
    with pytest.raises(UserError, match="no episode is running"):
        env.step(FINISHED)
    assert len(closed) == 1
    env.reset(1, "type-amber")
    env.step(AMBER)
    end = env.step(FINISHED).end
    assert end is not None and (end.reward, end.termination) == (1.0, "finished")


def test_a_forked_process_cannot_use_the_desktop_of_its_parent(tmp_path: Path) -> None:
    program = """
import json, os, sys
from deskrl.actor.actions import Action, ActionKind
from deskrl.core.errors import UserError
from deskrl.env.desktop_env import DesktopEnv

env = DesktopEnv(json.loads(sys.argv[1]))
env.reset(1, "type-amber")
child = os.fork()
try:
    print(env.step(Action(ActionKind.TYPE, text="amber")).num_steps, flush=True)
except UserError as error:
    print(error, flush=True)
env.close()
if child:
    os.waitpid(child, 0)
"""
    # In a process of its own: other tests leave threads behind, and a fork of a process that has them can hang.
    command = [sys.executable, "-c", program, json.dumps(config(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.splitlines()) == [
        "1",
        "the desktop belongs to another process (hint: create an environment in each process)",
    ]
