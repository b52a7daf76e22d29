"""One TOML file describes a run; what it does not know is refused with its dotted path."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.config import dump_config, load_config, read_resolved
from deskrl.core.errors import UserError
from deskrl.core.presets import PRESETS

RUNS = Path(__file__).parents[2] / "deploy" / "runs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_every_shipped_run_loads() -> None:
    for path in RUNS.glob("*.toml"):
        assert load_config(path).name == path.stem


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "seed = 1\n[learner.grpo]\nnum_updates = 1\nclip_low = 0.1\n")
    monkeypatch.setenv("DESKRL_SEED", "2")
    monkeypatch.setenv("DESKRL_LEARNER__GRPO__NUM_UPDATES", "2")
    config = load_config(path, ["--learner.grpo.num_updates", "3"])
    assert (config.learner.grpo.num_updates, config.seed, config.learner.grpo.clip_low) == (3, 2, 0.1)


def test_every_key_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    """What a shell hands over is text: a number that only a file can say would be refused there."""
    smoke = load_config(RUNS / "smoke.toml")
    arguments = [text for key, value in _leaves(smoke.model_dump(mode="json")) for text in (f"--{key}", value)]
    assert "--learner.zero_stage" in arguments
    assert load_config(write(tmp_path, ""), arguments).model_dump() == smoke.model_dump()


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def test_a_preset_gives_way_to_every_explicit_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 'preset = "arpo"\n[learner.grpo]\nclip_low = 0.1\n')
    grpo = load_config(path, ["--learner.grpo.dual_clip", "0"]).learner.grpo
    assert (grpo.clip_low, grpo.dual_clip) == (0.1, 0.0)
    assert (grpo.advantage, grpo.importance, grpo.max_staleness) == ("standardised", "off", 0)
    assert load_config(path, ["--preset", "deskrl"]).learner.grpo.advantage == "centred"
    monkeypatch.setenv("DESKRL_PRESET", "deskrl")
    assert load_config(path).learner.grpo.advantage == "centred"


def test_every_value_of_every_preset_fits_the_schema(tmp_path: Path) -> None:
    unnamed = load_config(write(tmp_path, ""))
    for name in PRESETS:
        assert load_config(write(tmp_path, f'preset = "{name}"')).preset == name
    assert load_config(write(tmp_path, 'preset = "deskrl"')).model_dump() == unnamed.model_dump()


def test_unknown_keys_are_all_named_with_their_path(tmp_path: Path) -> None:
    path = write(tmp_path, "sead = 1\n[learner.grpo]\nclip = 0.1\n")
    with pytest.raises(UserError, match=r"unknown key learner\.grpo\.clip.*unknown key sead|sead.*learner\.grpo\.clip"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[tasks]\nrollouts = 1\n", "tasks.rollouts"),
        ('[model]\npath = "m"\nbuild = "tiny"\n', "exactly one of model.path and model.build"),
        ("[learner\n", "not readable as TOML"),
        ('name = "../up"\n', "name"),
        ('preset = "apro"\n', "preset"),
        ("[learner.grpo]\ndual_clip = 0.9\n", "nor above 1"),
        ('[learner]\ndtype = "float16"\nzero_stage = 0\n', "learner: the dtype float16 needs zero_stage 1"),
        ('[inference]\nexternal_url = "localhost"\n', "localhost is no address such as http://"),
        ('[inference]\nexternal_url = "http://a/v1"\n', "external_url and external_model go together"),
    ],
)
def test_contradictions_are_refused_with_their_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason.replace(".", r"\.")):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file; name a run configuration"):
        load_config(Path("nowhere.toml"))


def test_the_resolved_configuration_reads_back_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(RUNS / "smoke.toml", ["--seed", "7"])
    dump_config(config, tmp_path / "config.json")
    monkeypatch.setenv("DESKRL_SEED", "8")
    assert read_resolved(tmp_path / "config.json").model_dump() == config.model_dump()


def test_a_refused_key_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = write(tmp_path, "nmae = 'x'\n")
    command = [sys.executable, "-m", "deskrl.core.cli", "up", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [f"deskrl: {path}: unknown key nmae; mend the key, or remove it"]


def test_the_command_line_imports_no_engine() -> None:
    program = (
        "import sys, deskrl.core.cli, deskrl.core.running.up\n"
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'transformers', 'docker') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
