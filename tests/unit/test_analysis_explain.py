"""`deskrl explain`: predictions agree with numbers calculated by hand, and errors name the contradicting keys."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.agent.conversation import Agent
from deskrl.analysis.explain.arpo_diff import diff_from_arpo
from deskrl.analysis.explain.cost import estimate_run_cost
from deskrl.analysis.explain.explanation import Explanation, build_explanation
from deskrl.analysis.explain.update_time import (
    Assumptions,
    UpdateTiming,
    estimate_update_time,
    min_useful_staleness,
    update_flops,
    zero3_traffic_bytes,
)
from deskrl.core.config import AgentConfig, LearnerConfig, RunConfig, load_config
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.gpu_assignment import num_gpus
from deskrl.launch.preflight import check_disk_space
from deskrl.launch.sizing.batch_sizes import (
    RowContent,
    TrajectorySize,
    batch_sizes,
    row_contents,
    trajectory_mix,
    trajectory_size,
)
from deskrl.launch.sizing.footprint import (
    MicroBatchSize,
    activation_bytes,
    checkpoint_bytes,
    learner_memory,
    num_trained_parameters,
    replica_memory,
)
from deskrl.launch.sizing.model_shape import shape_from_config, shape_from_name
from deskrl.models.architectures import ARCHITECTURES

RUNS = Path(__file__).parents[2] / "deploy" / "runs"
SHAPE_7B = shape_from_name("UI-TARS-1.5-7B")
assert SHAPE_7B is not None
SMALL_TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION = {"hidden_size": 4, "intermediate_size": 8, "out_hidden_size": 8, "depth": 1}
SMALL_SHAPE = shape_from_config(
    {
        "model_type": "qwen2_5_vl",
        "text_config": {**SMALL_TEXT, "num_key_value_heads": 1, "vocab_size": 100},
        "vision_config": {**SMALL_VISION, "fullatt_block_indexes": [0]},
    },
    "small",
)


def config_of(**tables: Any) -> RunConfig:
    return RunConfig.model_validate(tables)


def explanation_of(path: Path, *arguments: str, **assumed: Any) -> Explanation:
    return build_explanation(load_config(path, arguments), [], Assumptions(**assumed))


def longest_trajectory(config: RunConfig) -> TrajectorySize:
    return trajectory_size(config, (28, 28), patches_per_image=4, tokens_per_image=1, prompt_tokens=10, action_tokens=3)


def mix_of(config: RunConfig) -> list[tuple[float, TrajectorySize]]:
    return [(1.0, longest_trajectory(config))]


def flops(config: RunConfig) -> float:
    return update_flops(config, batch_sizes(config, 4), longest_trajectory(config), SMALL_SHAPE)


def timing_of(config: RunConfig, num_tasks: int, times: dict[str, float]) -> UpdateTiming:
    timing = estimate_update_time(
        config, batch_sizes(config, num_tasks), mix_of(config), None, Assumptions.model_validate(times)
    )
    assert timing is not None
    return timing


def test_published_models_have_the_published_number_of_parameters() -> None:
    for name, num_parameters in (
        ("UI-TARS-1.5-7B", 8_292_166_656),
        ("UI-TARS-2B-SFT", 2_208_985_600),
        ("Qwen3-VL-2B-Instruct", 2_127_532_032),
        ("Qwen3-VL-4B-Thinking", 4_437_815_808),
        ("Qwen3-VL-8B-Instruct", 8_767_123_696),
    ):
        shape = shape_from_name(name)
        assert shape is not None and shape.num_parameters == num_parameters, name
    assert shape_from_name("my-model") is None


def test_added_desktop_delays_are_counted_and_the_limit_of_environment_steps_ends_a_run() -> None:
    added = {"added_reset_median_s": 2.0, "added_reset_sigma": 0.0, "added_action_median_s": 0.5}
    config = config_of(
        desktop={"embedded": {**added, "added_action_sigma": 1.0}},
        learner={"grpo": {"num_updates": 50, "max_env_steps": 100, "groups_per_batch": 2}},
        tasks={"num_rollouts": 4},
    )
    timing = estimate_update_time(config, batch_sizes(config, 4), mix_of(config), SMALL_SHAPE, Assumptions(steps=5))
    assert timing is not None
    assert timing.env_reset_s == pytest.approx(0.6 + 2.0)
    assert timing.env_step_s == pytest.approx(0.15 + 0.5 * 1.6487, abs=1e-4), "a lognormal's mean is above its median"
    cost = estimate_run_cost(config, batch_sizes(config, 4), timing, Assumptions())
    assert cost.training_s == pytest.approx(3 * timing.update_s), "an update takes 40 steps"


@pytest.mark.parametrize("architecture", ARCHITECTURES.names())
def test_parameter_counts_agree_with_transformers(architecture: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from deskrl.learner.policy.architectures import load_learner_architecture

    sizes = load_learner_architecture(architecture).tiny_config()
    text = {**sizes["text_config"], "vocab_size": 512, "tie_word_embeddings": True}
    vision = dict(sizes["vision_config"])
    config = AutoConfig.for_model(architecture, text_config=text, vision_config=vision, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    counted = sum(parameter.numel() for parameter in model.parameters())
    content = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, "model_type": architecture}
    assert shape_from_config(content, "tiny").num_parameters == counted


def test_batch_sizes_of_arpos_full_run() -> None:
    grpo = {"groups_per_batch": 16, "num_minibatches": 2, "num_updates": 120}
    batches = batch_sizes(config_of(learner={"grpo": grpo, "eval": {"num_episodes": 128}}), num_tasks=128)
    assert (batches.episodes_per_update, batches.trajectories_per_optimizer_step) == (128, [64, 64])
    assert (batches.updates_per_epoch, batches.num_epochs, batches.num_episodes) == (8, 15, 15360)
    assert batches.num_evaluation_episodes == 256, "each task is evaluated at least twice"


def test_a_row_ends_when_the_context_drops_a_screenshot() -> None:
    """Prompt of 10 tokens, screenshots of 1, answers of 3 plus 12 of the chat format: 4 steps take 10 + 4 + 60."""
    full = longest_trajectory(config_of(tasks={"max_steps": 4}, agent={"context": "episode"}))
    assert (full.rows_per_trajectory, full.tokens_per_row, full.images_per_row) == (1, 74, 4)
    # Rows of two screenshots after 2, 3 and 4 answers: 10 + 2 + 30, + 45, + 60.
    window = longest_trajectory(config_of(tasks={"max_steps": 4}, agent={"context": "window", "window_images": 2}))
    assert (window.rows_per_trajectory, window.tokens_per_row, window.images_per_trajectory) == (3, 72, 6)
    assert window.tokens_per_trajectory == 42 + 57 + 72
    # Rows of three screenshots after 3 and 5 answers, and one of two after 6: 10 + 3 + 45, 10 + 3 + 75, 10 + 2 + 90.
    bounds = {"context": "segment", "segment_images": [2, 3]}
    segment = longest_trajectory(config_of(tasks={"max_steps": 6}, agent=bounds))
    assert (segment.rows_per_trajectory, segment.tokens_per_row, segment.images_per_row) == (3, 102, 3)
    assert (segment.images_per_trajectory, segment.tokens_per_trajectory) == (8, 58 + 88 + 102)


@pytest.mark.parametrize(
    ("agent", "num_rows"),
    [
        ({"context": "window", "window_images": 2}, 8),
        ({"context": "segment", "segment_images": (2, 3)}, 4),
        ({"context": "segment", "segment_images": (1, 4)}, 3),
        ({"context": "episode"}, 1),
    ],
)
def test_the_predicted_rows_are_those_that_the_learner_packs(agent: dict[str, Any], num_rows: int) -> None:
    from deskrl.core.step_codec import Step
    from deskrl.learner.batches.packing import pack

    image_token = 100
    config = AgentConfig(**agent)
    conversation = Agent(config).start_conversation("Press it.")
    steps = []
    for index in range(9):
        conversation.observe(Image.new("RGB", (28, 28), (index, 0, 0)))
        prompt = conversation.prompt()
        contents = [content for message in prompt.messages for content in message.contents]
        ids = tuple(
            token for content in contents if not content.text for token in content.token_ids.ids or (image_token,)
        )
        steps.append(Step(index, prompt.images[-1], prompt.images, "", ids, (index, index), (0.0, 0.0)))
        conversation.respond([index, index])
    packed = pack(0, steps, [[0, 0]] * 9)
    contents = [RowContent(len(row.images), (len(row.token_ids) - len(row.images)) // 2) for row in packed]
    assert contents == row_contents(config, 9)
    assert len(packed) == num_rows


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 2, 12), (1, 2, 2, 3), (2, 2, 1 + 2, 3), (3, 0.5 + 2, 1 + 2, 3)],
)
def test_each_zero_stage_shards_one_more_part(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    """Bytes per parameter on one of four ranks; the model is so small that all of it is gathered and in the bucket."""
    learner = {"zero_stage": stage, "num_nodes": 2, "num_processes": 2}
    config = config_of(tasks={"max_steps": 4}, learner=learner)
    memory = learner_memory(config, SMALL_SHAPE, longest_trajectory(config))
    per_parameter = [part / SMALL_SHAPE.num_parameters for part in (memory.weights, memory.gradients, memory.optimizer)]
    assert per_parameter == pytest.approx([weights, gradients, optimizer], rel=1e-3)


def test_an_offloaded_optimizer_takes_no_gpu_memory() -> None:
    assert SHAPE_7B is not None
    config = config_of(tasks={"max_steps": 4}, learner={"zero_stage": 2, "offload_optimizer": True})
    memory = learner_memory(config, SHAPE_7B, longest_trajectory(config))
    assert (memory.optimizer, memory.gradients) == (0, 2 * 250_000_000)


def test_a_frozen_vision_tower_has_no_gradients() -> None:
    config = config_of(tasks={"max_steps": 4}, learner={"freeze_vision": True})
    memory = learner_memory(config, SMALL_SHAPE, longest_trajectory(config))
    assert memory.gradients == 2 * SMALL_SHAPE.num_language_parameters
    assert memory.weights == 2 * SMALL_SHAPE.num_parameters


def test_lora_trains_and_saves_adapters_only() -> None:
    """Rank 2 in two layers with a hidden size of 8, keys and values of 4 and an MLP of 16: 2 x 2 x 128 parameters.

    The sums of both dimensions are 16 for q and o, 12 for k and v, and 24 for each matrix of the MLP.
    """
    lora = {"rank": 2}
    config = config_of(tasks={"max_steps": 4}, learner={"lora": lora})
    assert config.learner.has_frozen_vision
    assert num_trained_parameters(config.learner, SMALL_SHAPE) == 512
    memory = learner_memory(config, SMALL_SHAPE, longest_trajectory(config))
    assert memory.weights == 2 * (SMALL_SHAPE.num_parameters + 512)
    assert (memory.gradients, memory.optimizer) == (2 * 512, 12 * 512)
    assert checkpoint_bytes(config.learner, SMALL_SHAPE) == 12 * 512
    with_vision = LearnerConfig.model_validate({"lora": {**lora, "targets": [], "vision_targets": ["qkv"]}})
    assert num_trained_parameters(with_vision, SMALL_SHAPE) == 2 * (12 + 4)
    assert not with_vision.has_frozen_vision


def test_lora_of_a_7b_model_fits_beside_its_replica_on_one_gpu() -> None:
    assert SHAPE_7B is not None
    arguments = ["--model.build=ui_tars_7b_shape", "--learner.activation_checkpointing=selective"]
    full = explanation_of(RUNS / "h200.toml", *arguments)
    adapter = explanation_of(RUNS / "h200.toml", *arguments, "--learner.lora.rank=32")
    assert adapter.learner_memory is not None and adapter.learner_memory.total < 48e9
    assert adapter.checkpoint_bytes is not None and adapter.checkpoint_bytes < 1e9
    assert [remark for remark in full.remarks if "but a GPU has" in remark]
    assert not [remark for remark in adapter.remarks if "but a GPU has" in remark]


def test_the_backward_pass_of_lora_omits_the_gradients_of_the_models_matrices() -> None:
    settings: dict[str, Any] = {"tasks": {"max_steps": 4}, "agent": {"context": "episode"}}
    frozen = config_of(**settings, learner={"freeze_vision": True})
    adapter = config_of(**settings, learner={"lora": {"rank": 2}})
    num_tokens = longest_trajectory(frozen).tokens_per_row
    products = SMALL_SHAPE.language_flops(num_tokens, 12) - SMALL_SHAPE.attention_flops(num_tokens)
    episodes = batch_sizes(frozen, 4).episodes_per_update
    assert flops(frozen) - flops(adapter) == pytest.approx(episodes * (products - 2 * 2 * 512 * num_tokens))


def test_a_lora_target_that_no_layer_has_is_reported() -> None:
    with pytest.raises(UserError, match=r"learner.lora.targets: no linear layer of the model is called query"):
        explanation_of(RUNS / "smoke.toml", "--learner.lora.rank=4", '--learner.lora.targets=["q_proj", "query"]')


def test_logits_are_counted_for_action_tokens_only() -> None:
    """Micro-batches of 148 tokens hold two rows of 74 tokens with 4 x 3 action tokens each; the vocabulary has 100.

    Counted are the logits and their gradient, and three float32 copies of one chunk.
    """
    config = config_of(
        tasks={"max_steps": 4}, agent={"context": "episode"}, learner={"micro_batch_tokens": 148, "dtype": "float32"}
    )
    assert learner_memory(config, SMALL_SHAPE, longest_trajectory(config)).logits == (2 * 4 + 3 * 4) * 24 * 100


def test_checkpointed_layers_keep_one_or_two_hidden_widths_each() -> None:
    """Per token, with hidden 8 and intermediate 16: two layers keep 2 x 128 elements, a backward pass needs 64."""
    micro = MicroBatchSize(tokens=100, patches=0, targets=1)
    sizes = {
        kept: activation_bytes(LearnerConfig(activation_checkpointing=kept, freeze_vision=True), SMALL_SHAPE, micro)
        / 200
        for kept in ("off", "selective", "full")
    }
    assert sizes == {"off": 2 * 128 + 64, "selective": 2 * 16 + 128 + 64, "full": 2 * 8 + 128 + 64}


def test_a_frozen_vision_tower_encodes_each_screenshot_once() -> None:
    window = {"context": "window", "window_images": 2}
    frozen, uncached = (
        config_of(tasks={"max_steps": 4}, agent=window, learner={"freeze_vision": True, "feature_cache_bytes": size})
        for size in (1024, 0)
    )
    work = [flops(config) for config in (frozen, uncached)]
    # Three rows of two screenshots contain four different screenshots.
    assert work[1] - work[0] == pytest.approx(4 * 8 * (6 - 4) * SMALL_SHAPE.vision_flops(4))


def test_the_kv_cache_of_a_7b_model_takes_56_kib_per_token() -> None:
    assert SHAPE_7B is not None and 2 * SHAPE_7B.kv_elements_per_token == 2 * 28 * 512 * 2
    cache = replica_memory(config_of(inference={"kv_cache_bytes": 57344 * 1000}), SHAPE_7B, gpu_bytes=None)
    assert (cache.kv_tokens, cache.kv_cache) == (1000, 57344 * 1000)
    left = replica_memory(config_of(inference={"gpu_memory_utilization": 0.5}), SHAPE_7B, gpu_bytes=40 * 10**9)
    assert left.kv_cache == 20 * 10**9 - 2 * 8_292_166_656


def test_int4_quantizes_the_matrices_of_the_language_layers() -> None:
    assert SHAPE_7B is not None
    served = replica_memory(config_of(inference={"quantization": "int4"}), SHAPE_7B, gpu_bytes=None).weights
    # 28 layers of q and o, k and v, and three MLP matrices: half a byte each, and a 16-bit scale per 32 elements.
    quantized = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert served == 2 * (8_292_166_656 - quantized) + quantized // 2 + quantized // 16


def test_a_checkpoint_holds_the_model_twice_and_the_optimizer_state_of_trained_weights() -> None:
    full = checkpoint_bytes(LearnerConfig(dtype="float32"), SHAPE_7B)
    assert full == (4 + 4 + 12) * 8_292_166_656
    frozen = checkpoint_bytes(LearnerConfig(dtype="bfloat16", freeze_vision=True), SHAPE_7B)
    assert frozen == (2 + 2) * 8_292_166_656 + 12 * SHAPE_7B.num_language_parameters


def test_a_disk_too_small_for_the_remaining_checkpoints_is_rejected(tmp_path: Path) -> None:
    folder, learner = RunDir(tmp_path), LearnerConfig(keep_checkpoints=1)
    check_disk_space(folder, learner, 1000)
    with pytest.raises(UserError, match=r"but 2 more checkpoints of 1000000000 GB are needed .* --runs"):
        check_disk_space(folder, learner, 10**18)
    (folder.checkpoints / "epoch_1").mkdir(parents=True)
    with pytest.raises(UserError, match="but 1 more checkpoint"):
        check_disk_space(folder, learner, 10**18)
    with pytest.raises(UserError, match=r"and 1000000000 GB for the merged model .learner.verify_checkpoint."):
        check_disk_space(folder, learner, 1000, merged_bytes=10**18)


def test_an_update_takes_acting_plus_training_synchronously_and_the_longer_of_both_asynchronously() -> None:
    """An episode takes 10 + 4 x (5 + 3) + 8 = 50 s; 8 episodes on 4 desktops take 100 s."""
    times = {"env_reset_s": 10, "env_step_s": 3, "evaluate_s": 8, "act_s": 5, "learn_s": 60}
    for staleness, update_s in ((0, 160), (1, 100)):
        grpo = {"groups_per_batch": 2, "max_staleness": staleness, "num_updates": 10}
        config = config_of(tasks={"num_rollouts": 4, "max_steps": 4}, desktop={"num_envs": 4}, learner={"grpo": grpo})
        timing = timing_of(config, 2, times)
        assert (timing.episode_s, timing.acting_s, timing.update_s) == (50, 100, update_s)


def test_a_run_takes_its_updates_and_two_evaluations_and_costs_gpu_and_desktop_hours() -> None:
    """Updates take 160 s; each evaluation of 9 tasks twice on 4 desktops takes 5 rounds of 50 s."""
    config = config_of(
        tasks={"num_rollouts": 4, "max_steps": 4}, desktop={"num_envs": 4},
        learner={"grpo": {"groups_per_batch": 2, "max_staleness": 0, "num_updates": 10}, "eval": {"num_episodes": 10}},
    )  # fmt: skip
    times = {"env_reset_s": 10, "env_step_s": 3, "evaluate_s": 8, "act_s": 5, "learn_s": 60}
    assumed = Assumptions.model_validate({**times, "gpu_hour_price": 3.0, "desktop_hour_price": 0.5})
    batches = batch_sizes(config, 9)
    timing = estimate_update_time(config, batches, mix_of(config), None, assumed)
    assert timing is not None
    cost = estimate_run_cost(config, batches, timing, assumed)
    assert (cost.training_s, cost.num_evaluation_episodes, cost.evaluation_s) == (1600, 36, 500)
    assert (cost.run_s, cost.num_gpus) == (2100, 2)
    assert (cost.gpu_hours, cost.desktop_hours) == pytest.approx((2 * 2100 / 3600, 4 * 2100 / 3600))
    assert cost.cost == pytest.approx(2100 / 3600 * (2 * 3.0 + 4 * 0.5))
    assert estimate_run_cost(config, batches, timing, Assumptions()).cost is None


def test_named_gpus_are_counted_once_and_unnamed_ones_per_process() -> None:
    named = {"learner": {"devices": [0, 1], "num_processes": 2}}
    shared = {"inference": {"devices": [1], "kv_cache_bytes": 2**30}}
    assert num_gpus(config_of(**named, **shared)) == 2
    assert num_gpus(config_of(**named, inference={"devices": [2, 3], "num_replicas": 2})) == 4
    assert num_gpus(config_of(**named, inference={"num_replicas": 3})) == 5
    assert num_gpus(config_of(learner={"num_nodes": 2, "num_processes": 4}, inference={"num_replicas": 3})) == 11
    assert num_gpus(config_of(learner={"dtype": "float32"}, inference={"dtype": "float32"})) == 0


def test_in_lock_step_all_desktops_wait_for_the_slowest() -> None:
    """The slowest of 256 lognormal times with sigma 0.4 is about exp(0.4 x 3.33 - 0.08) = 3.5 times the mean."""
    times = {"env_reset_s": 10, "env_step_s": 2, "evaluate_s": 5, "act_s": 1, "learn_s": 0, "steps": 5}
    config = config_of(
        tasks={"num_rollouts": 8}, desktop={"num_envs": 256}, replay={"schedule": "lock_step"},
        learner={"grpo": {"groups_per_batch": 32, "max_staleness": 0}},
    )  # fmt: skip
    timing = timing_of(config, 128, times)
    assert timing.slowest == pytest.approx(3.5, rel=0.01)
    assert timing.episode_s == pytest.approx(5 + timing.slowest * (10 + 5 * 2 + 5))


def test_the_rate_limiter_bounds_the_desktops_that_run_at_once() -> None:
    grpo = {"groups_per_batch": 1, "max_staleness": 0}
    config = config_of(tasks={"num_rollouts": 4}, desktop={"num_envs": 32}, learner={"grpo": grpo})
    timing = estimate_update_time(config, batch_sizes(config, 4), mix_of(config), SMALL_SHAPE, Assumptions())
    assert timing is not None and (timing.desktops, timing.desktops_allowed) == (32, 4)


@pytest.mark.parametrize(("learn_s", "enough"), [(60, math.inf), (110, 3), (150, 2), (250, 1)])
def test_the_smallest_staleness_that_keeps_the_learner_busy_is_found(learn_s: float, enough: float) -> None:
    """Batches of 4 episodes of 400 s: 8 desktops (staleness 1) take 200 s per batch, 16 desktops take 100 s."""
    times = {"env_reset_s": 400, "env_step_s": 0, "evaluate_s": 0, "act_s": 0, "learn_s": learn_s}
    config = config_of(tasks={"num_rollouts": 4}, desktop={"num_envs": 16}, learner={"grpo": {"groups_per_batch": 1}})
    batches = batch_sizes(config, 1)
    timing = estimate_update_time(config, batches, mix_of(config), None, Assumptions.model_validate(times))
    assert timing is not None and min_useful_staleness(batches, timing) == enough


def test_later_optimizer_steps_cost_one_more_forward_pass() -> None:
    one, two = (
        config_of(tasks={"max_steps": 4}, learner={"grpo": {"num_minibatches": steps}}) for steps in (1, 2)
    )  # 3 against 3.5 passes
    work = [flops(config) for config in (one, two)]
    assert work[1] / work[0] == pytest.approx(3.5 / 3)


@pytest.mark.parametrize(
    ("learner", "reference"),
    [
        ({"zero_stage": 1}, 2.0),
        ({"zero_stage": 3}, 0.5),
        ({"zero_stage": 3, "offload_reference": True}, 0.0),
        ({"zero_stage": 1, "lora": {"rank": 4}}, 0.0),
        ({"zero_stage": 1, "grpo": {}}, 0.0),
    ],
)
def test_a_reference_policy_takes_the_memory_of_its_weights(learner: dict[str, Any], reference: float) -> None:
    """Bytes per parameter on one of four ranks in bfloat16."""
    penalty = {"num_processes": 4, "grpo": {"kl_coefficient": 0.1}}
    config = config_of(tasks={"max_steps": 4}, learner={**penalty, **learner})
    memory = learner_memory(config, SMALL_SHAPE, longest_trajectory(config))
    assert memory.reference / SMALL_SHAPE.num_parameters == pytest.approx(reference, rel=1e-3)
    without = config_of(tasks={"max_steps": 4}, learner={**penalty, **learner, "grpo": {}})
    assert memory.total - learner_memory(without, SMALL_SHAPE, longest_trajectory(config)).total == memory.reference


def test_a_quantised_model_is_rejected(tmp_path: Path) -> None:
    """Its memory would be predicted as that of the original model, and `deskrl up` rejects it."""
    quantised = {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UserError, match="weights quantised by awq cannot be trained"):
        build_explanation(config_of(model={"path": tmp_path}), [], Assumptions())


def test_offloaded_reference_weights_count_as_far_as_they_exceed_what_scoring_does_not_need() -> None:
    learner = {"grpo": {"kl_coefficient": 0.1}, "offload_reference": True}
    config = config_of(tasks={"max_steps": 4}, learner=learner)
    memory = learner_memory(config, SMALL_SHAPE, longest_trajectory(config))
    assert memory.reference == max(0, 2 * SMALL_SHAPE.num_parameters - memory.activations - memory.logits)


def test_a_kl_penalty_costs_a_forward_pass_of_the_reference_and_in_the_reward_one_of_the_policy() -> None:
    """3 passes of the policy; 4 with a reference in the loss; 5 in the reward, whatever the number of steps."""

    def work(**grpo: Any) -> float:
        return flops(config_of(tasks={"max_steps": 4}, learner={"grpo": grpo}))

    plain = work()
    assert work(kl_coefficient=0.1) / plain == pytest.approx(4 / 3)
    assert work(kl_coefficient=0.1, num_minibatches=2) / plain == pytest.approx(4.5 / 3)
    for steps in (1, 2):
        in_reward = work(kl_coefficient=0.1, kl_applied_to="reward", num_minibatches=steps)
        assert in_reward / plain == pytest.approx(5 / 3)


def test_kl_penalties_that_do_not_do_what_one_expects_are_remarked() -> None:
    (path, *_) = sorted(RUNS.glob("*.toml"))
    settings = ["--learner.grpo.kl_coefficient", "0.1", "--learner.grpo.kl_estimator", "k1"]
    remarks = " ".join(explanation_of(path, *settings).remarks)
    assert "learner.grpo.kl_estimator = k1 in the loss does not pull the policy towards the reference" in remarks
    in_reward = " ".join(explanation_of(path, *settings, "--learner.grpo.kl_applied_to", "reward").remarks)
    assert "k1 in the loss" not in in_reward
    differences = {it.topic: it.run for it in explanation_of(path, *settings).differences}
    assert differences["KL, entropy bonus"] == "KL 0.1 (k1) in the loss"


def test_shorter_episodes_have_fewer_rows() -> None:
    """With a window of 3, up to 3 steps make one row and 4 steps make two; a mean of 2.5 is half 2 and half 3."""
    config = config_of(tasks={"max_steps": 6}, agent={"context": "window", "window_images": 3})

    def size_of(steps: int) -> TrajectorySize:
        return trajectory_size(config, (28, 28), 4, 1, 10, 3, steps)

    assert [(share, rows.steps) for share, rows in trajectory_mix(size_of, 2.5)] == [(0.5, 2), (0.5, 3)]
    assert [(share, rows.rows_per_trajectory) for share, rows in trajectory_mix(size_of, 4.0)] == [(1.0, 2)]


def test_zero_3_moves_weights_with_every_micro_batch() -> None:
    """A row has 10 + 2 x (1 + 3 + 12) = 42 tokens; 8 trajectories make 4 rows on each of 2 ranks."""
    batches, moved = batch_sizes(config_of(learner={"grpo": {"groups_per_batch": 2}}, tasks={"num_rollouts": 4}), 4), {}
    for tokens in (42, 100):
        learner = {"zero_stage": 3, "num_processes": 2, "dtype": "bfloat16", "micro_batch_tokens": tokens}
        config = config_of(tasks={"max_steps": 2}, learner={**learner, "activation_checkpointing": "full"})
        moved[tokens] = zero3_traffic_bytes(config, batches, mix_of(config), SMALL_SHAPE)
    # Weights three times in 2 bytes and gradients in 4 bytes, half of which are on the other rank.
    assert moved[42] == 4 * (3 * 2 + 4) * SMALL_SHAPE.num_parameters / 2
    assert moved[100] == moved[42] / 2
    timing = estimate_update_time(
        config, batches, mix_of(config), SMALL_SHAPE, Assumptions(gather_gb_per_s=moved[100] / 1e9)
    )
    assert timing is not None and timing.gathering_s == 1.0 < timing.learning_s
    unsharded = config_of(tasks={"max_steps": 2}, learner={"zero_stage": 1, "num_processes": 2})
    assert zero3_traffic_bytes(unsharded, batches, mix_of(unsharded), SMALL_SHAPE) == 0


def test_the_arpo_preset_differs_from_arpos_code_only_where_that_is_wrong() -> None:
    arpo = load_config(RUNS / "arpo-full.toml", ["--desktop.num_envs", "128", "--tasks.num_rollouts", "8"])
    arpo = arpo.model_copy(update={"tasks": arpo.tasks.model_copy(update={"max_steps": 15})})
    differing = {row.topic for row in diff_from_arpo(arpo) if row.run != row.code}
    assert differing == {
        "evaluator error",
        "trained tokens",
        "success buffer: can be disabled",
        "success buffer: content",
    }
    assert all(row.keys for row in diff_from_arpo(arpo) if row.topic in ("advantage", "clip", "reward", "batch"))


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_run_can_be_explained(path: Path) -> None:
    explanation = explanation_of(path)
    assert explanation.learner_memory is not None and explanation.timing is not None
    assert explanation.timing.update_s > 0 and explanation.learner_memory.total > 0
    assert not [remark for remark in explanation.remarks if "but a GPU has" in remark]


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [("smoke", (2, 2, 10, 1)), ("small", (8, 4, 12, 4)), ("full", (8, 4, 16, 10)), ("paper", (256, 8, 15, 15))],
)
def test_the_arpo_runs_have_the_sizes_of_arpos_stages(stage: str, sizes: tuple[int, int, int, int]) -> None:
    """Sizes are desktops, rollouts, steps and epochs."""
    config = load_config(RUNS / f"arpo-{stage}.toml")
    num_tasks = {"smoke": 4, "small": 32, "full": 128, "paper": 128}[stage]
    epochs = batch_sizes(config, num_tasks).num_epochs
    desktops, rollouts, steps, num_epochs = sizes
    assert (config.desktop.num_envs, config.tasks.num_rollouts, config.tasks.max_steps) == (desktops, rollouts, steps)
    assert epochs == num_epochs if stage != "smoke" else epochs is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--inference.max_model_len", "100"],
            "6 screenshots of 45 tokens have 270 tokens, more than",
        ),
        (
            ["--learner.grpo.num_minibatches", "33"],
            "num_minibatches = 33 optimizer steps, but an update has 32 episodes",
        ),
        (["--inference.max_images", "5"], "tasks.max_steps = 6 allows more screenshots in one prompt"),
    ],
)
def test_an_error_names_the_contradicting_keys(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        explanation_of(RUNS / "smoke.toml", *arguments, "--inference.max_action_tokens", "40")
    assert message in str(error.value)


def test_the_command_prints_a_json_document_without_importing_an_engine() -> None:
    program = (
        "import sys; from deskrl.cli.main import main\n"
        f"status = main(['explain', {str(RUNS / 'smoke.toml')!r}, '--json', '--env-step-s', '1.5'])\n"
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'transformers') if m in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"
    document = json.loads(result.stdout)
    assert (document["timing"]["env_step_s"], document["batches"]["episodes_per_update"]) == (1.5, 32)


def test_the_text_has_the_differences_from_arpo_and_the_translated_keys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from deskrl.analysis.explain.main import explain
    from deskrl.launch.arpo.translate import Note

    note = Note("worker.rollout.name", "vllm", "as it is")
    explain(load_config(RUNS / "smoke.toml"), [note], Assumptions(desktop_hour_price=0.25), as_document=False)
    text = capsys.readouterr().out
    for expected in (
        "paper",
        "ARPO's code",
        "this run",
        "8 tasks x 4 rollouts = 32",
        "h x 0.25 = ",
        "worker.rollout.name",
    ):
        assert expected in text
