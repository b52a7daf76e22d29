"""Translation of ARPO's YAML files and overrides into run configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.launch.arpo.keys import KEYS, Copied, Derived, Fixed, rule_of
from deskrl.launch.arpo.load import load_arpo
from deskrl.launch.arpo.translate import ArpoValues

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld"
FILES = sorted((OSWORLD / "arpo_configs").glob("*.yaml"))
needs_files = pytest.mark.skipif(not FILES, reason=f"ARPO's configurations are missing: {OSWORLD}/arpo_configs")

SMALL: dict[str, Any] = {
    "data": {"train_files": "list.json", "rollout_batch_size": 2, "seed": 7},
    "algorithm": {"disable_kl": True},
    "worker": {
        "actor": {"global_batch_size": 1, "optim": {"lr_warmup_ratio": 0.05}, "model": {"model_path": "UI-TARS-2B"}},
        "rollout": {"n": 8, "limit_images": 15},
    },
    "env": {"provider": "embedded"},
    "trainer": {"total_episodes": 15, "experiment_name": "small"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directory with a list of 32 tasks, their files, and an ARPO configuration in a subdirectory."""
    import json

    ids = [f"t{number}" for number in range(32)]
    (tmp_path / "list.json").write_text(json.dumps({"os": ids}))
    for name in ids:
        task = {"id": name, "instruction": "Do it.", "evaluator": {"func": "infeasible"}}
        path = tmp_path / "examples" / "os" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def load(folder: Path, *arguments: str, **how: Any) -> RunConfig:
    return load_arpo(folder / "configs" / "small.yaml", arguments, **how)[0]


def error_of(folder: Path, *arguments: str, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        load(folder, *arguments, **how)
    return str(error.value)


def test_batch_sizes_and_epochs_are_those_of_arpo(folder: Path) -> None:
    """ARPO with 32 tasks: batches of 2 x 8, 2 optimizer steps, 16 batches per epoch, 240 updates, 12 to warm up."""
    config = load(folder)
    grpo = config.learner.grpo
    assert (grpo.groups_per_batch, config.tasks.num_rollouts, grpo.num_minibatches) == (2, 8, 2)
    assert (grpo.num_updates, grpo.warmup_updates) == (240, 12)
    assert (config.preset, grpo.advantage, grpo.dual_clip, grpo.max_staleness) == ("arpo", "standardised", 3.0, 0)
    assert config.tasks.list == folder / "list.json"
    assert (config.name, config.seed, config.tasks.max_steps) == ("small", 7, 15)
    assert config.agent.context == "episode"
    assert (config.desktop.width, config.desktop.height, config.desktop.num_envs) == (1920, 1080, 32)
    assert config.learner.eval.num_episodes == 32


def test_dotted_overrides_override_the_file_and_options_override_both(folder: Path) -> None:
    overrides = ["worker.actor.clip_ratio_high=0.4", "algorithm.enable_replay=False", "env.num_envs=2"]
    config = load(folder, *overrides, "worker.actor.optim.lr=2e-6", "--desktop.num_envs", "3")
    assert (config.learner.grpo.clip_high, config.learner.grpo.learning_rate) == (0.4, 2e-6)
    assert not config.learner.grpo.use_success_buffer
    assert config.desktop.num_envs == 3


def test_the_provider_docker_of_arpo_is_osworlds_virtual_machine_and_the_default(folder: Path) -> None:
    for override in ("env.provider=docker", "env.provider=null"):
        assert load(folder, override).desktop.provider == "osworld"


def test_the_provider_vmware_of_arpo_is_translated(folder: Path) -> None:
    config = load(folder, "env.provider=vmware", "--desktop.vmware.machines", '["Ubuntu.vmx"]')
    assert (config.desktop.provider, config.desktop.vmware.machines) == ("vmware", (Path("Ubuntu.vmx"),))


def test_a_limit_of_images_below_the_number_of_steps_becomes_a_window(folder: Path) -> None:
    config = load(folder, "worker.rollout.limit_images=10", "env.max_steps=16")
    assert (config.agent.context, config.agent.window_images, config.inference.max_images) == ("window", 10, 10)


def test_screenshots_are_resized_only_if_arpo_resizes_them(folder: Path) -> None:
    assert load(folder, "data.max_pixels=2116800", "data.min_pixels=3136").agent.image_width is None
    shrunk = load(folder, "data.max_pixels=400000", "data.min_pixels=3136").agent
    assert (shrunk.image_width, shrunk.image_height) == (840, 448)


def test_without_gpus_the_run_computes_in_float32(folder: Path) -> None:
    config = load(folder, "trainer.n_gpus_per_node=0", "worker.rollout.gpu_memory_utilization=0.0")
    assert (config.learner.dtype, config.inference.dtype, config.learner.num_processes) == ("float32", "float32", 1)
    assert config.inference.kv_cache_bytes is not None


def test_several_gpus_are_divided_between_learner_and_inference(folder: Path) -> None:
    config = load(folder, "trainer.n_gpus_per_node=8", "worker.rollout.tensor_parallel_size=2")
    assert (config.learner.num_processes, config.learner.devices) == (4, (0, 1, 2, 3))
    assert (config.inference.num_replicas, config.inference.devices) == (2, (4, 5, 6, 7))
    assert load(folder, "trainer.n_gpus_per_node=1").learner.devices == ()


def test_gpus_of_several_nodes_are_counted_and_their_numbers_left_to_the_launcher(folder: Path) -> None:
    config = load(folder, "trainer.nnodes=2", "trainer.n_gpus_per_node=8")
    assert (config.learner.num_nodes, config.learner.num_processes, config.learner.num_ranks) == (2, 4, 8)
    assert config.inference.num_replicas == 8
    assert config.learner.devices == config.inference.devices == ()


def test_notes_state_the_outcome_and_the_value_of_each_key(folder: Path) -> None:
    arguments = ["--desktop.num_envs", "3", "env.num_envs=2", "worker.rollout.name=vllm", "worker.ref.strategy=fsdp"]
    outcome = {note.key: note.outcome for note in load_arpo(folder / "configs" / "small.yaml", arguments)[1]}
    assert outcome["env.num_envs"] == "desktop.num_envs = 3"
    assert outcome["worker.actor.optim.lr_warmup_ratio"] == "learner.grpo.warmup_updates = 12"
    assert outcome["worker.rollout.name"] == "no choice: vLLM serves the policy"
    assert outcome["worker.ref.strategy"].startswith("unused: the reference policy is sharded as the policy is")


def test_all_keys_that_cannot_be_translated_are_reported_together_with_hints(folder: Path) -> None:
    error = error_of(folder, "worker.rollout.n=1", "env.remote_server_url=http://h:15001", "worker.rollout.top_p=0.9")
    message, _, hint = error.partition(" (hint: ")
    assert "worker.rollout.n = 1: a single rollout in a group has no advantage" in message
    assert "env.remote_server_url = http://h:15001: that server has its own protocol" in message
    assert "worker.rollout.top_p = 0.9" in message
    assert {"set worker.rollout.n=2", "set env.remote_server_url=null"} < set(hint.removesuffix(")").split("; "))


def kl_of(config: RunConfig) -> tuple[float, str, str]:
    grpo = config.learner.grpo
    return grpo.kl_coefficient, grpo.kl_estimator, grpo.kl_applied_to


def test_the_kl_penalty_of_arpo_is_translated(folder: Path) -> None:
    assert load(folder).learner.grpo.kl_coefficient == 0, "algorithm.disable_kl is true in the file"
    for override in ("algorithm.disable_kl=False", "algorithm.disable_kl=null"):
        assert kl_of(load(folder, override)) == (1e-3, "k1", "reward"), "ARPO's defaults"
    overrides = ["algorithm.disable_kl=False", "algorithm.use_kl_loss=True", "algorithm.kl_coef=1.0e-2"]
    for name, estimator in (("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"), ("abs", "abs")):
        config = load(folder, *overrides, f"algorithm.kl_penalty={name}", "algorithm.kl_type=adaptive")
        assert kl_of(config) == (1e-2, estimator, "loss")
    assert load(folder, *overrides, "worker.ref.fsdp.enable_cpu_offload=True").learner.offload_reference
    assert not load(folder, "worker.ref.fsdp.enable_cpu_offload=True").learner.offload_reference


def test_a_kl_penalty_that_cannot_be_translated_is_rejected_only_if_it_has_an_effect(folder: Path) -> None:
    full, adaptive = "algorithm.kl_penalty=full", "algorithm.kl_type=adaptive"
    assert load(folder, full, adaptive).learner.grpo.kl_coefficient == 0
    error = error_of(folder, "algorithm.disable_kl=False", full, adaptive)
    assert "algorithm.kl_penalty = full: the KL divergence is estimated by one of kl, abs, mse, low_var_kl" in error
    assert "algorithm.kl_type = adaptive: the weight of the KL penalty is constant" in error
    options = ["--learner.grpo.kl_estimator", "k2", "--learner.grpo.kl_coefficient", "0.5"]
    assert kl_of(load(folder, "algorithm.disable_kl=False", full, adaptive, *options)) == (0.5, "k2", "reward")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm.enable_reply=True", "ARPO has no such key (hint: did you mean algorithm.enable_replay)"),
        ("worker.rollout.n=two", "worker.rollout.n = two: must be a whole number"),
        ("worker.actor.clip_ratio_high=True", "must be a number"),
        ("algorithm.kl_coef=-0.1", "algorithm.kl_coef = -0.1: must be from 0 to"),
        ("data.train_files=gone.json", "data.train_files = gone.json: not found"),
        ("data.rollout_batch_size=64", "more than the 32 tasks of the list"),
        ("worker.actor.global_batch_size=3", "does not divide data.rollout_batch_size = 2"),
        ("worker.actor.model.model_path=null", "no model is set"),
        ("trainer.nnodes=0", "trainer.nnodes = 0: Input should be greater"),
        ("worker.actor.clip_ratio_high=-1", "worker.actor.clip_ratio_high = -1: Input should be greater"),
    ],
)
def test_values_that_cannot_be_translated_are_rejected(folder: Path, override: str, expected: str) -> None:
    assert expected in error_of(folder, override)


def test_an_option_of_deskrl_overrides_a_value_that_would_be_rejected(folder: Path) -> None:
    assert load(folder, "worker.rollout.n=1", "--tasks.num_rollouts", "4").tasks.num_rollouts == 4
    assert load(folder, "--model.build", "tiny").model.path is None


def test_a_run_resumes_from_its_newest_checkpoint_only(folder: Path) -> None:
    runs, key = ["--runs", str(folder / "runs")], "trainer.load_checkpoint_path="
    assert "no such checkpoint" in error_of(folder, f"{key}checkpoints/latest", *runs)
    assert load(folder, f"{key}checkpoints/latest", *runs, must_resume=False).name == "small"
    checkpoints = folder / "runs" / "small" / "checkpoints"
    for name in ("epoch_0", "epoch_1"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "latest").symlink_to("epoch_1")
    for name in ("latest", "epoch_1"):
        assert load(folder, f"{key}checkpoints/{name}", *runs).model.path == Path("UI-TARS-2B")
    assert "its newest checkpoint" in error_of(folder, f"{key}checkpoints/epoch_0", *runs)


def test_training_can_start_from_the_weights_of_another_run(folder: Path) -> None:
    other = folder / "other" / "global_step_8"
    other.mkdir(parents=True)
    assert "FSDP" in error_of(folder, f"trainer.load_checkpoint_path={other}")
    (other / "config.json").write_text("{}")
    assert load(folder, f"trainer.load_checkpoint_path={other}").model.path == other


def test_a_file_that_is_not_a_configuration_is_rejected(tmp_path: Path) -> None:
    for name, content, expected in (("a.yaml", "a: [", "not readable as YAML"), ("b.yaml", "3", "has no keys")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=expected):
            load_arpo(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_arpo(tmp_path / "gone.yaml")


def test_every_target_key_exists_and_every_default_has_its_type() -> None:
    schema = RunConfig.model_json_schema()
    for key, rule in KEYS.items():
        if isinstance(rule, Copied | Derived):
            ArpoValues({key: rule.default})
        target = rule.target if isinstance(rule, Copied | Derived) else ""
        assert not target or exists(schema, target), (key, target)
        assert not isinstance(rule, Fixed) or rule.accepted


def test_every_derived_key_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    value_of = ArpoValues.__getitem__

    def record(self: ArpoValues, key: str) -> Any:
        read.add(key)
        return value_of(self, key)

    monkeypatch.setattr(ArpoValues, "__getitem__", record)
    load(folder, "algorithm.disable_kl=False")
    # `load` reads this one, which is a directory.
    assert {key for key, rule in KEYS.items() if isinstance(rule, Derived)} - read == {"trainer.load_checkpoint_path"}


def exists(schema: dict[str, Any], key: str) -> bool:
    """Return whether the schema has a dotted key; tables with free keys have all."""
    place: dict[str, Any] = schema
    for part in key.split("."):
        while "$ref" in place:
            place = schema["$defs"][place["$ref"].rsplit("/", 1)[1]]
        if "properties" not in place:
            return place.get("additionalProperties", False) is not False
        if part not in place["properties"]:
            return False
        place = place["properties"][part]
    return True


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_published_configuration_is_known(path: Path) -> None:
    def leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
        nested = [
            leaves(v, f"{prefix}{k}.") if isinstance(v, dict) and v else [f"{prefix}{k}"] for k, v in table.items()
        ]
        return [key for keys in nested for key in keys]

    unknown = [key for key in leaves(yaml.safe_load(path.read_text())) if rule_of(key) is None]
    assert not unknown


OFFENDING = {
    "config_uitars_2b_mac": ["worker.rollout.n", "worker.rollout.use_external_server", "data.train_files"],
    "config_uitars_2b_mac_seed001_version": ["worker.rollout.n", "data.train_files"],
    "smoke_8gpu": ["data.rollout_batch_size"],
    "smoke_remote_env": ["env.remote_server_url", "worker.actor.global_batch_size"],
    "smoke_remote_env_tunnel": ["env.remote_server_url", "worker.actor.global_batch_size"],
    "wandb_config": ["worker.rollout.n", "data.train_files"],
}
OVERRIDDEN = ("worker.actor.model.model_path=UI-TARS-1.5-7B", "env.provider=embedded")
CORRECTED = (
    *OVERRIDDEN,
    "worker.rollout.n=2",
    "worker.rollout.use_external_server=false",
    "env.remote_server_url=null",
    "data.rollout_batch_size=4",
    "worker.actor.global_batch_size=4",
    f"data.train_files={OSWORLD}/evaluation_examples/train_all_128.json",
)


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_model_and_provider_a_published_configuration_loads_or_reports_each_offending_key(path: Path) -> None:
    offending = OFFENDING.get(path.stem, [])
    if not offending:
        assert load_arpo(path, OVERRIDDEN)[0].preset == "arpo"
        return
    with pytest.raises(UserError) as error:
        load_arpo(path, OVERRIDDEN)
    assert all(f"{key} = " in str(error.value) for key in offending)


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_the_hints_applied_every_published_configuration_loads(path: Path) -> None:
    config, notes = load_arpo(path, CORRECTED)
    assert (config.tasks.num_rollouts, config.learner.grpo.groups_per_batch, config.learner.grpo.num_minibatches) == (
        2,
        4,
        1,
    )
    assert all(note.outcome for note in notes)
