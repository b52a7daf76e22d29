"""What `deskrl explain` says of activations against what torch keeps of the learner's own model."""

from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from deskrl.core.config import LearnerConfig
from deskrl.core.explain.memory import MicroBatch as Counted
from deskrl.core.explain.memory import activation_bytes
from deskrl.core.explain.shape import shape_of_config
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.policy import activations
from deskrl.learner.policy.model import Policy

TOKENS, TARGETS = 1024, 4
# The proportions of a 7B: an MLP of 5.3 hidden widths, seven heads for one of keys and values.
TEXT = {
    "vocab_size": 256,
    "hidden_size": 224,
    "intermediate_size": 1184,
    "num_hidden_layers": 4,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [0]}


def kept_bytes(kept: activations.Kept) -> int:
    """Bytes of all storages that autograd holds after a forward pass, parameters apart."""
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config={**VISION, "out_hidden_size": 224})
    policy = Policy(Qwen2_5_VLForConditionalGeneration(config), ())
    policy.model.model.visual.requires_grad_(False)
    activations.keep(policy.model.model.language_model, kept)
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
        image_places=(),
        position_N=places_N,
        target_N=ids_L[:TARGETS],
        behaviour_logprobs_N=torch.zeros(TARGETS),
        lag_N=torch.zeros(TARGETS, dtype=torch.long),
        trajectory_N=torch.zeros(TARGETS, dtype=torch.long),
    )
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        policy(micro, 1.0)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("kept", ["all", "layers"])
def test_what_a_micro_batch_keeps_is_what_is_told(kept: activations.Kept) -> None:
    """Within a fifth: on a CPU a norm is several operations, each with a copy, where a GPU has one."""
    shape = shape_of_config({"text_config": TEXT, "vision_config": VISION}, "small")
    learner = LearnerConfig(dtype="float32", activations=kept, freeze_vision=True)
    told = activation_bytes(learner, shape, Counted(TOKENS, 0, TARGETS))
    # Told is the peak of the backward pass; what one layer needs there is not kept.
    one_layer = 4 * TOKENS * (8 * shape.hidden + 4 * shape.intermediate) if kept != "all" else 0
    told -= one_layer + 4 * TOKENS * (3 * shape.intermediate + 2 * shape.hidden)
    # The last norm's input and result, whose logits are made: of no account beside 28 layers, but beside four.
    told += 2 * 4 * TOKENS * shape.hidden
    assert kept_bytes(kept) == pytest.approx(told, rel=0.2)
