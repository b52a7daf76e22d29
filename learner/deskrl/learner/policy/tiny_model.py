"""Builds a tiny Qwen2-VL or Qwen2.5-VL: the real architecture and processor at a few million random parameters.

For smoke runs, tests and ablations on a CPU. Screenshots cost few tokens (patches of 28 pixels merged 2 x 2) and every
coordinate on such a screenshot is one token, so that a click is two decisions rather than six. Knows nothing of tasks:
the words that deserve tokens of their own come in as a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.families import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PATCH_PIXELS = 28
MERGE = 2
VOCAB_SIZE = 3072
MAX_LENGTH = 8192

# The names and roles are those of the published tokenizers, so that its processor and chat format work.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

TEXT: Mapping[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
_PATCHES = {"patch_size": PATCH_PIXELS, "temporal_patch_size": 1, "spatial_merge_size": MERGE}
VISION: Mapping[Architecture, Mapping[str, Any]] = {
    # Of this one embed_dim is the width, and hidden_size what comes out.
    "qwen2_vl": _PATCHES
    | {"depth": 2, "embed_dim": 128, "mlp_ratio": 2, "num_heads": 2, "hidden_size": TEXT["hidden_size"]},
    "qwen2_5_vl": _PATCHES
    | {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "out_hidden_size": TEXT["hidden_size"]}
    | {"window_size": 4 * PATCH_PIXELS * MERGE, "fullatt_block_indexes": [0, 1]},
}
"""About two and a half million parameters, by transformers' names."""

_PROCESSORS: Mapping[Architecture, str] = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
_IMAGE_PROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": PATCH_PIXELS,
    "temporal_patch_size": 1,
    "merge_size": MERGE,
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_model(
    folder: Path,
    seed: int,
    image_size: tuple[int, int],
    corpus: Iterable[str],
    architecture: Architecture = "qwen2_5_vl",
    largest_number: int = 0,
) -> None:
    """Write a model folder that transformers and vLLM load as any other of its architecture.

    Args:
        folder: made if absent; files of the same names are replaced.
        seed: of the random weights.
        image_size: (width, height) of screenshots as the policy sees them; multiples of 56.
        corpus: texts of the kind that the policy reads and writes; their words become tokens.
        architecture: which of the two.
        largest_number: up to this one, or up to the longer side if that is larger, every number is one token.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    width, height = image_size
    unit = PATCH_PIXELS * MERGE
    if width % unit or height % unit:
        raise ValueError(f"image_size {image_size} is not a multiple of {unit}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, max(*image_size, largest_number), MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    # A screenshot of the expected size passes through unresized.
    write_image_processor(folder, architecture, _IMAGE_PROCESSOR, min_pixels=width * height, max_pixels=width * height)
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(_model_config(architecture, tokenizer))
    model.to(torch.float32).save_pretrained(folder)


def build_tokenizer(corpus: Iterable[str], largest_number: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus, with every number up to `largest_number` a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A call's opening and its close are pieces, so is a number: a click is its name and two coordinates.
    pieces = Regex(r" ?[a-z_]+\([a-z_]+='(?:\(|<point>)?|(?:\)|</point>)?'\)| ?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer merges by frequency: the numbers come often enough to be merged before the rarest words.
    numbers = " ".join(str(number) for number in range(largest_number + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, *[numbers] * 8], trainer)
    # Not Qwen2Tokenizer: that class brings its own pre-tokenizer back, which parts numbers into digits.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=max_length,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def write_image_processor(
    folder: Path, architecture: Architecture, settings: Mapping[str, Any], min_pixels: int, max_pixels: int
) -> None:
    """The image half of a processor: what all of an architecture have, this model's settings, the bounds of scaling."""
    image = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": _PROCESSORS[architecture],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **settings,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")


def _model_config(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> Any:
    """TEXT and VISION with this tokenizer's vocabulary."""
    from transformers import AutoConfig

    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "dtype": "float32",
    }
    return AutoConfig.for_model(
        architecture,
        text_config=text,
        vision_config=dict(VISION[architecture]),
        tie_word_embeddings=True,
        dtype="float32",
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        bos_token_id=text["bos_token_id"],
        eos_token_id=text["eos_token_id"],
        pad_token_id=text["pad_token_id"],
    )
