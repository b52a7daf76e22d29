"""Real desktops as Gymnasium environments: the checker, vectors, rewards of the suite, noise of groups, and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.orphan_cleanup import find_sandbox_processes
from deskrl.actor.main import desktops_dir
from deskrl.env import GYMNASIUM_ID
from deskrl.env.desktop_env import env_config
from deskrl.env.desktop_fault import DesktopFault

gymnasium = pytest.importorskip("gymnasium", reason="the extra env is not installed")
np = pytest.importorskip("numpy")

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

TASK, DRAWING = "make-a-folder", "fill-the-disc"
NO_ACTION = {"kind": list(ActionKind).index(ActionKind.MOVE), "point": np.array([640, 360])}
FINISHED = {"kind": list(ActionKind).index(ActionKind.FINISHED)}


def values(folder: Path, **tasks: Any) -> dict[str, Any]:
    return {"runs": str(folder), "tasks": {"ids": [TASK, DRAWING], **tasks}}


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    env = gymnasium.make(GYMNASIUM_ID, config=values(tmp_path_factory.mktemp("env")), render_mode="rgb_array")
    yield env
    env.close()


def play_solution(env: Any, task: str) -> tuple[float, bool, bool, dict[str, Any]]:
    """Play the scripted solution of a task; return reward, terminated, truncated and info of the last step."""
    for _, action in env.unwrapped.desktop.tasks[task].demonstrate():
        _, reward, terminated, truncated, info = env.step(action)
    return reward, terminated, truncated, info


def test_gymnasiums_checker_passes_without_a_warning(tmp_path: Path) -> None:
    env = gymnasium.make(GYMNASIUM_ID, config=values(tmp_path, ids=[DRAWING]), render_mode="rgb_array")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            from gymnasium.utils.env_checker import check_env

            check_env(env.unwrapped)
    finally:
        env.close()


@pytest.mark.parametrize("task", [TASK, DRAWING])
def test_a_solved_task_gets_1_and_an_untouched_one_0(env: Any, task: str) -> None:
    screenshot, info = env.reset(seed=1, options={"task": task})
    assert screenshot.shape == (720, 1280, 3) and screenshot.dtype == np.uint8
    assert info["task"] == task and info["instruction"] and (screenshot == env.render()).all()
    reward, terminated, truncated, info = play_solution(env, task)
    assert (reward, terminated, truncated, info["termination"]) == (1.0, True, False, "finished")
    env.reset(seed=1, options={"task": task})
    _, reward, terminated, truncated, info = env.step(FINISHED)
    assert (reward, terminated, truncated, info["termination"]) == (0.0, True, False, "finished")


def test_actions_of_the_space_move_the_pointer_type_and_press_keys(env: Any) -> None:
    env.reset(seed=1, options={"task": TASK})
    kinds = list(ActionKind)
    from deskrl.env.gymnasium_env import KEYS

    env.step({"kind": kinds.index(ActionKind.CLICK), "point": np.array([640, 360]), "modifiers": [0, 0, 0, 0]})
    env.step({"kind": kinds.index(ActionKind.TYPE), "text": "mkdir ambex"})
    env.step({"kind": kinds.index(ActionKind.HOTKEY), "key": KEYS.index("backspace")})
    env.step({"kind": kinds.index(ActionKind.TYPE), "text": "r"})
    env.step({"kind": kinds.index(ActionKind.HOTKEY), "key": KEYS.index("m"), "modifiers": [1, 0, 0, 0]})  # Return
    _, reward, terminated, _, _ = env.step(FINISHED)
    assert (reward, terminated) == (1.0, True)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({}, "the action has no kind"),
        ({"kind": 99}, "kind of the action is 99"),
        ({"kind": 0, "point": np.array([1280, 0])}, "point of the action is"),
        ({"kind": 0, "button": 1}, "an action has no 'button'"),
        ({"kind": 0, "seconds": 9.0}, "seconds of the action is 9.0"),
        ({"kind": 0, "text": 1}, "text of the action is 1"),
    ],
)
def test_an_action_outside_of_the_space_is_an_error_of_one_line(env: Any, action: Any, message: str) -> None:
    env.reset(seed=1, options={"task": TASK})
    with pytest.raises(ValueError) as caught:
        env.step(action)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    env.step(NO_ACTION)


def test_an_unknown_option_or_task_is_an_error(env: Any) -> None:
    with pytest.raises(ValueError, match="reset has no option 'tasks'"):
        env.reset(seed=1, options={"tasks": TASK})
    with pytest.raises(ValueError, match="there is no task 'none'"):
        env.reset(seed=1, options={"task": "none"})


def test_episodes_of_a_group_have_the_same_noise(tmp_path: Path) -> None:
    env = gymnasium.make(GYMNASIUM_ID, config=values(tmp_path, noise="medium"))
    try:
        screens = [
            env.reset(seed=seed, options={"task": DRAWING, "group": group})[0]
            for seed, group in ((1, "a"), (2, "a"), (3, "b"))
        ]
        reward, *_ = play_solution(env, DRAWING)
    finally:
        env.close()
    assert (screens[0] == screens[1]).all()
    assert (screens[0] != screens[2]).any()
    assert reward == 1.0


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_environments_are_vectorised(tmp_path: Path, mode: str) -> None:
    vector = gymnasium.make_vec(GYMNASIUM_ID, 2, vectorization_mode=mode, config=values(tmp_path, max_steps=3))
    try:
        screenshots, info = vector.reset(seed=1, options={"task": TASK, "group": "a"})
        assert screenshots.shape == (2, 720, 1280, 3)
        assert list(info["seed"]) == [1, 2] and info["instruction"][0] == info["instruction"][1]
        vector.action_space.seed(0)
        ends = []
        for _ in range(4):
            _, _, terminated, truncated, info = vector.step(vector.action_space.sample())
            ends += [info["termination"][index] for index in np.flatnonzero(terminated | truncated)]
        assert len(ends) >= 2 and set(ends) <= {"step_limit", "finished", "infeasible"}
    finally:
        vector.close()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium logs the error of each process
def test_an_error_in_a_vector_of_processes_keeps_its_message(tmp_path: Path) -> None:
    vector = gymnasium.make_vec(GYMNASIUM_ID, 2, vectorization_mode="async", config=values(tmp_path))
    try:
        with pytest.raises(ValueError, match="there is no task 'none'"):
            vector.reset(seed=1, options={"task": "none"})
    finally:
        vector.close(terminate=True)


def test_a_desktop_that_is_killed_is_a_fault_and_the_next_reset_starts_another_one(env: Any) -> None:
    env.reset(seed=1, options={"task": TASK})
    env.step(NO_ACTION)
    (folder,) = desktops_dir(env.unwrapped.desktop.config).iterdir()
    for pid in find_sandbox_processes(folder):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DesktopFault, match="ended from outside by SIGKILL") as caught:
        env.step(Action(ActionKind.TYPE, text="mkdir amber"))
    assert caught.value.kind == "desktop_lost"
    env.reset(seed=1, options={"task": TASK})
    assert play_solution(env, TASK)[0] == 1.0


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    env = gymnasium.make(GYMNASIUM_ID, config=values(tmp_path))
    env.reset(seed=1)
    root = desktops_dir(env.unwrapped.desktop.config)
    (folder,) = root.iterdir()
    assert find_sandbox_processes(folder)
    env.close()
    env.close()
    assert not root.exists() and not find_sandbox_processes(folder)


def test_nothing_is_left_after_an_end_of_the_process_without_close(tmp_path: Path) -> None:
    program = (
        "import json, os, signal, sys, threading, gymnasium, deskrl.env\n"
        "from deskrl.actor.actions import Action, ActionKind\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored\n"
        "env = gymnasium.make('deskrl/Desktop-v0', config=json.loads(sys.argv[1]))\n"
        "env.reset(seed=1)\n"
        "threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "env.step(Action(ActionKind.WAIT, seconds=30))\n"
    )
    config = values(tmp_path)
    root = desktops_dir(env_config(config))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(config)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt" and "Exception ignored" not in done.stderr
    assert not root.exists()
