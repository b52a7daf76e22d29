"""The run configuration: sources and their precedence, rejected values, renamed keys, configurations of old runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.config import RunConfig, dump_config, load_config, read_resolved
from deskrl.core.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from deskrl.core.errors import UserError
from deskrl.core.presets import PRESETS
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_state import changed_keys, check_same_config

RUNS = Path(__file__).parents[2] / "deploy" / "runs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def error_of(path: Path, *arguments: str) -> str:
    """Return the text of the error with which a configuration is rejected."""
    with pytest.raises(UserError) as error:
        load_config(path, arguments)
    return str(error.value)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return a dotted key and its value as nested tables."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def old_resolved(path: Path, config: RunConfig) -> Path:
    """Write the resolved configuration as deskrl 0.1.0 did: with all old names and without a version."""
    values = json.loads(config.model_dump_json())
    for new_key, new_names in RENAMED_VALUES.items():
        *sections, name = new_key.split(".")
        table = value_at(values, ".".join(sections))
        old_names = {new: old for old, new in new_names.items()}
        table[name] = old_names.get(table[name], table[name])
    for old_key, new_key in RENAMED_KEYS.items():
        *sections, name = new_key.split(".")
        table = values
        for section in sections:
            table = table[section] or {}
        if name in table:
            table[old_key.rpartition(".")[2]] = table.pop(name)
    path.write_text(json.dumps(values))
    return path


# Sources.


def test_every_shipped_run_loads() -> None:
    for path in RUNS.glob("*.toml"):
        assert load_config(path).name == path.stem


def test_the_command_line_overrides_the_environment_and_the_environment_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "seed = 1\n[learner.grpo]\nnum_updates = 1\nclip_low = 0.1\n")
    monkeypatch.setenv("DESKRL_SEED", "2")
    monkeypatch.setenv("DESKRL_LEARNER__GRPO__NUM_UPDATES", "2")
    config = load_config(path, ["--learner.grpo.num_updates", "3"])
    assert (config.learner.grpo.num_updates, config.seed, config.learner.grpo.clip_low) == (3, 2, 0.1)


def test_every_key_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    """A shell passes text, so a type that cannot be parsed from text would be rejected there."""
    smoke = load_config(RUNS / "smoke.toml")
    arguments = [text for key, value in leaves(smoke.model_dump(mode="json")) for text in (f"--{key}", value)]
    assert "--learner.zero_stage" in arguments
    assert load_config(write(tmp_path, ""), arguments).model_dump() == smoke.model_dump()


def test_entries_of_a_table_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, '[reward.terms.brief]\nkind = "m:f"\nweight = 2\n')
    arguments = ["--reward.terms.brief.weight", "0.5", "--reward.terms.task.kind=evaluators", "--seed", "3"]
    config = load_config(path, [*arguments, "--reward.terms.brief.options.path", "~/notes.txt"])
    brief, task = config.reward.terms["brief"], config.reward.terms["task"]
    assert (brief.kind, brief.weight, brief.options) == ("m:f", 0.5, {"path": "~/notes.txt"})
    assert (task.kind, config.seed) == ("evaluators", 3)
    with pytest.raises(UserError, match=r"reward\.terms\.brief\.weight: "):
        load_config(path, ["--reward.terms.brief.weight", "heavy"])


def test_other_terms_replace_the_default_term(tmp_path: Path) -> None:
    assert list(load_config(write(tmp_path, "")).reward.terms) == ["task"]
    config = load_config(write(tmp_path, '[reward.terms.brief]\nkind = "m:f"\n'))
    assert list(config.reward.terms) == ["brief"]


def test_explicit_keys_override_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 'preset = "arpo"\n[learner.grpo]\nclip_low = 0.1\n')
    grpo = load_config(path, ["--learner.grpo.dual_clip", "0"]).learner.grpo
    assert (grpo.clip_low, grpo.dual_clip) == (0.1, 0.0)
    assert (grpo.advantage, grpo.importance_weighting, grpo.max_staleness) == ("standardised", "off", 0)
    assert load_config(path, ["--preset", "deskrl"]).learner.grpo.advantage == "centred"
    monkeypatch.setenv("DESKRL_PRESET", "deskrl")
    assert load_config(path).learner.grpo.advantage == "centred"


def test_every_value_of_every_preset_is_valid(tmp_path: Path) -> None:
    unnamed = load_config(write(tmp_path, ""))
    for name in PRESETS:
        assert load_config(write(tmp_path, f'preset = "{name}"')).preset == name
    assert load_config(write(tmp_path, 'preset = "deskrl"')).model_dump() == unnamed.model_dump()


# Rejected configurations.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[tasks]\nnum_rollouts = 1\n", "tasks.num_rollouts: "),
        ('[model]\npath = "m"\nbuild = "tiny"\n', "exactly one of model.path and model.build"),
        ("[learner\n", "not readable as TOML"),
        ('name = "../up"\n', "name: "),
        ('preset = "apro"\n', "preset: "),
        ("[learner.grpo]\ndual_clip = 0.9\n", "learner.grpo.dual_clip: must be 0 (disabled) or above 1, not 0.9"),
        ("[learner.grpo]\nkl_coefficient = -0.1\n", "learner.grpo.kl_coefficient: Input should be greater"),
        ('[learner.grpo]\nkl_estimator = "k4"\n', "learner.grpo.kl_estimator: Input should be 'k1', 'k2'"),
        ("[learner.grpo]\nentropy_coefficient = -1\n", "learner.grpo.entropy_coefficient: Input should be greater"),
        ('[learner]\ndtype = "float16"\nzero_stage = 0\n', "learner: dtype float16 requires zero_stage 1"),
        ("[learner.lora]\nrank = -1\n", "learner.lora.rank: "),
        ("[learner.lora]\nrank = 8\nalpha = 0\n", "learner.lora.alpha: "),
        ("[learner.lora]\nrank = 8\ntargets = []\n", "targets and vision_targets are both empty"),
        ("[learner]\nzero_stage = 0\n[learner.lora]\nrank = 8\n", "learner: lora.rank requires zero_stage 1, 2 or 3"),
        (
            '[learner]\nfreeze_vision = true\n[learner.lora]\nrank = 8\nvision_targets = ["qkv"]\n',
            "learner: lora.vision_targets and freeze_vision contradict each other",
        ),
        ('[inference]\nexternal_url = "localhost"\n', "must be a URL, such as http://host:9000/v1, not 'localhost'"),
        ('[inference]\nexternal_url = "http://a/v1"\n', "external_url and external_model must be set together"),
        ('[replay]\naddress = "localhost"\n', "replay.address: localhost has no port"),
        ('[desktop.docker]\nnetwork = "host"\n', "desktop.docker.network: must not be host"),
        ('[tasks]\nlist = "a.json"\nids = ["b"]\n', "set either tasks.list, or tasks.suite and tasks.ids"),
        ('[tasks]\nsuffix = "_noise"\n', "require tasks.list, which is not set"),
    ],
)
def test_invalid_values_are_rejected_with_their_key_and_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    error = error_of(write(tmp_path, text))
    assert reason in error and error.startswith(f"{tmp_path / 'run.toml'}: ") and " (hint: " in error


def test_a_missing_file_is_reported() -> None:
    assert error_of(Path("nowhere.toml")).startswith("nowhere.toml: not found (hint: give a run configuration")


def test_all_unknown_keys_are_reported_with_their_path(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, "sead = 1\n[learner.grpo]\nclip = 0.1\n"))
    assert "sead: unknown key" in error and "learner.grpo.clip: unknown key" in error


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sead = 1", "did you mean seed"),
        ("[learner.grpo]\nnum_minibatch = 2", "did you mean learner.grpo.num_minibatches"),
        ("[learner]\nseed = 2", "did you mean seed"),
        ("[learner]\nlearning_rate = 1", "did you mean learner.grpo.learning_rate or learner.warm_start.learning_rate"),
        ("photograph = 1", "correct or remove the key"),
    ],
)
def test_the_hint_for_an_unknown_key_names_similar_keys(tmp_path: Path, text: str, hint: str) -> None:
    assert error_of(write(tmp_path, text)).endswith(f": unknown key (hint: {hint})")


def test_an_unknown_option_is_reported_with_a_similar_key(tmp_path: Path) -> None:
    for arguments in (["--learner.grpo.num_updtes", "3"], ["--learner.grpo.num_updtes=3"]):
        error = error_of(write(tmp_path, ""), *arguments)
        assert error == "learner.grpo.num_updtes: unknown key (hint: did you mean learner.grpo.num_updates)"


# Renamed keys.

RENAMED = sorted(RENAMED_KEYS.items())


def test_every_renamed_key_has_a_new_key_that_exists() -> None:
    known = load_config(RUNS / "smoke.toml").model_dump(mode="json")
    for old_key, new_key in RENAMED:
        value_at(known, new_key)
        with pytest.raises(KeyError):
            value_at(known, old_key)
    assert {value_at(known, key) for key in RENAMED_VALUES}


@pytest.mark.parametrize(("old_key", "new_key"), RENAMED)
def test_an_old_key_in_a_file_is_rejected_with_the_new_one(tmp_path: Path, old_key: str, new_key: str) -> None:
    path = write(tmp_path, f"{old_key} = 2\n")
    assert error_of(path) == f"{path}: {old_key}: unknown key (hint: renamed to {new_key})"


@pytest.mark.parametrize(("old_key", "new_key"), RENAMED)
def test_an_old_key_in_the_environment_is_rejected_with_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_key: str, new_key: str
) -> None:
    monkeypatch.setenv("DESKRL_" + old_key.upper().replace(".", "__"), "2")
    assert error_of(write(tmp_path, "")).endswith(f": {old_key}: unknown key (hint: renamed to {new_key})")


@pytest.mark.parametrize(("old_key", "new_key"), RENAMED)
def test_an_old_key_as_an_option_is_rejected_with_the_new_one(tmp_path: Path, old_key: str, new_key: str) -> None:
    for arguments in ([f"--{old_key}", "2"], [f"--{old_key}=2"]):
        error = error_of(write(tmp_path, ""), *arguments)
        assert error == f"{old_key}: unknown key (hint: renamed to {new_key})"


def test_several_old_keys_are_reported_together(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, "tasks.rollouts = 2\nlearner.grpo.minibatches = 2\n"))
    assert "tasks.rollouts: renamed to tasks.num_rollouts" in error
    assert "learner.grpo.minibatches: renamed to learner.grpo.num_minibatches" in error


def test_an_old_value_is_rejected_with_the_new_one(tmp_path: Path) -> None:
    for key, names in RENAMED_VALUES.items():
        for old, new in names.items():
            error = error_of(write(tmp_path, f'{key} = "{old}"\n'))
            assert f": {key}: " in error and error.endswith(f"(hint: {old} was renamed to {new})")


def test_the_old_key_of_wandb_is_rejected_with_what_replaces_it(tmp_path: Path) -> None:
    hint = 'replaced by tracker = ["wandb"], with tracker_options.wandb.mode = "online" or "offline"'
    path = write(tmp_path, 'wandb = "offline"\n')
    assert error_of(path) == f"{path}: wandb: unknown key (hint: {hint})"
    assert error_of(write(tmp_path, ""), "--wandb", "online") == f"wandb: unknown key (hint: {hint})"


# Resolved configurations.


def test_the_resolved_configuration_is_read_back_regardless_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(RUNS / "smoke.toml", ["--seed", "7"])
    dump_config(config, tmp_path / "config.json")
    shortened = json.loads((tmp_path / "config.json").read_text())
    del shortened["learner"]["grpo"]["warmup_updates"]
    (tmp_path / "config.json").write_text(json.dumps(shortened))
    monkeypatch.setenv("DESKRL_SEED", "8")
    monkeypatch.setenv("DESKRL_LEARNER__GRPO__WARMUP_UPDATES", "8")
    assert read_resolved(tmp_path / "config.json").model_dump() == config.model_dump()


def test_the_resolved_configuration_records_the_version_of_deskrl(tmp_path: Path) -> None:
    from importlib.metadata import version

    dump_config(load_config(RUNS / "smoke.toml"), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["deskrl_version"] == version("deskrl")


@pytest.mark.parametrize("name", ["suite", "arpo-paper", "simulated", "h200x4"])
def test_the_resolved_configuration_of_an_old_run_is_translated(tmp_path: Path, name: str) -> None:
    config = load_config(RUNS / f"{name}.toml", ["--tasks.unmet_requirements", "run"])
    path = old_resolved(tmp_path / "config.json", config)
    text = path.read_text()
    assert '"minibatches"' in text and '"unplayable": "play"' in text and "num_minibatches" not in text
    assert read_resolved(path).model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("mode", "tracker", "options"),
    [
        ("off", (), {}),
        ("offline", ("wandb",), {"wandb": {"mode": "offline"}}),
        ("online", ("wandb",), {"wandb": {"mode": "online"}}),
    ],
)
def test_the_old_mode_of_wandb_in_a_resolved_configuration_becomes_a_tracker(
    tmp_path: Path, mode: str, tracker: tuple[str, ...], options: dict[str, Any]
) -> None:
    path = tmp_path / "config.json"
    dump_config(load_config(RUNS / "smoke.toml"), path)
    values = json.loads(path.read_text())
    del values["tracker"], values["tracker_options"]
    path.write_text(json.dumps(values | {"wandb": mode}))
    for config in (read_resolved(path), read_resolved(path, ["--seed", "3"])):
        assert (config.tracker, config.tracker_options) == (tracker, options)


def test_trackers_are_named_by_repeating_the_option(tmp_path: Path) -> None:
    options = ["--tracker", "wandb", "--tracker=mine:Tracker", "--tracker_options", '{"wandb": {"project": "p"}}']
    config = load_config(write(tmp_path, ""), options)
    assert (config.tracker, config.tracker_options) == (("wandb", "mine:Tracker"), {"wandb": {"project": "p"}})
    assert load_config(write(tmp_path, 'tracker = ["wandb"]\n'), ["--tracker", "[]"]).tracker == ()
    assert "a tracker is named twice" in error_of(write(tmp_path, 'tracker = ["wandb", "wandb"]\n'))


def test_an_old_run_can_be_resumed_with_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(RUNS / "suite.toml", ["--runs", str(tmp_path)])
    config.run_dir.mkdir()
    run_dir = RunDir(config.run_dir)
    old_resolved(run_dir.config, config)
    check_same_config(config, run_dir)
    changed = load_config(RUNS / "suite.toml", ["--runs", str(tmp_path), "--learner.grpo.num_minibatches", "4"])
    assert changed_keys(read_resolved(run_dir.config), changed) == ["learner.grpo.num_minibatches"]
    with pytest.raises(UserError, match=r"learner\.grpo\.num_minibatches"):
        check_same_config(changed, run_dir)


@pytest.mark.parametrize(("version", "named"), [(None, "0.1.0 or earlier"), ("9.8.7", "9.8.7")])
def test_an_unknown_key_in_a_resolved_configuration_is_rejected_with_the_version_that_wrote_it(
    tmp_path: Path, version: str | None, named: str
) -> None:
    path = tmp_path / "config.json"
    dump_config(load_config(RUNS / "smoke.toml"), path)
    values = json.loads(path.read_text()) | {"photograph": 1, "deskrl_version": version}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UserError) as error:
        read_resolved(path)
    line = str(error.value)
    assert line.startswith(f"{path}: photograph: unknown key") and f"written by deskrl {named}" in line
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": "many"}'])
def test_a_damaged_resolved_configuration_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read_resolved(path)


# At the shell.


def test_an_old_key_is_rejected_in_one_line_with_status_2(tmp_path: Path) -> None:
    path = write(tmp_path, "[learner.grpo]\nminibatches = 2\n")
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    expected = "learner.grpo.minibatches: unknown key (hint: renamed to learner.grpo.num_minibatches)"
    assert result.stderr.strip().splitlines() == [f"deskrl: {path}: {expected}"]


def test_the_command_line_imports_no_engine() -> None:
    program = (
        "import sys, deskrl.cli.main, deskrl.launch.up\n"
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'transformers', 'docker') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
