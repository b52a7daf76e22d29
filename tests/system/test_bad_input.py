"""Invalid input at the shell: one line with the problem and a hint, exit status 2, and no data is lost.

An error that is found before a run starts leaves no run directory behind. An error that only a role can find ends the
run with the line of that role.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from model_folder_kit import change_weights, edit_json, without, write_model_folder
from ports_kit import free_port
from replay_kit import ReplayProcess

from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.run_dir import RunDir
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.learner.replay_client import ReplayClient
from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc
from deskrl.replay.schema import open_database

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
TASK = json.loads(
    next(Path(__file__).parents[2].glob("actor/deskrl/actor/suite/examples/*/make-a-folder.json")).read_text()
)
SMALL = {"image_width": 112, "image_height": 112}
SCREEN = "[desktop]\nwidth = 280\nheight = 224\n"

Rejected = Callable[..., str]


@pytest.fixture
def ports() -> list[str]:
    """Options with addresses on free ports."""
    return [f"--replay.address=127.0.0.1:{free_port()}", f"--inference.address=127.0.0.1:{free_port()}"]


@pytest.fixture
def rejected(tmp_path: Path, ports: list[str]) -> Rejected:
    """Function that runs a command, as in `rejected("up", SMOKE, "--seed", "x")`, and returns its line of error.

    It checks the exit status and the form of the line. `up` runs in `tmp_path/runs`, on free ports, unless options say
    otherwise.
    """

    def rejected(
        command: str, *arguments: object, environment: Mapping[str, str] | None = None, prelude: str = ""
    ) -> str:
        program = f"import sys; {prelude}\nfrom deskrl.cli.main import main\nsys.exit(main(sys.argv[1:]))"
        words = [str(argument) for argument in arguments]
        if command == "up":
            words[1:1] = [option for option in defaults]
        ended = subprocess.run(
            [sys.executable, "-c", program, command, *words],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **(environment or {})},
        )
        assert ended.returncode == 2, ended.stderr + ended.stdout
        # A role that is started on its own may log to standard error before it finds the error.
        lines = [line for line in ended.stderr.splitlines() if command == "up" or line.startswith(("deskrl: ", " "))]
        (line,) = lines
        assert re.fullmatch(r"deskrl: .+ \(hint: .+[^.?]\)", line), line
        assert line.count("(hint: ") == 1, line
        assert "Traceback" not in ended.stdout
        return line

    defaults = [f"--runs={tmp_path / 'runs'}", "--name=bad", *ports]
    return rejected


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Run directory of `rejected("up", …)`."""
    return tmp_path / "runs" / "bad"


# Environments.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ('{ id = "Tarket-v0" }', "desktop.provider_options: Tarket-v0 cannot be made: NameNotFound"),
        (
            '{ id = "target_game:Target-v0" }',
            "desktop.provider_options: target_game:Target-v0: the action space Discrete(4) needs a table of actions",
        ),
        ('{ id = "A-v0", actions = { left = 0 } }', "desktop.provider_options.actions: 'left' is not a gesture"),
        ("{}", "desktop.provider_options.id: "),
    ],
)
def test_an_environment_that_cannot_be_played_is_rejected_before_the_run(
    rejected: Rejected, tmp_path: Path, run_dir: Path, options: str, expected: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'{SCREEN}provider = "gymnasium"\nprovider_options = {options}\n')
    kit = str(Path(__file__).parents[1] / "kit")
    assert expected in rejected("up", path, environment={"PYTHONPATH": kit})
    assert not run_dir.exists()


def test_an_openenv_server_that_does_not_answer_is_rejected_before_the_run(
    rejected: Rejected, tmp_path: Path, run_dir: Path
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    options = f'{{ address = "{address}", actions = {{ click = {{ x = "{{x}}" }} }} }}'
    path = tmp_path / "run.toml"
    path.write_text(f'{SCREEN}provider = "openenv"\nprovider_options = {options}\n')
    assert f"the OpenEnv server at {address} cannot be reached" in rejected("up", path)
    assert not run_dir.exists()


# The configuration.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[learner]\nlerning_rate = 1\n",
            "learner.lerning_rate: unknown key (hint: did you mean learner.grpo.learning_rate or learner.warm_start.",
        ),
        ("[learner.grpo]\nnum_updates = 'many'\n", "learner.grpo.num_updates: Input should be a valid integer"),
        ("[learner\n", "not readable as TOML"),
        ("[model]\npath = 'm'\nbuild = 'tiny'\n", "set exactly one of model.path and model.build"),
        ("[agent]\nimage_width = 56\n", "agent.image_width and agent.image_height must be set together"),
        ("[inference]\nmax_images = 2\n", "agent.window_images = 5 allows more screenshots"),
        (
            '[agent]\ncontext = "segment"\nsegment_images = [5, 3]\n',
            "agent: segment_images = [5, 3]: the first bound must be less than the second",
        ),
        (
            '[agent]\ncontext = "segment"\nsegment_images = [4, 4]\n',
            "for a constant number of screenshots set context = window",
        ),
        ('[agent]\ncontext = "segment"\nsegment_images = [3]\n', "agent.segment_images"),
        (
            '[agent]\ncontext = "segment"\n[inference]\nmax_images = 4\n',
            "agent.segment_images = [3, 5] allows more screenshots in one prompt (agent.context = segment) than",
        ),
        ("[inference]\nmax_model_len = 100\n", "inference.max_action_tokens = 512 leaves no room for a prompt"),
        (
            "[inference]\nmetrics_port = 9100\n[replay]\nmetrics_port = 9100\n",
            "inference.metrics_port and replay.metrics_port both use port 9100",
        ),
    ],
)
def test_an_invalid_configuration_is_rejected_with_its_keys(
    rejected: Rejected, tmp_path: Path, run_dir: Path, text: str, expected: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert expected in rejected("up", path)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("up", SMOKE, "--learner.grpo.num_updtes", "3"), "num_updtes: unknown key (hint: did you mean learner.grpo"),
        (("up", SMOKE, "twice"), "twice"),
        (
            ("up", SMOKE, "--desktop.provider=vmwre"),
            "desktop.provider: unknown desktop provider 'vmwre' (hint: choose one of desktop_env, docker, ",
        ),
        (
            ("up", SMOKE, "--replay.address=localhost"),
            "replay.address: localhost has no port",
        ),
        (
            ("up", SMOKE, "--inference.address=127.0.0.1:99999"),
            "the port of 127.0.0.1:99999 is not a number",
        ),
        (("up", SMOKE, "--replay.address=0.0.0.0:7411"), "0.0.0.0:7411 is reachable from other machines"),
        (("up", "nowhere.toml"), "nowhere.toml: not found (hint: give a run configuration"),
        (
            ("up", SMOKE, "--inference.max_model_len=260"),
            "6 screenshots of 45 tokens have 270 tokens, more than",
        ),
        (
            ("up", SMOKE, "--agent.context=segment", "--inference.max_model_len=220"),
            "5 screenshots of 45 tokens have 225 tokens, more than inference.max_model_len = 220 (hint: ",
        ),
        (("explain", SMOKE, "--inference.max_model_len=260"), "6 screenshots of 45 tokens have 270 tokens"),
        (
            ("up", SMOKE, "--learner.lora.rank=8", '--learner.lora.targets=["q_porj"]'),
            "learner.lora.targets: no linear layer of the model is called q_porj (hint: choose from down_proj, ",
        ),
        (("merge-adapter", "nowhere", "merged"), "nowhere: contains no adapter (adapter_model.safetensors is missing)"),
        (("explain", SMOKE, "--act-s=soon"), "argument --act-s: soon: Input should be a valid number"),
        (("explain", "--arpo", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("up", "--arpo", SMOKE), "not readable as YAML"),
        (("replay", "nowhere.json"), "nowhere.json: not found"),
        (("report", "nowhere"), "config.json: not found (hint: give the directory of a run"),
        (("actor", SMOKE, "--index", "first"), "argument --index: first: Input should be a valid integer"),
        (("tasks", "prove", "nope"), "no task nope (hint: choose from"),
        (("fly", SMOKE), "fly: unknown command"),
    ],
)
def test_an_invalid_command_line_is_rejected_in_one_line(
    rejected: Rejected, arguments: tuple[object, ...], expected: str
) -> None:
    assert expected in rejected(*arguments)


def test_an_invalid_environment_variable_is_rejected(rejected: Rejected) -> None:
    assert "learner.sead: unknown key (hint: " in rejected("up", SMOKE, environment={"DESKRL_LEARNER__SEAD": "1"})


def test_a_run_cannot_be_kept_below_a_file(rejected: Rejected, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert f"{tmp_path / 'file' / 'bad'}: cannot create the run directory: " in rejected(
        "up", SMOKE, f"--runs={tmp_path}/file"
    )
    assert (tmp_path / "file").read_text() == "not a directory"


# Ports, packages, the disk.


def test_a_port_that_is_in_use_is_reported_with_its_key(rejected: Rejected, run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for key in ("replay.address", "inference.address"):
            expected = f"{key}: cannot listen on {address}: Address already in use (hint: set {key} to a free port)"
            assert expected in rejected("up", SMOKE, f"--{key}={address}")
    assert not run_dir.exists()


def test_two_roles_cannot_listen_on_one_port(rejected: Rejected, ports: list[str]) -> None:
    address = ports[0].partition("=")[2]
    assert "replay.address and inference.address both use port" in rejected(
        "up", SMOKE, f"--inference.address={address}"
    )


@pytest.mark.parametrize(
    ("package", "extra"),
    [("vllm", "inference"), ("deepspeed", "learner"), ("peft", "learner"), ("torch", "learner"), ("wandb", "wandb")],
)
def test_a_missing_package_is_reported_with_the_extra_that_provides_it(
    rejected: Rejected, run_dir: Path, package: str, extra: str
) -> None:
    options = ("--tracker=wandb", "--learner.lora.rank=8")
    line = rejected("up", SMOKE, *options, prelude=f"sys.modules['{package}'] = None")
    assert f"the package {package} is not installed (hint: pip install 'deskrl[{extra}]'" in line
    assert not run_dir.exists()


@pytest.mark.parametrize(("role", "package"), [("inference", "vllm"), ("learner", "torch"), ("build-model", "torch")])
def test_a_role_that_is_started_on_its_own_reports_its_missing_package(
    rejected: Rejected, tmp_path: Path, ports: list[str], role: str, package: str
) -> None:
    build_tiny_model(tmp_path / "model", seed=0, image_size=(112, 112), corpus=["a word"])
    address = ports[1].partition("=")[2]
    sections = {"model": {"path": tmp_path / "model"}, "agent": SMALL, "inference": {"address": address}}
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path, **sections}), path)
    (tmp_path / "run").mkdir()
    RunDir(tmp_path / "run").write_tasks({"make-a-folder": TASK}, {}, ["a word"])
    RunDir(tmp_path / "run").write_built_model("qwen2_5_vl", 112)
    line = rejected(role, path, prelude=f"sys.modules['{package}'] = None")
    assert line.startswith(f"deskrl: the package {package}") and "is not installed (hint: pip install 'deskrl[" in line


def test_a_missing_api_key_of_wandb_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra")
    program = (
        "import sys\n"
        "from deskrl.core.config import RunConfig\n"
        "from deskrl.learner.metrics.run_trackers import RunTrackers\n"
        "options = {'wandb': {'mode': 'online'}}\n"
        "RunTrackers(RunConfig(runs=sys.argv[1], tracker=['wandb'], tracker_options=options))"
    )
    without_key = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**without_key, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
        stdin=subprocess.DEVNULL,
    )
    assert "UserError: tracker: wandb cannot be started: No API key configured" in ended.stderr


def test_missing_debian_packages_are_reported(rejected: Rejected, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path}), path)
    line = rejected("actor", path, environment={"PATH": str(tmp_path)})
    assert (
        "Debian packages required by embedded desktops are not installed: " in line and "run: apt-get install " in line
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Separate file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not permit to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_does_not_start_on_a_disk_that_is_almost_full(rejected: Rejected, small_disk: Path) -> None:
    line = rejected("up", SMOKE, f"--runs={small_disk}")
    assert f"the disk of {small_disk / 'bad'} is full: " in line and "(hint: free disk space" in line
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("role", ["replay", "build-model"])
def test_a_role_reports_a_full_disk_and_existing_data_stays(rejected: Rejected, small_disk: Path, role: str) -> None:
    config = RunConfig.model_validate({"runs": small_disk, "agent": SMALL})
    config.run_dir.mkdir()
    RunDir(config.run_dir).write_tasks({}, {}, ["a word of the corpus"])
    RunDir(config.run_dir).write_built_model("qwen2_5_vl", 112)
    dump_config(config, config.run_dir / "config.json")
    fill(small_disk / "ballast")
    before = (small_disk / "ballast").stat().st_size
    assert "disk is full" in rejected(role, config.run_dir / "config.json")
    assert (small_disk / "ballast").stat().st_size == before


def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one_intact(small_disk: Path, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "model", seed=0, image_size=(112, 112), corpus=["a word"])
    (small_disk / "epoch_1").mkdir()
    (small_disk / "epoch_1" / "learner.json").write_text("{}")
    program = (
        "import sys; from pathlib import Path; from deskrl.core.config import LearnerConfig\n"
        "from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore\n"
        "from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter\n"
        "from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine\n"
        "from deskrl.learner.policy.policy_model import load_policy\n"
        "from deskrl.core.errors import UserError\n"
        "disk, model = map(Path, sys.argv[1:])\n"
        "engine = DeepSpeedEngine(load_policy(model, (), False), LearnerConfig(dtype='float32'))\n"
        "writer = CheckpointWriter(CheckpointStore(disk, model, {}), engine, keep=3)\n"
        "writer.begin('epoch_2', 2, {})\n"
        "try: writer.finish()\n"
        "except UserError as error: print(error)\n"
        "engine.close()"
    )
    command = [sys.executable, "-c", program, str(small_disk), str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"the disk of {small_disk} is full: a checkpoint does not fit (hint: free some space" in ended.stdout, (
        ended.stderr
    )
    assert contents(small_disk) == {small_disk / "epoch_1" / "learner.json": b"{}"}


def test_a_metrics_line_that_does_not_fit_leaves_the_other_lines_intact(small_disk: Path) -> None:
    folder = RunDir(small_disk)
    folder.append_metrics("first")
    fill(small_disk / "ballast")
    with pytest.raises(OSError, match="No space left"):
        folder.append_metrics("torn", text="x" * 2**13)
    (small_disk / "ballast").unlink()
    folder.append_metrics("last")
    assert [line["kind"] for line in folder.read_metrics()] == ["first", "last"]


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# Tasks and model.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "make-a-folder.json: not valid JSON"),
        (json.dumps({**TASK, "config": 3}), "make-a-folder.json"),
        (json.dumps({**TASK, "evaluator": {"func": "ask_a_friend"}}), "ask_a_friend"),
    ],
)
def test_an_invalid_task_file_is_reported(
    rejected: Rejected, tmp_path: Path, run_dir: Path, text: str, expected: str
) -> None:
    path = tmp_path / "suite" / "examples" / "os" / "make-a-folder.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert expected in rejected("up", SMOKE, f"--tasks.suite={tmp_path / 'suite'}", '--tasks.ids=["make-a-folder"]')
    assert not run_dir.exists(), "the corrected file must be able to start a run of the same name"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (('--tasks.ids=["nope"]',), "no task nope (hint: choose from the"),
        (("--tasks.suite=/nonexistent",), "/nonexistent: no task files examples/<domain>/<id>.json found"),
        (("--tasks.ids=[]", "--tasks.list=/nonexistent"), "/nonexistent: not found"),
        (("--model.build=null", "--model.path=/nonexistent"), "/nonexistent: not found (hint: correct model.path"),
        (("--learner.num_nodes=2",), "learner.num_nodes = 2, but `deskrl up` starts the roles of one machine"),
        (("--agent.image_width=500",), "the tiny model cannot process screenshots of 500 x 280 pixels"),
    ],
)
def test_missing_or_unsuitable_tasks_models_and_nodes_are_reported(
    rejected: Rejected, run_dir: Path, options: tuple[str, ...], expected: str
) -> None:
    assert expected in rejected("up", SMOKE, *options)
    assert not run_dir.exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Directory with placeholders of all files of a model and its processor."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", "weights not found (*.safetensors)"),
        ("preprocessor_config.json", "image processor not found (preprocessor_config.json or processor_config.json)"),
        ("tokenizer.json", "tokenizer not found (tokenizer.json)"),
    ],
)
def test_a_model_without_processor_or_weights_is_rejected(
    rejected: Rejected, run_dir: Path, model: Path, name: str, expected: str
) -> None:
    (model / name).unlink()
    line = rejected("up", SMOKE, "--model.build=null", f"--model.path={model}")
    assert f"{model}: {expected} (hint: copy the file from the original model)" in line
    assert not run_dir.exists()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4877660776\n"
DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_text(LFS),
        "model.safetensors: a Git LFS pointer, not the file itself (hint: run `git lfs pull`",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        "model.safetensors: cut short: it has 100000 of",
    ),
    "missing matrices": (
        lambda folder: change_weights(folder, lambda held: without(held, [it for it in held if "layers.1.mlp" in it])),
        "tensor model.layers.1.mlp.gate_proj.weight and 2 others are missing, which config.json requires",
    ),
    "wrapper": (
        lambda folder: change_weights(folder, lambda held: {f"module.{name}": it for name, it in held.items()}),
        "tensor module.visual.patch_embed.proj.weight must be called visual.patch_embed.proj.weight",
    ),
    "end token": (
        lambda folder: edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "ends a turn with '<|im_end|>', but eos_token is '<|endoftext|>'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["up", "eval", "inference", "learner"])
def test_a_model_that_would_not_be_loaded_as_saved_is_rejected_by_every_command(
    rejected: Rejected, tmp_path: Path, ports: list[str], damage: str, command: str
) -> None:
    """A role that a launcher starts on its own ends with the same line and status, so that it is not started again."""
    folder = write_model_folder(tmp_path / "model")
    change, expected = DAMAGES[damage]
    change(folder)
    if command == "eval":
        options = [f"--checkpoint={folder}", f"--config={SMOKE}", "--name=evaluation", "--tasks.ids=[]"]
    else:
        options = [SMOKE, "--model.build=null", f"--model.path={folder}"]
    if command != "up":
        options += [f"--runs={tmp_path / 'runs'}", *ports]
    assert expected in rejected(command, *options)


# The environment.


@pytest.mark.parametrize("command", ["up", "inference"])
def test_a_port_of_the_engine_that_is_no_number_is_rejected(
    rejected: Rejected, tmp_path: Path, ports: list[str], command: str
) -> None:
    options = [] if command == "up" else [f"--runs={tmp_path / 'runs'}", *ports]
    line = rejected(command, SMOKE, *options, environment={"VLLM_PORT": "eight"})
    assert "the environment variable VLLM_PORT is 'eight', not a port number (hint: unset VLLM_PORT)" in line


@pytest.mark.parametrize("command", ["up", "inference"])
def test_a_directory_for_temporary_files_that_is_too_long_is_rejected(
    rejected: Rejected, tmp_path: Path, ports: list[str], command: str
) -> None:
    folder = tmp_path / ("t" * (101 - len(str(tmp_path))))
    folder.mkdir()
    options = [] if command == "up" else [f"--runs={tmp_path / 'runs'}", *ports]
    line = rejected(command, SMOKE, *options, environment={"TMPDIR": str(folder)})
    assert "bytes are too long for the path of a Unix socket, at most 107 are possible" in line
    assert re.search(r"hint: set TMPDIR to a directory whose path has at most \d+ bytes, such as /tmp", line)


# State of an earlier run.


@pytest.fixture
def interrupted(run_dir: Path) -> Path:
    """Run directory of a run that was interrupted during training."""
    shutil.rmtree(run_dir, ignore_errors=True)
    for name in ("replay", "checkpoints", "logs", "model", "results"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "supervisor.json").write_text('{"state": "running", "started_unix_s": 1.0}')
    (run_dir / "metrics.jsonl").write_text('{"kind": "phase", "phase": "training"}\n')
    (run_dir / "model" / "config.json").write_text("{}")
    config = RunConfig.model_validate({"runs": run_dir.parent, "name": run_dir.name})
    dump_config(config, run_dir / "config.json")
    return run_dir


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["config.json", "supervisor.json"])
def test_a_run_with_damaged_files_is_rejected(rejected: Rejected, interrupted: Path, file: str) -> None:
    (interrupted / file).write_text("{")
    before = contents(interrupted)
    assert str(interrupted / file) in rejected("up", SMOKE)
    assert contents(interrupted) == before


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "not a valid checkpoint"),
        ("{", "not a valid checkpoint"),
        ({"schema": 99}, "written by another version of deskrl (schema 99)"),
        ({"files": {"model.safetensors": 10**6}}, "model.safetensors is missing or truncated"),
        ({"layout": {"learner.zero_stage": 3}}, "was written with learner.zero_stage = 3, this run has 1"),
    ],
)
def test_an_unreadable_or_foreign_checkpoint_is_rejected_before_any_role_starts(
    rejected: Rejected, interrupted: Path, record: Any, expected: str
) -> None:
    checkpoint = interrupted / "checkpoints" / "epoch_3"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(1000))
    if record is not None:
        whole = {"schema": 1, "num_updates": 3, "layout": {}, "files": {}, "state": {}}
        text = record if isinstance(record, str) else json.dumps({**whole, **record})
        (checkpoint / "learner.json").write_text(text)
    before = contents(interrupted)
    assert expected in rejected("up", SMOKE)
    assert contents(interrupted) == before


def test_a_truncated_database_ends_the_run_with_the_error_of_replay(rejected: Rejected, run_dir: Path) -> None:
    (run_dir / "replay").mkdir(parents=True)
    path = run_dir / "replay" / "replay.sqlite"
    open_database(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for seed in (1, 2):  # before the first update, the configuration may be changed
        line = rejected("up", SMOKE, f"--seed={seed}")
        assert line.startswith(f"deskrl: replay: {path}: ") and "(hint: restore the file from a copy" in line
    assert path.read_bytes() == whole[: len(whole) // 2]


def test_a_foreign_database_is_left_unchanged(rejected: Rejected, run_dir: Path) -> None:
    (run_dir / "replay").mkdir(parents=True)
    path = run_dir / "replay" / "replay.sqlite"
    with closing(sqlite3.connect(path)) as foreign:
        foreign.execute("CREATE TABLE photographs (id INTEGER)")
    before = path.read_bytes()
    assert f"{path}: not a replay database of deskrl" in rejected("up", SMOKE)
    assert path.read_bytes() == before


def test_an_error_of_ranks_started_by_torchrun_has_the_same_status_and_form(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path, "learner": {"num_processes": 2}}), path)
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "deskrl.cli.main", "learner", str(path)]
    environment = os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert list(temporary.iterdir()) == []
    lines = {line for line in ended.stderr.splitlines() if line.startswith("deskrl: ")}
    (line,) = lines
    assert f"{tmp_path / 'run' / 'model'}: not found" in line and "`deskrl up` builds a model" in line


# Another protocol version.


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[ReplayProcess]:
    config = {"runs": tmp_path, "name": "served", "replay": {"address": f"127.0.0.1:{free_port()}"}}
    process = ReplayProcess(RunConfig.model_validate(config))
    yield process
    process.close()


def test_an_actor_with_another_protocol_version_is_rejected_and_reports_it(
    rejected: Rejected, replay: ReplayProcess
) -> None:
    line = rejected(
        "actor", replay.config.run_dir / "config.json", prelude="from deskrl.core import rpc; rpc.PROTOCOL_VERSION = 2"
    )
    assert "uses version 2, this service version 1; install the same version of deskrl on both sides" in line
    assert replay.process.poll() is None


def test_a_learner_with_another_protocol_version_is_rejected(
    replay: ReplayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "PROTOCOL_VERSION", 2)
    client = ReplayClient(replay.config.replay.address, "rank-0", StopEvent())
    with pytest.raises(UserError, match="uses version 2, this service version 1; install the same version"):
        next(client.take_groups("train", "train/0", [0], dropped=list, while_waiting=lambda: None))
    client.close()


def test_a_call_with_another_protocol_version_changes_nothing(replay: ReplayProcess) -> None:
    replay.client().plan("eval/0", num=1)
    stranger = rpc.peer("actor", "stranger")
    stranger.protocol = 2
    with rpc.connect_sync(replay.config.replay.address) as channel, pytest.raises(grpc.RpcError) as error:
        request = rollout_pb2.AcquireLeaseRequest(peer=stranger, request_id="one")
        rollout_pb2_grpc.RolloutServiceStub(channel).AcquireLease(request, timeout=60)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert replay.client().acquire().lease_id, "the rollout must still be available"
