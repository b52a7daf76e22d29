"""ARPO's YAML files and overrides as runs of deskrl: carried over, left unused for a reason, or refused with a mend."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deskrl.core.arpo.keys import KEYS, Carried, Fixed, Read, rule_of
from deskrl.core.arpo.load import load_arpo
from deskrl.core.arpo.translate import ArpoValues
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld"
FILES = sorted((OSWORLD / "arpo_configs").glob("*.yaml"))
needs_files = pytest.mark.skipif(not FILES, reason=f"ARPO's configurations are not at {OSWORLD}/arpo_configs")

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
    """A list of 32 tasks with its files, and a configuration below it that names it."""
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


def refusal_of(folder: Path, *arguments: str, **how: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(folder, *arguments, **how)
    return str(refused.value)


def test_batches_and_epochs_are_arpos(folder: Path) -> None:
    """Its 32-task run: 2 tasks x 8 a batch, 2 optimizer steps, 16 batches an epoch, 240 in all, 12 to warm up."""
    config = load(folder)
    grpo = config.learner.grpo
    assert (grpo.groups_per_batch, config.tasks.rollouts, grpo.minibatches) == (2, 8, 2)
    assert (grpo.num_updates, grpo.warmup_updates) == (240, 12)
    assert (config.preset, grpo.advantage, grpo.dual_clip, grpo.max_staleness) == ("arpo", "standardised", 3.0, 0)
    assert config.tasks.list == folder / "list.json"
    assert (config.name, config.seed, config.tasks.max_steps) == ("small", 7, 15)
    assert config.agent.context == "episode"
    assert (config.desktop.width, config.desktop.height, config.desktop.num_envs) == (1920, 1080, 32)
    assert config.learner.eval.episodes == 32


def test_dotted_overrides_win_over_the_file_and_options_over_both(folder: Path) -> None:
    overrides = ["worker.actor.clip_ratio_high=0.4", "algorithm.enable_replay=False", "env.num_envs=2"]
    config = load(folder, *overrides, "worker.actor.optim.lr=2e-6", "--desktop.num_envs", "3")
    assert (config.learner.grpo.clip_high, config.learner.grpo.learning_rate) == (0.4, 2e-6)
    assert not config.learner.grpo.replay_successes
    assert config.desktop.num_envs == 3


def test_arpos_docker_is_osworlds_virtual_machine_and_its_default(folder: Path) -> None:
    for override in ("env.provider=docker", "env.provider=null"):
        assert load(folder, override).desktop.provider == "osworld"


def test_arpos_vmware_is_the_provider_of_that_name(folder: Path) -> None:
    config = load(folder, "env.provider=vmware", "--desktop.vmware.machines", '["Ubuntu.vmx"]')
    assert (config.desktop.provider, config.desktop.vmware.machines) == ("vmware", (Path("Ubuntu.vmx"),))


def test_more_steps_than_images_become_a_window(folder: Path) -> None:
    config = load(folder, "worker.rollout.limit_images=10", "env.max_steps=16")
    assert (config.agent.context, config.agent.window_images, config.inference.max_images) == ("window", 10, 10)


def test_screens_are_shrunk_only_where_arpo_shrinks_them(folder: Path) -> None:
    assert load(folder, "data.max_pixels=2116800", "data.min_pixels=3136").agent.image_width is None
    shrunk = load(folder, "data.max_pixels=400000", "data.min_pixels=3136").agent
    assert (shrunk.image_width, shrunk.image_height) == (840, 448)


def test_a_machine_without_gpu_computes_in_float32(folder: Path) -> None:
    config = load(folder, "trainer.n_gpus_per_node=0", "worker.rollout.gpu_memory_utilization=0.0")
    assert (config.learner.dtype, config.inference.dtype, config.learner.num_processes) == ("float32", "float32", 1)
    assert config.inference.kv_cache_bytes is not None


def test_several_gpus_are_halved_between_learning_and_serving(folder: Path) -> None:
    config = load(folder, "trainer.n_gpus_per_node=8", "worker.rollout.tensor_parallel_size=2")
    assert (config.learner.num_processes, config.learner.devices) == (4, (0, 1, 2, 3))
    assert (config.inference.num_replicas, config.inference.devices) == (2, (4, 5, 6, 7))
    assert load(folder, "trainer.n_gpus_per_node=1").learner.devices == ()


def test_what_became_of_each_stated_key_is_told_with_its_value(folder: Path) -> None:
    arguments = ["--desktop.num_envs", "3", "env.num_envs=2", "worker.rollout.name=vllm", "worker.ref.strategy=fsdp"]
    became = {note.key: note.became for note in load_arpo(folder / "configs" / "small.yaml", arguments)[1]}
    assert became["env.num_envs"] == "desktop.num_envs = 3"
    assert became["worker.actor.optim.lr_warmup_ratio"] == "learner.grpo.warmup_updates = 12"
    assert became["worker.rollout.name"] == "as it is: vLLM serves the policy"
    assert became["worker.ref.strategy"] == "unused: without KL there is no reference model"


def test_every_offending_key_is_named_with_its_mend_at_once(folder: Path) -> None:
    told = refusal_of(folder, "worker.rollout.n=1", "env.remote_server_url=http://h:15001", "worker.rollout.top_p=0.9")
    assert "worker.rollout.n = 1: one rollout a group has no advantage (mend: worker.rollout.n=2)" in told
    assert "env.remote_server_url = http://h:15001: that server speaks a protocol of its own" in told
    assert "(mend: env.remote_server_url=null)" in told
    assert "worker.rollout.top_p = 0.9" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm.enable_reply=True", "ARPO has no such key (mend: algorithm.enable_replay=…)"),
        ("worker.rollout.n=two", "worker.rollout.n = two: is not a whole number"),
        ("worker.actor.clip_ratio_high=True", "is not a number"),
        ("algorithm.disable_kl=False", "deskrl has no KL term"),
        ("algorithm.disable_kl=null", "deskrl has no KL term"),
        ("data.train_files=gone.json", "data.train_files = gone.json: no such file"),
        ("data.rollout_batch_size=64", "more than the 32 tasks of the list"),
        ("worker.actor.global_batch_size=3", "does not divide data.rollout_batch_size = 2"),
        ("worker.actor.model.model_path=null", "no model is named"),
        ("trainer.nnodes=2", "(mend: trainer.nnodes=1)"),
        ("worker.actor.clip_ratio_high=-1", "learner.grpo.clip_high"),
    ],
)
def test_what_fits_no_run_is_refused(folder: Path, override: str, told: str) -> None:
    assert told in refusal_of(folder, override)


def test_an_option_of_deskrl_stands_above_what_is_refused(folder: Path) -> None:
    assert load(folder, "worker.rollout.n=1", "--tasks.rollouts", "4").tasks.rollouts == 4
    assert load(folder, "--model.build", "tiny").model.path is None


def test_a_run_is_gone_on_from_by_its_own_newest_checkpoint(folder: Path) -> None:
    runs, key = ["--runs", str(folder / "runs")], "trainer.load_checkpoint_path="
    assert "there is no such checkpoint" in refusal_of(folder, f"{key}checkpoints/latest", *runs)
    assert load(folder, f"{key}checkpoints/latest", *runs, must_resume=False).name == "small"
    checkpoints = folder / "runs" / "small" / "checkpoints"
    for name in ("epoch_0", "epoch_1"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "latest").symlink_to("epoch_1")
    for name in ("latest", "epoch_1"):
        assert load(folder, f"{key}checkpoints/{name}", *runs).model.path == Path("UI-TARS-2B")
    assert "its newest checkpoint" in refusal_of(folder, f"{key}checkpoints/epoch_0", *runs)


def test_the_weights_of_another_run_can_be_gone_on_from(folder: Path) -> None:
    other = folder / "other" / "global_step_8"
    other.mkdir(parents=True)
    assert "FSDP" in refusal_of(folder, f"trainer.load_checkpoint_path={other}")
    (other / "config.json").write_text("{}")
    assert load(folder, f"trainer.load_checkpoint_path={other}").model.path == other


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, content, told in (("a.yaml", "a: [", "not readable as YAML"), ("b.yaml", "3", "holds no keys")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=told):
            load_arpo(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_arpo(tmp_path / "gone.yaml")


def test_every_key_that_is_carried_exists_and_every_fixed_value_is_arpos_kind() -> None:
    schema = RunConfig.model_json_schema()
    for key, rule in KEYS.items():
        if isinstance(rule, Carried | Read):
            ArpoValues({key: rule.default})
        target = rule.to if isinstance(rule, Carried) else rule.sets if isinstance(rule, Read) else ""
        assert not target or exists(schema, target), (key, target)
        assert not isinstance(rule, Fixed) or rule.accepted


def test_every_key_that_is_said_to_be_read_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    value_of = ArpoValues.__getitem__

    def noting(self: ArpoValues, key: str) -> Any:
        read.add(key)
        return value_of(self, key)

    monkeypatch.setattr(ArpoValues, "__getitem__", noting)
    load(folder)
    # That one names a folder, which `load` looks for.
    assert {key for key, rule in KEYS.items() if isinstance(rule, Read)} - read == {"trainer.load_checkpoint_path"}


def exists(schema: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is one of the schema; below a free table all are."""
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


MENDS = {
    "config_uitars_2b_mac": ["worker.rollout.n", "worker.rollout.use_external_server", "data.train_files"],
    "config_uitars_2b_mac_seed001_version": ["worker.rollout.n", "data.train_files"],
    "smoke_8gpu": ["data.rollout_batch_size"],
    "smoke_remote_env": ["env.remote_server_url", "worker.actor.global_batch_size"],
    "smoke_remote_env_tunnel": ["env.remote_server_url", "worker.actor.global_batch_size"],
    "wandb_config": ["worker.rollout.n", "data.train_files", "algorithm.disable_kl"],
}
OVERRIDDEN = ("worker.actor.model.model_path=UI-TARS-1.5-7B", "env.provider=embedded")
MENDED = (
    *OVERRIDDEN,
    "worker.rollout.n=2",
    "worker.rollout.use_external_server=false",
    "env.remote_server_url=null",
    "algorithm.disable_kl=true",
    "data.rollout_batch_size=4",
    "worker.actor.global_batch_size=4",
    f"data.train_files={OSWORLD}/evaluation_examples/train_all_128.json",
)


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_model_and_provider_overridden_it_is_a_run_or_each_offending_key_is_named(path: Path) -> None:
    offending = MENDS.get(path.stem, [])
    if not offending:
        assert load_arpo(path, OVERRIDDEN)[0].preset == "arpo"
        return
    with pytest.raises(UserError) as refused:
        load_arpo(path, OVERRIDDEN)
    assert all(f"{key} = " in str(refused.value) for key in offending)


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_the_mends_every_published_configuration_is_a_run(path: Path) -> None:
    config, notes = load_arpo(path, MENDED)
    assert (config.tasks.rollouts, config.learner.grpo.groups_per_batch, config.learner.grpo.minibatches) == (2, 4, 1)
    assert all(note.became for note in notes)
