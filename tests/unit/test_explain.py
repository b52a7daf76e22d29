"""What `deskrl explain` tells: numbers worked out by hand, contradictions by name, and no engine to find them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from deskrl.core.config import LearnerConfig, RunConfig, load_config
from deskrl.core.devices import num_gpus
from deskrl.core.errors import UserError
from deskrl.core.explain.batches import Rows, count_batches, count_rows, rows_by_images, usual_rows
from deskrl.core.explain.differences import differences
from deskrl.core.explain.explanation import Explanation
from deskrl.core.explain.main import explain_run
from deskrl.core.explain.memory import MicroBatch, activation_bytes, learner_memory, replica_memory
from deskrl.core.explain.shape import ModelShape, shape_of_config, shape_of_name
from deskrl.core.explain.storage import checkpoint_bytes
from deskrl.core.explain.timing import Assumptions, least_staleness, predict, sharding_bytes, update_flops
from deskrl.core.explain.whole import add_up
from deskrl.core.families import Architecture
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.preflight import refuse_small_disk

RUNS = Path(__file__).parents[2] / "deploy" / "runs"
SEVEN = shape_of_name("UI-TARS-1.5-7B")
assert SEVEN is not None
SMALL = ModelShape("small", 8, 16, 2, 2, 1, 100, False, 4, 8, 1, True, 1)


def config_of(**tables: Any) -> RunConfig:
    return RunConfig.model_validate(tables)


def explanation_of(path: Path, *arguments: str, **assumed: Any) -> Explanation:
    return explain_run(load_config(path, arguments), [], Assumptions(**assumed))


def rows_of(config: RunConfig) -> Rows:
    return count_rows(config, (28, 28), patches_per_image=4, tokens_per_image=1, prompt_tokens=10, action_tokens=3)


def usual(config: RunConfig) -> list[tuple[float, Rows]]:
    return [(1.0, rows_of(config))]


def test_the_published_shapes_have_the_published_numbers_of_parameters() -> None:
    for name, num_parameters in (("UI-TARS-1.5-7B", 8_292_166_656), ("UI-TARS-2B-SFT", 2_208_985_600)):
        shape = shape_of_name(name)
        assert shape is not None and shape.num_parameters == num_parameters, name
    assert shape_of_name("my-model") is None


def test_time_added_to_embedded_desktops_is_counted_and_environment_steps_end_a_run() -> None:
    added = {"added_reset_median_s": 2.0, "added_reset_sigma": 0.0, "added_action_median_s": 0.5}
    config = config_of(
        desktop={"embedded": {**added, "added_action_sigma": 1.0}},
        learner={"grpo": {"num_updates": 50, "env_steps": 100, "groups_per_batch": 2}},
        tasks={"rollouts": 4},
    )
    timing = predict(config, count_batches(config, 4), usual(config), SMALL, Assumptions(steps=5))
    assert timing is not None
    assert timing.env_reset_s == pytest.approx(0.6 + 2.0)
    assert timing.env_step_s == pytest.approx(0.15 + 0.5 * 1.6487, abs=1e-4), "a lognormal's mean is above its median"
    whole = add_up(config, count_batches(config, 4), timing, Assumptions())
    assert whole.training_s == pytest.approx(3 * timing.update_s), "40 steps an update"


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_parameters_are_those_that_transformers_counts(architecture: Architecture) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from deskrl.learner.policy import tiny_model

    text = {**tiny_model.TEXT, "vocab_size": 512, "tie_word_embeddings": True}
    vision = dict(tiny_model.VISION[architecture])
    config = AutoConfig.for_model(architecture, text_config=text, vision_config=vision, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    counted = sum(parameter.numel() for parameter in model.parameters())
    content = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    assert shape_of_config(content, "tiny").num_parameters == counted


def test_batch_arithmetic_of_arpos_full_run() -> None:
    grpo = {"groups_per_batch": 16, "minibatches": 2, "num_updates": 120}
    batches = count_batches(config_of(learner={"grpo": grpo, "eval": {"episodes": 128}}), num_tasks=128)
    assert (batches.episodes_per_update, batches.trajectories_per_optimizer_step) == (128, [64, 64])
    assert (batches.updates_per_epoch, batches.num_epochs, batches.num_episodes) == (8, 15, 15360)
    assert batches.num_evaluation_episodes == 256, "no group has fewer than two members"


def test_rows_of_a_whole_episode_and_of_a_window() -> None:
    """Prompt 10, screenshots of 1, answers of 3 with 12 marks: 4 steps are 10 + 4 + 60 tokens in one row."""
    assert rows_by_images(4, 4) == [4] and rows_by_images(4, 2) == [2, 2, 2]
    whole = rows_of(config_of(tasks={"max_steps": 4}, agent={"context": "episode"}))
    assert (whole.rows_per_trajectory, whole.tokens_per_row, whole.images_per_row) == (1, 74, 4)
    # Rows of two screenshots after 2, 3 and 4 answers: 10 + 2 + 30, + 45, + 60.
    window = rows_of(config_of(tasks={"max_steps": 4}, agent={"context": "window", "window_images": 2}))
    assert (window.rows_per_trajectory, window.tokens_per_row, window.images_per_trajectory) == (3, 72, 6)
    assert window.tokens_per_trajectory == 42 + 57 + 72


def test_a_window_makes_the_rows_that_the_learner_packs() -> None:
    """The same steps, as conversations have them and as `pack` joins them."""
    from deskrl.core.trajectory import Step
    from deskrl.learner.batches.packing import pack

    steps = []
    for index in range(4):
        first = max(0, index - 1)
        ids = [token for turn in range(index + 1) for token in ([100 + turn] if turn >= first else []) + [turn] * 2]
        shown = tuple(str(turn) for turn in range(first, index + 1))
        steps.append(Step(index, str(index), shown, "", (1, *ids[:-2]), (index, index), (0.0, 0.0)))
    packed = pack(0, steps, [[0, 0]] * 4)
    assert [len(row.images) for row in packed] == rows_by_images(4, 2)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 2, 12), (1, 2, 2, 3), (2, 2, 1 + 2, 3), (3, 0.5 + 2, 1 + 2, 3)],
)
def test_each_zero_stage_shards_one_part_more(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    """Bytes a parameter on one of four ranks; of so small a model all of it is gathered, and all of it on its way."""
    learner = {"zero_stage": stage, "num_processes": 4}
    config = config_of(tasks={"max_steps": 4}, learner=learner)
    memory = learner_memory(config, SMALL, rows_of(config))
    per_parameter = [part / SMALL.num_parameters for part in (memory.weights, memory.gradients, memory.optimizer)]
    assert per_parameter == pytest.approx([weights, gradients, optimizer], rel=1e-3)


def test_an_optimizer_in_the_hosts_memory_takes_none_of_the_gpu() -> None:
    assert SEVEN is not None
    config = config_of(tasks={"max_steps": 4}, learner={"zero_stage": 2, "offload_optimizer": True})
    memory = learner_memory(config, SEVEN, rows_of(config))
    assert (memory.optimizer, memory.gradients) == (0, 2 * 250_000_000)


def test_a_frozen_tower_has_neither_gradients_nor_moments() -> None:
    config = config_of(tasks={"max_steps": 4}, learner={"freeze_vision": True})
    memory = learner_memory(config, SMALL, rows_of(config))
    assert memory.gradients == 2 * SMALL.num_language_parameters
    assert memory.weights == 2 * SMALL.num_parameters


def test_logits_are_of_action_tokens_alone() -> None:
    """Rows of 74 tokens in micro-batches of 148: two rows with 4 x 3 action tokens each, and 100 words.

    Logits and their gradient, and three copies of as many as are dealt with at a time.
    """
    config = config_of(
        tasks={"max_steps": 4}, agent={"context": "episode"}, learner={"micro_batch_tokens": 148, "dtype": "float32"}
    )
    assert learner_memory(config, SMALL, rows_of(config)).logits == (2 * 4 + 3 * 4) * 24 * 100


def test_layers_kept_by_their_inputs_alone_take_one_hidden_width_each() -> None:
    """Of 100 tokens in bfloat16, hidden 8 and intermediate 16: all is 2 x 128 numbers a token, going backward 64."""
    micro = MicroBatch(tokens=100, patches=0, targets=1)
    sizes = {
        kept: activation_bytes(LearnerConfig(activations=kept, freeze_vision=True), SMALL, micro) / 200
        for kept in ("all", "attention", "layers")
    }
    assert sizes == {"all": 2 * 128 + 64, "attention": 2 * 16 + 128 + 64, "layers": 2 * 8 + 128 + 64}


def test_a_frozen_tower_sees_each_screenshot_once() -> None:
    window = {"context": "window", "window_images": 2}
    frozen, uncached = (
        config_of(tasks={"max_steps": 4}, agent=window, learner={"freeze_vision": True, "feature_cache_bytes": size})
        for size in (1024, 0)
    )
    work = [update_flops(config, count_batches(config, 4), rows_of(config), SMALL) for config in (frozen, uncached)]
    # Three rows of two screenshots show four different ones.
    assert work[1] - work[0] == pytest.approx(4 * 8 * (6 - 4) * SMALL.vision_flops(4))


def test_a_kv_cache_of_a_7b_takes_56_kib_a_token() -> None:
    assert SEVEN is not None and 2 * SEVEN.key_value_numbers_per_token == 2 * 28 * 512 * 2
    cache = replica_memory(config_of(inference={"kv_cache_bytes": 57344 * 1000}), SEVEN, gpu_bytes=None)
    assert (cache.kv_tokens, cache.kv_cache) == (1000, 57344 * 1000)
    left = replica_memory(config_of(inference={"gpu_memory_fraction": 0.5}), SEVEN, gpu_bytes=40 * 10**9)
    assert left.kv_cache == 20 * 10**9 - 2 * 8_292_166_656


def test_a_7b_in_4_bits_takes_a_third_of_its_memory() -> None:
    assert SEVEN is not None
    served = replica_memory(config_of(inference={"quantization": "int4"}), SEVEN, gpu_bytes=None).weights
    # 28 layers of q and o, k and v, and three of the MLP: half a byte, and a scale of 16 bits to every 32.
    in_4_bits = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert served == 2 * (8_292_166_656 - in_4_bits) + in_4_bits // 2 + in_4_bits // 16


def test_a_checkpoint_holds_the_model_twice_and_what_the_optimizer_knows_of_trained_weights() -> None:
    whole = checkpoint_bytes(LearnerConfig(dtype="float32"), SEVEN)
    assert whole == (4 + 4 + 12) * 8_292_166_656
    frozen = checkpoint_bytes(LearnerConfig(dtype="bfloat16", freeze_vision=True), SEVEN)
    assert frozen == (2 + 2) * 8_292_166_656 + 12 * SEVEN.num_language_parameters


def test_a_disk_without_room_for_the_checkpoints_that_are_to_come_is_refused(tmp_path: Path) -> None:
    folder, learner = RunFolder(tmp_path), LearnerConfig(keep_checkpoints=1)
    refuse_small_disk(folder, learner, 1000)
    with pytest.raises(UserError, match=r"take 1000000000 GB each, 2 more at a time .* --runs"):
        refuse_small_disk(folder, learner, 10**18)
    (folder.checkpoints / "epoch_1").mkdir(parents=True)
    with pytest.raises(UserError, match="1 more at a time"):
        refuse_small_disk(folder, learner, 10**18)


def test_lock_step_adds_acting_and_learning_and_asynchrony_takes_the_longer() -> None:
    """An episode is 10 + 4 x (5 + 3) + 8 = 50 s; 8 of them on 4 desktops are 100 s."""
    times = {"env_reset_s": 10, "env_step_s": 3, "evaluate_s": 8, "act_s": 5, "learn_s": 60}
    for staleness, update_s in ((0, 160), (1, 100)):
        grpo = {"groups_per_batch": 2, "max_staleness": staleness, "num_updates": 10}
        config = config_of(tasks={"rollouts": 4, "max_steps": 4}, desktop={"num_envs": 4}, learner={"grpo": grpo})
        timing = predict(config, count_batches(config, 2), usual(config), None, Assumptions.model_validate(times))
        assert timing is not None
        assert (timing.episode_s, timing.acting_s, timing.update_s) == (50, 100, update_s)


def test_a_run_takes_its_updates_and_two_evaluations_and_costs_its_gpus_and_desktops() -> None:
    """Updates of 160 s; 9 tasks twice on 4 desktops are 5 rounds of 50 s, before and after."""
    config = config_of(
        tasks={"rollouts": 4, "max_steps": 4}, desktop={"num_envs": 4},
        learner={"grpo": {"groups_per_batch": 2, "max_staleness": 0, "num_updates": 10}, "eval": {"episodes": 10}},
    )  # fmt: skip
    times = {"env_reset_s": 10, "env_step_s": 3, "evaluate_s": 8, "act_s": 5, "learn_s": 60}
    assumed = Assumptions.model_validate({**times, "gpu_hour_price": 3.0, "desktop_hour_price": 0.5})
    batches = count_batches(config, 9)
    timing = predict(config, batches, usual(config), None, assumed)
    assert timing is not None
    whole = add_up(config, batches, timing, assumed)
    assert (whole.training_s, whole.num_evaluation_episodes, whole.evaluation_s) == (1600, 36, 500)
    assert (whole.run_s, whole.num_gpus) == (2100, 2)
    assert (whole.gpu_hours, whole.desktop_hours) == pytest.approx((2 * 2100 / 3600, 4 * 2100 / 3600))
    assert whole.cost == pytest.approx(2100 / 3600 * (2 * 3.0 + 4 * 0.5))
    assert add_up(config, batches, timing, Assumptions()).cost is None


def test_gpus_are_counted_as_they_are_named_and_shared() -> None:
    named = {"learner": {"devices": [0, 1], "num_processes": 2}}
    shared = {"inference": {"devices": [1], "kv_cache_bytes": 2**30}}
    assert num_gpus(config_of(**named, **shared)) == 2
    assert num_gpus(config_of(**named, inference={"devices": [2, 3], "num_replicas": 2})) == 4
    assert num_gpus(config_of(**named, inference={"num_replicas": 3})) == 5
    assert num_gpus(config_of(learner={"dtype": "float32"}, inference={"dtype": "float32"})) == 0


def test_in_lock_step_all_wait_for_the_slowest_desktop() -> None:
    """Of 256 lognormal times with sigma 0.4 the slowest is about exp(0.4 x 3.33 - 0.08) = 3.5 times the mean."""
    times = {"env_reset_s": 10, "env_step_s": 2, "evaluate_s": 5, "act_s": 1, "learn_s": 0, "steps": 5}
    config = config_of(
        tasks={"rollouts": 8}, desktop={"num_envs": 256}, replay={"schedule": "lock_step"},
        learner={"grpo": {"groups_per_batch": 32, "max_staleness": 0}},
    )  # fmt: skip
    timing = predict(config, count_batches(config, 128), usual(config), None, Assumptions.model_validate(times))
    assert timing is not None and timing.slowest == pytest.approx(3.5, rel=0.01)
    assert timing.episode_s == pytest.approx(5 + timing.slowest * (10 + 5 * 2 + 5))


def test_pacing_keeps_no_more_desktops_busy_than_it_grants() -> None:
    grpo = {"groups_per_batch": 1, "max_staleness": 0}
    config = config_of(tasks={"rollouts": 4}, desktop={"num_envs": 32}, learner={"grpo": grpo})
    timing = predict(config, count_batches(config, 4), usual(config), SMALL, Assumptions())
    assert timing is not None and (timing.desktops, timing.desktops_allowed) == (32, 4)


@pytest.mark.parametrize(("learn_s", "enough"), [(60, math.inf), (110, 3), (150, 2), (250, 1)])
def test_staleness_beyond_what_keeps_the_learner_busy_gains_nothing(learn_s: float, enough: float) -> None:
    """Batches of 4, episodes of 400 s: 8 desktops at once, as staleness 1 allows, take 200 s for one; 16 take 100."""
    times = {"env_reset_s": 400, "env_step_s": 0, "evaluate_s": 0, "act_s": 0, "learn_s": learn_s}
    config = config_of(tasks={"rollouts": 4}, desktop={"num_envs": 16}, learner={"grpo": {"groups_per_batch": 1}})
    batches = count_batches(config, 1)
    timing = predict(config, batches, usual(config), None, Assumptions.model_validate(times))
    assert timing is not None and least_staleness(batches, timing) == enough


def test_later_optimizer_steps_cost_one_forward_pass_more() -> None:
    one, two = (
        config_of(tasks={"max_steps": 4}, learner={"grpo": {"minibatches": steps}}) for steps in (1, 2)
    )  # 3 passes' worth against 3.5
    work = [update_flops(config, count_batches(config, 4), rows_of(config), SMALL) for config in (one, two)]
    assert work[1] / work[0] == pytest.approx(3.5 / 3)


def test_shorter_episodes_have_fewer_rows_and_not_a_share_of_each() -> None:
    """A window of 3: up to 3 steps are one row, 4 are two; a mean of 2.5 is half 2 and half 3."""
    config = config_of(tasks={"max_steps": 6}, agent={"context": "window", "window_images": 3})

    def of_steps(steps: int) -> Rows:
        return count_rows(config, (28, 28), 4, 1, 10, 3, steps)

    assert [(share, rows.steps) for share, rows in usual_rows(of_steps, 2.5)] == [(0.5, 2), (0.5, 3)]
    assert [(share, rows.rows_per_trajectory) for share, rows in usual_rows(of_steps, 4.0)] == [(1.0, 2)]


def test_sharded_weights_come_with_every_micro_batch_and_larger_ones_move_less() -> None:
    """A row is 10 + 2 x (1 + 3 + 12) = 42 tokens, 8 trajectories are 4 rows on each of 2 ranks."""
    batches, moved = count_batches(config_of(learner={"grpo": {"groups_per_batch": 2}}, tasks={"rollouts": 4}), 4), {}
    for tokens in (42, 100):
        learner = {"zero_stage": 3, "num_processes": 2, "dtype": "bfloat16", "micro_batch_tokens": tokens}
        config = config_of(tasks={"max_steps": 2}, learner={**learner, "activations": "layers"})
        moved[tokens] = sharding_bytes(config, batches, usual(config), SMALL)
    # Thrice in 2 bytes, and gradients in 4; half of it is on the other rank.
    assert moved[42] == 4 * (3 * 2 + 4) * SMALL.num_parameters / 2
    assert moved[100] == moved[42] / 2
    timing = predict(config, batches, usual(config), SMALL, Assumptions(gather_gb_per_s=moved[100] / 1e9))
    assert timing is not None and timing.gathering_s == 1.0 < timing.learning_s
    whole = config_of(tasks={"max_steps": 2}, learner={"zero_stage": 1, "num_processes": 2})
    assert sharding_bytes(whole, batches, usual(whole), SMALL) == 0


def test_arpos_preset_departs_from_arpos_code_only_where_that_is_a_fault() -> None:
    arpo = load_config(RUNS / "arpo-full.toml", ["--desktop.num_envs", "128", "--tasks.rollouts", "8"])
    arpo = arpo.model_copy(update={"tasks": arpo.tasks.model_copy(update={"max_steps": 15})})
    differing = {row.topic for row in differences(arpo) if row.run != row.code}
    assert differing == {
        "evaluator that raises",
        "tokens learnt from",
        "replay: can be off",
        "replay: what is stored",
    }
    assert all(row.keys for row in differences(arpo) if row.topic in ("advantage", "clip", "reward", "batch"))


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_run_is_explained(path: Path) -> None:
    explanation = explanation_of(path)
    assert explanation.learner_memory is not None and explanation.timing is not None
    assert explanation.timing.update_s > 0 and explanation.learner_memory.total > 0
    assert not [remark for remark in explanation.remarks if "GiB are there" in remark]


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [("smoke", (2, 2, 10, 1)), ("small", (8, 4, 12, 4)), ("full", (8, 4, 16, 10)), ("paper", (256, 8, 15, 15))],
)
def test_the_stages_are_those_of_arpo(stage: str, sizes: tuple[int, int, int, int]) -> None:
    """Desktops, rollouts, steps, epochs."""
    config = load_config(RUNS / f"arpo-{stage}.toml")
    num_tasks = {"smoke": 4, "small": 32, "full": 128, "paper": 128}[stage]
    epochs = count_batches(config, num_tasks).num_epochs
    desktops, rollouts, steps, num_epochs = sizes
    assert (config.desktop.num_envs, config.tasks.rollouts, config.tasks.max_steps) == (desktops, rollouts, steps)
    assert epochs == num_epochs if stage != "smoke" else epochs is not None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--inference.max_model_len", "100"], "6 screenshots of 45 tokens are 270, and inference.max_model_len = 100"),
        (["--learner.grpo.minibatches", "33"], "learner.grpo.minibatches = 33 optimizer steps share 32 episodes"),
        (["--inference.max_images", "5"], "tasks.max_steps = 6 screenshots can come into one prompt"),
    ],
)
def test_contradictions_are_refused_by_name(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        explanation_of(RUNS / "smoke.toml", *arguments, "--inference.max_action_tokens", "40")
    assert told in str(refused.value)


def test_the_command_needs_no_engine_and_prints_a_document() -> None:
    program = (
        "import sys; from deskrl.core.cli import main\n"
        f"status = main(['explain', {str(RUNS / 'smoke.toml')!r}, '--json', '--env-step-s', '1.5'])\n"
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'transformers') if m in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"
    told = json.loads(result.stdout)
    assert (told["timing"]["env_step_s"], told["batches"]["episodes_per_update"]) == (1.5, 32)


def test_the_text_names_the_three_columns_and_what_became_of_arpos_keys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from deskrl.core.arpo.translate import Note
    from deskrl.core.explain.main import explain

    note = Note("worker.rollout.name", "vllm", "as it is")
    explain(load_config(RUNS / "smoke.toml"), [note], Assumptions(desktop_hour_price=0.25), as_document=False)
    text = capsys.readouterr().out
    for told in ("paper", "ARPO's code", "this run", "8 tasks x 4 rollouts = 32", "h x 0.25 = ", "worker.rollout.name"):
        assert told in text
