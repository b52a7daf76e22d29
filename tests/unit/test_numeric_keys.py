"""Numbers in TOML files, options and ARPO's files: sane ones are accepted, all others rejected in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from deskrl.analysis.explain.explanation import build_explanation
from deskrl.analysis.explain.update_time import Assumptions
from deskrl.cli.main import main
from deskrl.core.config import RunConfig, load_config, value_problem
from deskrl.core.errors import UserError
from deskrl.launch import preflight
from deskrl.launch.arpo import load_arpo
from deskrl.launch.arpo.keys import KEYS, Copied, Derived, Fixed

ARPO_MODEL = "--model.build", "tiny"
_SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def numeric_keys(schema: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all numbers and lists of numbers."""
    for name, field in schema.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        kinds |= {inner for kind in kinds for inner in get_args(kind)}
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numeric_keys(kind, f"{prefix}{name}.")
        if kinds & {int, float}:
            yield prefix + name


NUMERIC = sorted(set(numeric_keys()))
NUMERIC_ARPO = sorted(
    key
    for key, rule in KEYS.items()
    if (isinstance(rule, Copied | Derived) and rule.kind in (int, float, list))
    or (isinstance(rule, Fixed) and any(isinstance(it, int | float | list) for it in rule.accepted))
)
ENGINE_ARGS = ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "seed", "cpu_offload_gb", "block_size")
ODD = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e308, 5e-324, math.inf, -math.inf]),
    st.sampled_from(
        [math.nan, True, "", "inf", "nan", "-1", "1e400", "0x10", "１２", "1_000", "7 ", "null", "9" * 5000]
    ),
    st.integers(),
    st.floats(),
    st.lists(st.sampled_from([0, -1, 7, 1920, 1080, math.inf]), max_size=3),
)


def as_toml(value: Any) -> str:
    """Return a value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    return f"[{', '.join(map(as_toml, value))}]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """Return a value in YAML."""
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-", "-.")
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def check_outcome(load: Any, key: str) -> None:
    """Check that a configuration is accepted with sane numbers, or rejected in one line that names the key."""
    try:
        config = load()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        known = (*NUMERIC, *NUMERIC_ARPO, "inference.engine_args", "not readable as TOML", "not readable as YAML")
        assert key in str(error) or any(name in str(error) for name in known)
        return
    check_sane(config)
    try:
        preflight.check_consistency(config)
        build_explanation(config, [], Assumptions())
    except UserError as error:
        assert "\n" not in str(error)


def check_sane(config: RunConfig) -> None:
    """Check that all numbers of a configuration are finite and bounded."""

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, int | float):
            assert math.isfinite(value) and abs(value) <= 2**53

    walk(config.model_dump())
    assert config.num_actors >= 1 and config.inference.num_workers >= 1 and min(config.image_size) >= 1


def test_all_numbers_are_found() -> None:
    assert len(NUMERIC) > 80 and {"learner.grpo.learning_rate", "inference.devices", "desktop.docker.cpus"} < {*NUMERIC}
    assert {"env.screen_size", "data.max_pixels", "worker.actor.optim.lr"} < set(NUMERIC_ARPO)


def test_every_number_has_bounds() -> None:
    for key in NUMERIC:
        for value in (math.inf, -math.inf, math.nan, 10**400, -(10**400)):
            assert value_problem(key, value), f"{key} accepts {value}"
    for key, rule in KEYS.items():
        if isinstance(rule, Derived) and rule.kind in (int, float):
            assert rule.bounds is not None, key


@given(key=st.sampled_from(NUMERIC), value=ODD)
@example(key="learner.grpo.learning_rate", value=math.inf)
@example(key="seed", value=-1)
@_SETTINGS
def test_a_number_in_a_file_is_sane_or_rejected_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers.toml"
    section, _, name = key.rpartition(".")
    path.write_text((f"[{section}]\n" if section else "") + f"{name} = {as_toml(value)}\n", encoding="utf-8")
    check_outcome(lambda: load_config(path), key)


@given(key=st.sampled_from(NUMERIC), value=ODD)
@example(key="learner.grpo.learning_rate", value=math.inf)
@_SETTINGS
def test_a_number_in_an_option_is_sane_or_rejected_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "empty.toml"
    path.write_text("")
    text = value if isinstance(value, str) else as_toml(value)
    check_outcome(lambda: load_config(path, [f"--{key}={text}"]), key)


@given(name=st.sampled_from(ENGINE_ARGS), value=ODD)
@example(name="tensor_parallel_size", value=-1)
@_SETTINGS
def test_a_number_of_the_engine_is_sane_or_rejected_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "engine.toml"
    path.write_text(f"[inference.engine_args]\n{name} = {as_toml(value)}\n", encoding="utf-8")
    check_outcome(lambda: load_config(path), f"inference.engine_args.{name}")


@given(key=st.sampled_from(NUMERIC_ARPO), value=ODD)
@example(key="env.screen_size", value=[1920])
@example(key="env.screen_size", value=[0, 0])
@example(key="data.max_pixels", value=0)
@example(key="worker.actor.optim.lr", value=math.inf)
@example(key="worker.rollout.tensor_parallel_size", value=-1)
@example(key="data.rollout_batch_size", value=0)
@example(key="worker.actor.optim.lr_warmup_ratio", value=math.nan)
@example(key="trainer.total_episodes", value=-3)
@_SETTINGS
def test_a_number_of_arpo_is_sane_or_rejected_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "arpo"
    if not folder.exists():
        (folder / "examples" / "os").mkdir(parents=True)
        (folder / "tasks.json").write_text('{"os": ["a", "b"]}')
        for name in ("a", "b"):
            task = {"id": name, "instruction": "Do it.", "evaluator": {"func": "infeasible"}}
            (folder / "examples" / "os" / f"{name}.json").write_text(json.dumps(task))
    path = folder / "run.yaml"
    values: dict[str, Any] = {
        "algorithm.disable_kl": True,
        "data.rollout_batch_size": 2,
        "worker.actor.global_batch_size": 2,
    }
    values |= {
        "worker.rollout.n": 4,
        "data.train_files": str(folder / "tasks.json"),
        "trainer.use_cpu": True,
        "env.provider": "embedded",
    }
    path.write_text("".join(f"{name}: {as_yaml(stated)}\n" for name, stated in (values | {key: value}).items()))
    check_outcome(lambda: load_arpo(path, [*ARPO_MODEL])[0], key)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("env.screen_size: [1920]", "env.screen_size"),
        ("env.screen_size: [0, 0]", "env.screen_size"),
        ("env.screen_size: [1920, 1080, 3]", "env.screen_size"),
        ("data.max_pixels: 0", "data.max_pixels"),
        ("data.min_pixels: 99999999", "data.min_pixels"),
        ("worker.actor.optim.lr: .inf", "worker.actor.optim.lr"),
        ("worker.rollout.tensor_parallel_size: -1", "worker.rollout.tensor_parallel_size"),
        ("trainer.n_gpus_per_node: -8", "trainer.n_gpus_per_node"),
    ],
)
def test_a_rejected_number_is_named_by_the_key_of_its_file(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{key} = .*hint: .*{key}"):
        load_arpo(path, [*ARPO_MODEL])


@pytest.mark.parametrize(
    "arguments",
    [
        ["top", "runs/x", "--interval", "nan"],
        ["top", "runs/x", "--interval", "0"],
        ["top", "runs/x", "--frames", "-1"],
        ["view", "runs/x", "--port", "65536"],
        ["view", "runs/x", "--port", "-1"],
        ["actor", "run.toml", "--index", "-1"],
        ["inference", "run.toml", "--index", "1e3"],
        ["certificates", "folder", "--days", "999999999999"],
        ["explain", "run.toml", "--utilisation", "0"],
        ["explain", "run.toml", "--gpu-tflops", "inf"],
        ["explain", "run.toml", "--action-tokens", "-5"],
        ["explain", "run.toml", "--spread", "nan"],
    ],
)
def test_a_number_of_a_command_is_rejected_in_one_line_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("deskrl: ") and line.count("\n") == 1 and arguments[2] in line
