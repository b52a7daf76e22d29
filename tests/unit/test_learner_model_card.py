"""Model cards: the metadata that the Hub reads, the facts of the training, and nothing about the machine."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from deskrl.core.config import RunConfig
from deskrl.core.run_dir import RunDir
from deskrl.learner.checkpoint.model_card import BaseModel, ModelCardWriter, model_card, read_base_model
from deskrl.learner.metrics.result_files import ResultFiles

BASE = BaseModel("UI-TARS", "ByteDance-Seed/UI-TARS-1.5-7B", {"license": "apache-2.0"})
STATE: dict[str, Any] = {
    "num_updates": 2,
    "history": [
        {"num_episodes": 8, "num_env_steps": 30, "success_rate": 0.25},
        {"num_episodes": 8, "num_env_steps": 20, "success_rate": 0.5},
    ],
}


def config_of(**tables: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "study", **tables})


def test_a_card_has_the_metadata_that_the_hub_reads() -> None:
    data = ModelCard(model_card(config_of(), BASE, 4, STATE, {})).data.to_dict()
    assert data["base_model"] == "ByteDance-Seed/UI-TARS-1.5-7B"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert (data["license"], data["base_model_relation"]) == ("apache-2.0", "finetune")
    assert {"deskrl", "reinforcement-learning"} <= set(data["tags"])


def test_a_model_of_unknown_origin_has_neither_base_model_nor_licence() -> None:
    data = ModelCard(model_card(config_of(), BaseModel("mine"), 4, STATE, {})).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()


def test_the_card_of_an_adapter_is_for_peft() -> None:
    data = ModelCard(model_card(config_of(learner={"lora": {"rank": 4}}), BASE, 4, STATE, {})).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")


def test_a_card_states_the_training_and_its_success() -> None:
    evaluations = {"before": {"successes": 3, "episodes": 12}, "after": {"successes": 9, "episodes": 12}}
    text = model_card(config_of(), BASE, 4, STATE, evaluations)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    facts = {row[0]: row[1] for row in rows[2:]}
    assert facts["policy updates"] == "2" and facts["tasks"] == "4"
    assert (facts["episodes"], facts["environment steps"]) == ("16", "50")
    assert facts["success before training"] == "3 of 12 episodes (25%)"
    assert facts["success after training"] == "9 of 12 episodes (75%)"
    assert facts["success of the last update's episodes"] == "50%"
    assert "success before" not in model_card(config_of(), BASE, 4, {}, {})


def test_a_card_lists_changed_keys_of_the_method_without_paths_and_free_texts() -> None:
    grpo = {"loss": "gspo", "kl_coefficient": 0.1, "loss_options": {"clip_low": 0.1, "key": "hunter2"}}
    config = config_of(
        seed=3,
        runs="/home/me/runs",
        model={"path": "/home/me/models/UI-TARS"},
        learner={"grpo": grpo, "master_port": 1234},
        tasks={"list": "/home/me/list.json", "num_rollouts": 6},
    )
    text = model_card(config, BASE, 4, STATE, {})
    settings = text.split("```toml\n")[1].split("```")[0].splitlines()
    assert settings == [
        'preset = "deskrl"',
        "seed = 3",
        "tasks.num_rollouts = 6",
        'learner.grpo.loss = "gspo"',
        "learner.grpo.loss_options.clip_low = 0.1",
        "learner.grpo.kl_coefficient = 0.1",
    ]
    assert "/home" not in text and "hunter2" not in text and "1234" not in text


@pytest.mark.parametrize(
    ("place", "card", "hub_id"),
    [
        ("models--org--Model-7B/snapshots/abc", "", "org/Model-7B"),
        ("Model-7B", "---\nlicense: mit\n---\nvllm serve org/Model-7B --port 1\n", "org/Model-7B"),
        ("Model-7B", "See https://huggingface.co/org/Model-7B.", "org/Model-7B"),
        ("Model-7B", "A sibling of org/Model-7B-DPO.", None),
        ("Model-7B", "", None),
        ("epoch_3", "---\ntags: [deskrl]\nbase_model: org/Model-7B\n---\n", "org/Model-7B"),
        ("Model-7B", "---\n{not yaml\n---\n", None),
    ],
)
def test_the_base_model_is_what_cache_or_card_say_it_is(
    tmp_path: Path, place: str, card: str, hub_id: str | None
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if card:
        (folder / "README.md").write_text(card)
    base = read_base_model(folder)
    assert base.hub_id == hub_id
    assert base.license == ({"license": "mit"} if "license: mit" in card else {})


def test_a_written_card_can_be_loaded_and_training_state_is_not_uploaded(tmp_path: Path) -> None:
    config = config_of(runs=tmp_path)
    ModelCardWriter(config, 4, ResultFiles(RunDir(tmp_path), {})).write(tmp_path, STATE)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers" and "built by the run" in card.text
    assert str(tmp_path) not in card.content
    assert (tmp_path / ".gitignore").read_text().split() == ["engine/", "learner.json"]
