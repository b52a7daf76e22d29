"""The predicted activation memory agrees with the tensors that autograd keeps of the learner's model."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from deskrl.core.config import LearnerConfig
from deskrl.launch.sizing.footprint import MicroBatchSize, activation_bytes
from deskrl.launch.sizing.model_shape import shape_from_config
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.policy import activation_checkpointing
from deskrl.learner.policy.policy_model import Policy

TOKENS, TARGETS = 1024, 4
_COMMON = {"vocab_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
TEXT: dict[str, dict[str, Any]] = {
    # Proportions of a 7B model: an MLP of 5.3 hidden widths, and seven query heads per key-value head.
    "qwen2_5_vl": {
        "hidden_size": 224,
        "intermediate_size": 1184,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_parameters": _ROPE,
    },
    # Proportions of the model of 4B, whose heads are together wider than the hidden states.
    "qwen3_vl": {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": _ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    # Proportions of the model of 9B.
    "glm4v": {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
    },
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"fullatt_block_indexes": [0]},
    "qwen3_vl": {"deepstack_visual_indexes": [0]},
    "glm4v": {},
}


def content_of(architecture: str) -> dict[str, Any]:
    """Return the configuration of a small model."""
    text = {**_COMMON, **TEXT[architecture]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, **VISION[architecture]}
    vision["out_hidden_size"] = text["hidden_size"]
    return {"model_type": architecture, "text_config": text, "vision_config": vision}


def kept_bytes(architecture: str, kept: activation_checkpointing.Mode) -> int:
    """Return the bytes of all storages, except parameters, that autograd keeps after a forward pass."""
    policy = Policy(AutoModelForImageTextToText.from_config(AutoConfig.for_model(**content_of(architecture))), ())
    policy.model.model.visual.requires_grad_(False)
    activation_checkpointing.enable(policy.model.model.language_model, kept)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    held: dict[int, Any] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    ids_L = torch.randint(256, (TOKENS,))
    places_N = torch.arange(TARGETS)
    micro = MicroBatch(
        input_ids_L=ids_L,
        position_ids_3L=torch.arange(TOKENS).repeat(3, 1),
        row_lengths=(TOKENS,),
        images=(),
        image_indices=(),
        position_N=places_N,
        target_N=ids_L[:TARGETS],
        behaviour_logprobs_N=torch.zeros(TARGETS),
        staleness_N=torch.zeros(TARGETS, dtype=torch.long),
        trajectory_N=torch.zeros(TARGETS, dtype=torch.long),
        turn_N=torch.zeros(TARGETS, dtype=torch.long),
    )
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        policy(micro, 1.0)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("architecture", TEXT)
@pytest.mark.parametrize("kept", ["off", "full"])
def test_predicted_activation_memory_agrees_with_autograd(
    architecture: str, kept: activation_checkpointing.Mode
) -> None:
    """The tolerance is a tenth."""
    shape = shape_from_config(content_of(architecture), "small")
    learner = LearnerConfig(dtype="float32", activation_checkpointing=kept, freeze_vision=True)
    predicted = activation_bytes(learner, shape, MicroBatchSize(TOKENS, 0, TARGETS))
    # Predicted is the peak of the backward pass; the working set of one layer is not kept.
    per_token = shape.norm_inputs + 2 * shape.hidden + 4 * shape.query_size + 4 * shape.intermediate
    one_layer = 4 * TOKENS * per_token if kept != "off" else 0
    predicted -= one_layer + 4 * TOKENS * (3 * shape.intermediate + 2 * shape.hidden)
    # Input and output of the last norm are not predicted: they are negligible beside 28 layers, but not beside four.
    predicted += 2 * 4 * TOKENS * shape.hidden
    if kept == "off":  # a norm keeps the normed input too on a CPU, where it is several operations
        predicted += 4 * 4 * TOKENS * shape.norm_inputs
    assert kept_bytes(architecture, kept) == pytest.approx(predicted, rel=0.1)
