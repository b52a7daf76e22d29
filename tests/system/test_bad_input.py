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
from replay_kit import ReplayProcess

from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.learner.replay_client import ReplayClient
from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc
from deskrl.replay.schema import open_database

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
TASK = json.loads(
    next(Path(__file__).parents[2].glob("actor/deskrl/actor/suite/examples/*/make-a-folder.json")).read_text()
)

Refused = Callable[..., str]


@pytest.fixture
def ports(free_port: Callable[[], int]) -> list[str]:
    """Addresses that nobody listens on, as options."""
    return [f"--replay.address=127.0.0.1:{free_port()}", f"--inference.address=127.0.0.1:{free_port()}"]


@pytest.fixture
def refused(tmp_path: Path, ports: list[str]) -> Refused:
    """`refused("up", SMOKE, "--seed", "x")` runs the command, holds it to its manners and returns the one line.

    `up` runs in `tmp_path/runs`, on free ports; options that are given win over these.
    """

    def refused(command: str, *arguments: object, environment: Mapping[str, str] | None = None, prelude: str = "") -> str:
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
        ("[replay]\naddress = 'localhost'\n", "replay.address: localhost is no host:port such as 127.0.0.1:7411"),
        ("[inference]\naddress = '127.0.0.1:x'\n", "inference.address: 127.0.0.1:x is no host:port"),
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
    overridden = text.partition("address = '")[2] and text.split("]")[0].strip("[")
    options = [f"--{overridden}.address={text.partition(chr(39))[2].partition(chr(39))[0]}"] if overridden else []
    assert told in refused("up", path, *options)
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("up", SMOKE, "--learner.grpo.num_updtes", "3"), "--learner.grpo.num_updtes"),
        (("up", SMOKE, "twice"), "twice"),
        (("up", "nowhere.toml"), "nowhere.toml: no such file; name a run configuration"),
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
