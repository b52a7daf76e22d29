"""Tiny model: builds a model with the real architecture and a few million random parameters.

It serves smoke runs, tests and ablations on a CPU. Screenshots need few tokens (patches of 28 pixels merged 2 x 2), and
every coordinate is one token, so that a click takes two token decisions instead of six. The words that become single
tokens are taken from a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.learner.policy.architectures import (
    TINY_MERGE,
    TINY_PATCH_PIXELS,
    ChatFormat,
    LearnerArchitecture,
    check_transformers,
    load_learner_architecture,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 3072
MAX_LENGTH = 8192

_IMAGE_PROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": TINY_PATCH_PIXELS,
    "merge_size": TINY_MERGE,
}


def build_tiny_model(
    folder: Path,
    seed: int,
    image_size: tuple[int, int],
    corpus: Iterable[str],
    architecture: str = "qwen2_5_vl",
    largest_number: int = 0,
) -> None:
    """Write a model folder that transformers and vLLM load like any other of its architecture.

    Args:
        folder: model folder; created if missing, files of the same names are replaced.
        seed: seed of the random weights.
        image_size: width and height of the model's input images in pixels; multiples of 56.
        corpus: texts like those that the policy reads and writes; their words become tokens.
        architecture: name or import path of the model's architecture.
        largest_number: every number up to this or to the longer side of an image, whichever is larger, is one token.

    Raises:
        ValueError: `image_size` is not a multiple of 56.
        UserError: the architecture is unknown, or the installed transformers lacks it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    width, height = image_size
    unit = TINY_PATCH_PIXELS * TINY_MERGE
    if width % unit or height % unit:
        raise ValueError(f"image_size {image_size} is not a multiple of {unit}")
    part = load_learner_architecture(architecture)
    check_transformers(part.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, max(*image_size, largest_number), MAX_LENGTH, part.chat_format)
    tokenizer.save_pretrained(folder)
    vision = part.tiny_config()["vision_config"]
    settings = {**_IMAGE_PROCESSOR, "temporal_patch_size": vision.get("temporal_patch_size", 2)}
    # Screenshots of the expected size are not resized.
    write_image_processor(folder, part, settings, min_pixels=width * height, max_pixels=width * height)
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(_model_config(part, tokenizer))
    model.to(torch.float32).save_pretrained(folder)


def build_tokenizer(
    corpus: Iterable[str], largest_number: int, max_length: int, chat_format: ChatFormat
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a corpus; every number up to `largest_number` is a single token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # The opening of a call, its end, and each number are single pieces: a click is three pieces and two coordinates.
    pieces = Regex(r" ?[a-z_]+\([a-z_]+='(?:\(|<point>)?|(?:\)|</point>)?'\)| ?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer merges by frequency: the numbers are repeated so that they are merged before rare words.
    numbers = " ".join(str(number) for number in range(largest_number + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(chat_format.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, *[numbers] * 8], trainer)
    # Qwen2Tokenizer would restore its own pre-tokenizer, which splits numbers into digits.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=chat_format.eos_token,
        pad_token=chat_format.pad_token,
        additional_special_tokens=list(chat_format.special_tokens),
        model_max_length=max_length,
    )
    fast.chat_template = chat_format.template
    return fast


def write_image_processor(
    folder: Path, architecture: LearnerArchitecture, settings: Mapping[str, Any], min_pixels: int, max_pixels: int
) -> None:
    """Write the configuration of the image processor, and that of a video processor if the architecture has one.

    Args:
        folder: model folder.
        architecture: architecture, which determines the classes of the processor.
        settings: settings of this model, by transformers' names.
        min_pixels: smallest number of pixels; smaller images are enlarged.
        max_pixels: largest number of pixels; larger images are reduced.
    """
    kept = {
        "processor_class": architecture.processor_class,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **settings,
    }
    num_frames = settings["temporal_patch_size"] if architecture.counts_frames else 1
    kept["size"] = {"shortest_edge": num_frames * min_pixels, "longest_edge": num_frames * max_pixels}
    image = {"image_processor_type": architecture.image_processor_type, **kept}
    if not architecture.counts_frames:
        image |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    _write_json(folder / "preprocessor_config.json", image)
    if architecture.video_processor_type is not None:
        video = {"video_processor_type": architecture.video_processor_type, **kept}
        _write_json(folder / "video_preprocessor_config.json", video)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _model_config(architecture: LearnerArchitecture, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return transformers' configuration of the tiny model with a tokenizer's vocabulary."""
    from transformers import AutoConfig

    sizes, chat = architecture.tiny_config(), architecture.chat_format
    ids = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(chat.pad_token),
        "eos_token_id": tokenizer.convert_tokens_to_ids(chat.eos_token),
        "pad_token_id": tokenizer.convert_tokens_to_ids(chat.pad_token),
    }
    text = {
        **sizes["text_config"],
        **ids,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    return AutoConfig.for_model(
        architecture.model_type,
        text_config=text,
        vision_config=dict(sizes["vision_config"]),
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in chat.config_tokens.items()},
    )
