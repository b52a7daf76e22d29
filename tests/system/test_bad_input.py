"""Bad input, as a person meets it at the shell: one clear line with the mend, exit status 2, nothing lost.

Each case gives `deskrl` something that it cannot work with and looks at what a person sees. What is known to be wrong
before a run begins leaves no folder behind; what only a role finds out ends the run with that role's own line.
"""

from __future__ import annotations

import json
import os
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
from ports_kit import free_port
from replay_kit import ReplayProcess

from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.core.runfolder import RunFolder
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.learner.replay_client import ReplayClient
from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc
from deskrl.replay.schema import open_database

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
TASK = json.loads(
    next(Path(__file__).parents[2].glob("actor/deskrl/actor/suite/examples/*/make-a-folder.json")).read_text()
)
SMALL = {"image_width": 112, "image_height": 112}

Refused = Callable[..., str]


@pytest.fixture
def ports() -> list[str]:
    """Addresses that nobody listens on, as options."""
    return [f"--replay.address=127.0.0.1:{free_port()}", f"--inference.address=127.0.0.1:{free_port()}"]


@pytest.fixture
def refused(tmp_path: Path, ports: list[str]) -> Refused:
    """`refused("up", SMOKE, "--seed", "x")` runs the command, holds it to its manners and returns the one line.

    `up` runs in `tmp_path/runs`, on free ports; options that are given win over these.
    """

    def refused(
        command: str, *arguments: object, environment: Mapping[str, str] | None = None, prelude: str = ""
    ) -> str:
        program = f"import sys; {prelude}\nfrom deskrl.core.cli import main\nsys.exit(main(sys.argv[1:]))"
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
        # A role that is started by hand logs on standard error before it finds out.
        lines = [line for line in ended.stderr.splitlines() if command == "up" or line.startswith(("deskrl: ", " "))]
        (line,) = lines
        assert line.startswith("deskrl: ") and "; " in line, "what is wrong; the mend"
        assert "Traceback" not in ended.stdout
        return line

    defaults = [f"--runs={tmp_path / 'runs'}", "--name=bad", *ports]
    return refused


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Where `refused("up", …)` runs."""
    return tmp_path / "runs" / "bad"


# The configuration.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[learner]\nlerning_rate = 1\n", "unknown key learner.lerning_rate"),
        ("[learner.grpo]\nnum_updates = 'many'\n", "learner.grpo.num_updates: Input should be a valid integer"),
        ("[learner\n", "not readable as TOML"),
        ("[model]\npath = 'm'\nbuild = 'tiny'\n", "set exactly one of model.path and model.build"),
        ("[agent]\nimage_width = 56\n", "only one of agent.image_width and agent.image_height is set"),
        ("[inference]\nmax_images = 2\n", "agent.window_images = 5 screenshots"),
        ("[inference]\nmax_model_len = 100\n", "inference.max_action_tokens = 512 leaves no room for a prompt"),
        ("[inference]\nmetrics_port = 9100\n[replay]\nmetrics_port = 9100\n", "both come to port 9100"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_by_its_keys(
    refused: Refused, tmp_path: Path, run_folder: Path, text: str, told: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert told in refused("up", path)
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("up", SMOKE, "--learner.grpo.num_updtes", "3"), "--learner.grpo.num_updtes"),
        (("up", SMOKE, "twice"), "twice"),
        (("up", SMOKE, "--replay.address=localhost"), "replay.address: localhost is no host:port such as 127.0.0.1"),
        (("up", SMOKE, "--inference.address=127.0.0.1:99999"), "inference.address: 127.0.0.1:99999 is no host:port"),
        (("up", SMOKE, "--replay.address=0.0.0.0:7411"), "0.0.0.0:7411 is reachable from other machines"),
        (("up", "nowhere.toml"), "nowhere.toml: no such file; name a run configuration"),
        (
            ("up", SMOKE, "--inference.max_model_len=260"),
            "6 screenshots of 45 tokens are 270, and inference.max_model_",
        ),
        (("explain", SMOKE, "--inference.max_model_len=260"), "6 screenshots of 45 tokens are 270"),
        (("explain", SMOKE, "--act-s=soon"), "invalid float value: 'soon'"),
        (("explain", "--arpo", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("up", "--arpo", SMOKE), "not readable as YAML"),
        (("replay", "nowhere.json"), "nowhere.json: no such file"),
        (("report", "nowhere"), "config.json: no such file; name the folder of a run"),
        (("actor", SMOKE, "--index", "first"), "invalid int value: 'first'; see deskrl actor --help"),
        (("tasks", "prove", "nope"), "no task nope; choose from"),
        (("fly", SMOKE), "invalid choice: 'fly'"),
    ],
)
def test_a_command_line_that_is_wrong_is_refused_in_one_line(
    refused: Refused, arguments: tuple[object, ...], told: str
) -> None:
    assert told in refused(*arguments)


def test_an_environment_that_is_wrong_is_refused(refused: Refused) -> None:
    assert "unknown key learner.sead" in refused("up", SMOKE, environment={"DESKRL_LEARNER__SEAD": "1"})


def test_runs_go_into_a_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a person's own")
    assert f"{tmp_path / 'file' / 'bad'}: no run can be kept here" in refused("up", SMOKE, f"--runs={tmp_path}/file")
    assert (tmp_path / "file").read_text() == "a person's own"


# Ports, packages, the disk.


def test_a_port_that_is_taken_is_named_with_its_key(refused: Refused, run_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for key in ("replay.address", "inference.address"):
            told = f"{address} ({key}) cannot be listened on: Address already in use; choose another port with --{key}"
            assert told in refused("up", SMOKE, f"--{key}={address}")
    assert not run_folder.exists()


def test_two_roles_cannot_listen_on_one_port(refused: Refused, ports: list[str]) -> None:
    address = ports[0].partition("=")[2]
    assert "replay.address and inference.address both come to port" in refused(
        "up", SMOKE, f"--inference.address={address}"
    )


@pytest.mark.parametrize(
    ("package", "extra"),
    [("vllm", "inference"), ("deepspeed", "learner"), ("torch", "learner"), ("wandb", "wandb")],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(
    refused: Refused, run_folder: Path, package: str, extra: str
) -> None:
    line = refused("up", SMOKE, "--wandb=offline", prelude=f"sys.modules['{package}'] = None")
    assert f"the package {package} is not installed; pip install 'deskrl[{extra}]'" in line
    assert not run_folder.exists()


@pytest.mark.parametrize(("role", "package"), [("inference", "vllm"), ("learner", "torch"), ("model", "torch")])
def test_a_role_by_itself_names_its_missing_package(
    refused: Refused, tmp_path: Path, ports: list[str], role: str, package: str
) -> None:
    build_tiny_model(tmp_path / "model", seed=0, image_size=(112, 112), corpus=["a word"])
    address = ports[1].partition("=")[2]
    sections = {"model": {"path": tmp_path / "model"}, "agent": SMALL, "inference": {"address": address}}
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path, **sections}), path)
    (tmp_path / "run").mkdir()
    for name, text in (("corpus.txt", "a word"), ("tasks.json", json.dumps({"make-a-folder": TASK}))):
        (tmp_path / "run" / name).write_text(text)
    line = refused(role, path, prelude=f"sys.modules['{package}'] = None")
    assert line.startswith(f"deskrl: the package {package}") and "is not installed; pip install 'deskrl[" in line


def test_wandb_that_lets_nobody_in_is_told(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra")
    program = (
        "import sys; from deskrl.core.config import RunConfig; from deskrl.learner.tracking import Tracker\n"
        "Tracker(RunConfig(runs=sys.argv[1], wandb='online'))"
    )
    nobody = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**nobody, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
        stdin=subprocess.DEVNULL,
    )
    assert "UserError: wandb does not start: No API key configured" in ended.stderr


def test_debian_packages_that_are_missing_are_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path}), path)
    line = refused("actor", path, environment={"PATH": str(tmp_path)})
    assert "needs Debian packages that are not installed: " in line and "run: apt-get install " in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine grants no mount, so there is no small disk to fill")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_does_not_start_on_a_disk_that_is_all_but_full(refused: Refused, small_disk: Path) -> None:
    line = refused("up", SMOKE, f"--runs={small_disk}")
    assert f"the disk of {small_disk / 'bad'} is full" in line and "free some space" in line
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("role", ["replay", "model"])
def test_a_role_on_a_full_disk_says_so_and_what_is_there_stays(refused: Refused, small_disk: Path, role: str) -> None:
    config = RunConfig.model_validate({"runs": small_disk, "agent": SMALL})
    config.folder.mkdir()
    (config.folder / "corpus.txt").write_text("a word of the corpus")
    dump_config(config, config.folder / "config.json")
    fill(small_disk / "ballast")
    before = (small_disk / "ballast").stat().st_size
    assert "disk is full" in refused(role, config.folder / "config.json")
    assert (small_disk / "ballast").stat().st_size == before


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(small_disk: Path, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "model", seed=0, image_size=(112, 112), corpus=["a word"])
    (small_disk / "epoch_1").mkdir()
    (small_disk / "epoch_1" / "learner.json").write_text("{}")
    program = (
        "import sys; from pathlib import Path; from deskrl.core.config import LearnerConfig\n"
        "from deskrl.learner.policy.checkpoint import CheckpointStore\n"
        "from deskrl.learner.policy.checkpoint_writer import CheckpointWriter\n"
        "from deskrl.learner.policy.engine import Engine; from deskrl.learner.policy.model import load_policy\n"
        "from deskrl.core.errors import UserError\n"
        "disk, model = map(Path, sys.argv[1:])\n"
        "engine = Engine(load_policy(model, (), False), LearnerConfig(dtype='float32'))\n"
        "writer = CheckpointWriter(CheckpointStore(disk, model, {}), engine, keep=3)\n"
        "writer.begin('epoch_2', 2, {})\n"
        "try: writer.finish()\n"
        "except UserError as error: print(error)\n"
        "engine.close()"
    )
    command = [sys.executable, "-c", program, str(small_disk), str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"the disk of {small_disk} is full: a checkpoint does not fit; free some space" in ended.stdout, ended.stderr
    assert contents(small_disk) == {small_disk / "epoch_1" / "learner.json": b"{}"}


def test_a_metrics_line_that_does_not_fit_takes_no_other_with_it(small_disk: Path) -> None:
    folder = RunFolder(small_disk)
    folder.append_metrics("first")
    fill(small_disk / "ballast")
    with pytest.raises(OSError, match="No space left"):
        folder.append_metrics("torn", text="x" * 2**13)
    (small_disk / "ballast").unlink()
    folder.append_metrics("last")
    assert [line["kind"] for line in folder.read_metrics()] == ["first", "last"]


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# What a run is made of: tasks and a model.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "make-a-folder.json: is no JSON"),
        (json.dumps({**TASK, "config": 3}), "make-a-folder.json"),
        (json.dumps({**TASK, "evaluator": {"func": "ask_a_friend"}}), "ask_a_friend"),
    ],
)
def test_a_task_file_that_is_wrong_is_named(
    refused: Refused, tmp_path: Path, run_folder: Path, text: str, told: str
) -> None:
    path = tmp_path / "suite" / "examples" / "os" / "make-a-folder.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert told in refused("up", SMOKE, f"--tasks.suite={tmp_path / 'suite'}", '--tasks.tasks=["make-a-folder"]')
    assert not run_folder.exists(), "so the mended file starts a run of the same name"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (('--tasks.tasks=["nope"]',), "no task nope; choose from its"),
        (("--tasks.suite=/nonexistent",), "/nonexistent: holds no examples"),
        (("--tasks.tasks=[]", "--tasks.list=/nonexistent"), "/nonexistent: cannot be read"),
        (("--model.build=null", "--model.path=/nonexistent"), "/nonexistent: no such folder; set model.path"),
        (("--agent.image_width=500",), "the tiny model cannot see screenshots of 500 x 280"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named(
    refused: Refused, run_folder: Path, options: tuple[str, ...], told: str
) -> None:
    assert told in refused("up", SMOKE, *options)
    assert not run_folder.exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files of a model and its processor, as far as a glance can tell."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.safetensors", "lacks weights (*.safetensors)"),
        ("preprocessor_config.json", "lacks an image processor (preprocessor_config.json or processor_config.json)"),
        ("tokenizer.json", "lacks a tokenizer (tokenizer.json)"),
    ],
)
def test_a_model_that_lacks_its_processor_or_weights_is_refused(
    refused: Refused, run_folder: Path, model: Path, name: str, told: str
) -> None:
    (model / name).unlink()
    line = refused("up", SMOKE, "--model.build=null", f"--model.path={model}")
    assert f"{model} {told}; copy it from the original model" in line
    assert not run_folder.exists()


# What an earlier run left.


@pytest.fixture
def begun(run_folder: Path) -> Path:
    """The folder of a run that was cut short while it learnt."""
    shutil.rmtree(run_folder, ignore_errors=True)
    for name in ("replay", "checkpoints", "logs", "model", "results"):
        (run_folder / name).mkdir(parents=True)
    (run_folder / "supervisor.json").write_text('{"state": "running", "started_unix_s": 1.0}')
    (run_folder / "metrics.jsonl").write_text('{"kind": "phase", "phase": "training"}\n')
    (run_folder / "model" / "config.json").write_text("{}")
    return run_folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["config.json", "supervisor.json"])
def test_a_run_whose_own_files_are_damaged_is_refused(refused: Refused, begun: Path, file: str) -> None:
    (begun / file).write_text("{")
    before = contents(begun)
    assert str(begun / file) in refused("up", SMOKE)
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (None, "it is no checkpoint of a learner"),
        ("{", "it is no checkpoint of a learner"),
        ({"schema": 99}, "it was written by another version of deskrl (schema 99)"),
        ({"files": {"model.safetensors": 10**6}}, "model.safetensors is missing or cut short"),
        ({"layout": {"learner.num_processes": 8}}, "was written with learner.num_processes = 8, this run has 1"),
    ],
)
def test_a_checkpoint_that_is_unreadable_or_foreign_is_refused_before_anything_starts(
    refused: Refused, begun: Path, record: Any, told: str
) -> None:
    checkpoint = begun / "checkpoints" / "epoch_3"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(1000))
    if record is not None:
        whole = {"schema": 1, "num_updates": 3, "layout": {}, "files": {}, "state": {}}
        text = record if isinstance(record, str) else json.dumps({**whole, **record})
        (checkpoint / "learner.json").write_text(text)
    before = contents(begun)
    assert told in refused("up", SMOKE)
    assert contents(begun) == before


def test_a_truncated_database_ends_the_run_with_the_line_of_replay(refused: Refused, run_folder: Path) -> None:
    (run_folder / "replay").mkdir(parents=True)
    path = run_folder / "replay" / "replay.sqlite"
    open_database(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for seed in (1, 2):  # nothing was learnt yet, so a configuration that was changed in between is as good
        line = refused("up", SMOKE, f"--seed={seed}")
        assert line.startswith(f"deskrl: replay: {path} ") and "; restore the file from a copy" in line
    assert path.read_bytes() == whole[: len(whole) // 2]


def test_a_database_of_something_else_is_left_as_it_is(refused: Refused, run_folder: Path) -> None:
    (run_folder / "replay").mkdir(parents=True)
    path = run_folder / "replay" / "replay.sqlite"
    with closing(sqlite3.connect(path)) as foreign:
        foreign.execute("CREATE TABLE photographs (id INTEGER)")
    before = path.read_bytes()
    assert f"{path} is a database of something else" in refused("up", SMOKE)
    assert path.read_bytes() == before


def test_a_refusal_of_ranks_that_torchrun_started_has_its_status_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    dump_config(RunConfig.model_validate({"runs": tmp_path, "learner": {"num_processes": 2}}), path)
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "deskrl.core.cli", "learner", str(path)]
    environment = os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert list(temporary.iterdir()) == []
    told = {line for line in ended.stderr.splitlines() if line.startswith("deskrl: ")}
    (line,) = told
    assert f"{tmp_path / 'run' / 'tasks.json'} cannot be read" in line and "start the run with `deskrl up`" in line


# Another version of the contracts.


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[ReplayProcess]:
    config = {"runs": tmp_path, "name": "served", "replay": {"address": f"127.0.0.1:{free_port()}"}}
    process = ReplayProcess(RunConfig.model_validate(config))
    yield process
    process.close()


def test_an_actor_of_another_protocol_version_is_refused_and_says_so(refused: Refused, replay: ReplayProcess) -> None:
    line = refused(
        "actor", replay.config.folder / "config.json", prelude="from deskrl.core import rpc; rpc.PROTOCOL = 2"
    )
    assert "speaks protocol 2, this service 1; install the same version of deskrl on both sides" in line
    assert replay.process.poll() is None


def test_a_learner_of_another_protocol_version_is_refused(
    replay: ReplayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "PROTOCOL", 2)
    client = ReplayClient(replay.config.replay.address, "rank-0", StopEvent())
    with pytest.raises(UserError, match="speaks protocol 2, this service 1; install the same version"):
        next(client.take_groups("train", "train/0", [0], dropped=list, while_waiting=lambda: None))
    client.close()


def test_a_call_of_another_protocol_version_changes_nothing(replay: ReplayProcess) -> None:
    replay.client().plan("eval/0", num=1)
    stranger = rpc.peer("actor", "stranger")
    stranger.protocol = 2
    with rpc.connect_sync(replay.config.replay.address) as channel, pytest.raises(grpc.RpcError) as refusal:
        request = rollout_pb2.AcquireLeaseRequest(peer=stranger, request_id="one")
        rollout_pb2_grpc.RolloutServiceStub(channel).AcquireLease(request, timeout=10)
    assert refusal.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert replay.client().acquire().lease_id, "the work is still there"
