"""Code of others drives deskrl's desktops unchanged: Gymnasium, TRL, verifiers, and the agent loop of OSWorld.

TRL, verifiers and desktop-env have requirements that exclude one another, so that each needs an environment of its own
beside deskrl; tests whose package is missing are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.osworld_evaluators.evaluator_environment import interpreter_path
from deskrl.env import GYMNASIUM_ID
from deskrl.env.trl_tools import tool_factory, training_rows

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests" / "kit"
TASK = "make-a-folder"
NUM_RANDOM_STEPS = 1000
NUM_OSWORLD_EPISODES = 2

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed in this environment")


@needs("gymnasium")
@pytest.mark.timeout(1800)
def test_1000_random_steps_are_played_and_every_episode_ends_with_a_reward(
    tmp_path: Path, record_property: Any
) -> None:
    import gymnasium

    env = gymnasium.make(GYMNASIUM_ID, config={"runs": str(tmp_path)})
    ends: dict[str, int] = {}
    started_s = time.monotonic()
    try:
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(NUM_RANDOM_STEPS):
            screenshot, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert env.observation_space.contains(screenshot) and 0 <= reward <= 1
            if terminated or truncated:
                ends[info["termination"]] = ends.get(info["termination"], 0) + 1
                env.reset()
    finally:
        env.close()
    rate = NUM_RANDOM_STEPS / (time.monotonic() - started_s)
    record_property("steps_per_s", round(rate, 2))
    print(f"{rate:.2f} steps per second with resets; ends: {ends}")
    assert sum(ends.values()) > 20 and "format_error" not in ends


@needs("trl")
@pytest.mark.timeout(1800)
def test_trls_trainer_takes_three_updates_on_a_task_of_the_suite(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset
    from scripted_tool_model_kit import build_processor_and_model

    config = {
        "runs": str(tmp_path),
        "tasks": {"ids": [TASK]},
        "agent": {"image_width": 504, "image_height": 280},
    }
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl.jinja").read_text(encoding="utf-8")
    solution = [("type_text", {"text": "mkdir amber"}), ("hotkey", {"keys": ["enter"]}), ("finish", {})]
    processor, model = build_processor_and_model(
        tmp_path / "model", (504, 280), template, [solution, [("give_up", {})]]
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "output"),
        max_steps=3,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=1500,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        processing_class=processor,
        train_dataset=Dataset.from_list(training_rows(3, config)),
        environment_factory=tool_factory(config),
    )
    trainer.train()
    updates = [record for record in trainer.state.log_history if "loss" in record]
    assert [update["reward"] for update in updates] == [0.5] * 3  # one of two episodes solves the task
    assert all(update["grad_norm"] > 0 and update["tools/failure_frequency"] == 0 for update in updates)
    assert all((before[name] != tensor).any() for name, tensor in model.state_dict().items())


@contextmanager
def scripted_chat_server(*texts: str) -> Iterator[str]:
    """Run a chat server with scripted answers in a thread, and yield the URL of its API."""
    import socket

    import uvicorn
    from scripted_chat_server import make_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(make_app(list(texts)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@needs("verifiers")
@pytest.mark.parametrize(
    ("texts", "reward"),
    [
        (["type(content='mkdir amber')", "hotkey(key='enter')", "finished()"], 1.0),
        (["finished()"], 0.0),
    ],
)
def test_an_evaluation_by_verifiers_records_the_reward_of_the_task(
    tmp_path: Path, texts: list[str], reward: float
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(f'runs = "{tmp_path}"\n[tasks]\nids = ["{TASK}"]\n')
    with scripted_chat_server(*(f"Thought: I act.\nAction: {text}" for text in texts)) as url:
        options = ["--env.taskset.run-config", str(run), "--model", "scripted", "--client.base-url", url]
        options += ["--client.api-key-var", "SCRIPTED_KEY", "--no-push", "--no-rich", "-o", str(tmp_path / "output")]
        program = "import sys; from verifiers.v1.cli.eval.main import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", program, "deskrl_desktops", *options],
            env=os.environ | {"PYTHONPATH": str(ROOT / "examples" / "other_trainers"), "SCRIPTED_KEY": "x"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("output/*/traces.jsonl")
    (episode,) = map(json.loads, file.read_text().splitlines())
    assert episode["ok"], episode["errors"]
    (trace,) = episode["traces"]
    assert trace["rewards"]["desktop"]["score"] == reward
    assert trace["info"]["deskrl"]["termination"] == "finished"


@pytest.mark.skipif(not interpreter_path().exists(), reason="desktop-env is not installed: deskrl evaluators install")
@pytest.mark.parametrize(
    ("actions", "reward"),
    [
        (["pyautogui.write('mkdir amber')", "pyautogui.press('enter')", "DONE"], 1),
        (["pyautogui.moveTo(640, 360)", "DONE"], 0),
        (["pyautogui.write('mkdir amber')", "pyautogui.press('enter')", "FAIL"], 0),
    ],
)
def test_the_agent_loop_of_osworld_plays_on_desktops_of_deskrls_provider(
    tmp_path: Path, actions: list[str], reward: int
) -> None:
    task = {
        "id": "make-a-folder",
        "instruction": "Make a folder called amber in your home.",
        "config": [
            {"type": "launch", "parameters": {"command": ["xterm", "-T", "Terminal", "-maximized"]}},
            {"type": "sleep", "parameters": {"seconds": 2}},
        ],
        "evaluator": {
            "func": "exact_match",
            "result": {"type": "vm_command_line", "command": "ls -dbF ~/amber", "shell": True},
            "expected": {"type": "rule", "rules": {"expected": "/home/user/amber/\n"}},
        },
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    program = [str(interpreter_path()), str(KIT / "osworld_agent_loop.py"), sys.executable]
    done = subprocess.run(
        [*program, str(tmp_path / "task.json"), str(tmp_path / "cache"), str(NUM_OSWORLD_EPISODES), *actions],
        env=os.environ | {"PYTHONPATH": str(ROOT / "env")},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(results) == NUM_OSWORLD_EPISODES  # each begins on a desktop without what the last one left
    for result in results:
        assert (result["reward"], result["done"], result["instruction"]) == (reward, True, task["instruction"])
        assert len(result["sizes"]) == len(actions) + 1 and min(result["sizes"]) > 1000
