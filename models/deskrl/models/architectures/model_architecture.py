"""Interface of a model architecture, and the checks of sizes in a config.json that architectures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deskrl.core.prompt_rendering import ImageSizing

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
MAX_LAYERS = 1024
_MAX_SIZE = 2**24

Shape = tuple[int, ...]


class ConfigError(ValueError):
    """A size in config.json is missing or invalid."""


@dataclass(frozen=True)
class TensorLayout:
    """Tensors that a model has, and properties that its tokenizer and image processor must match."""

    tensors: Mapping[str, Shape]
    """Shape of each tensor by its name in published models: `model.embed_tokens.weight`, `model.layers.0.…`,
    `model.norm.weight` and `lm_head.weight` of the language model, `visual.patch_embed.…`, `visual.blocks.0.…` and
    other names with the prefix `visual.` of the vision tower."""
    is_tied: bool
    """Whether the output head is the embedding matrix, so that it has no tensor of its own."""
    vocab_size: int
    """Number of rows of the embedding matrix."""
    patch_size: int
    merge_size: int
    token_ids: Mapping[str, int]
    """Ids of special tokens on which the model relies."""
    image_token: str = "<|image_pad|>"
    """Special token that stands for a part of a screenshot."""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of a vision tower that its tensors do not show."""

    intermediate_size: int
    """Width of the MLP of a block."""
    is_gated: bool
    """Whether the MLP of a block has a gate."""
    num_full_layers: int
    """Number of layers with attention over the whole screenshot; the others attend within windows."""
    window_patches: int
    """Number of patches of a window."""


class Architecture(ABC):
    """Facts about the models of one `model_type`. It holds no state and imports no engine.

    The image token is one of `prompt_rendering.IMAGE_TOKENS`, and the image processor scales as
    `prompt_rendering.ImageSizing` does. The part of the learner is registered under the same name:
    `deskrl.learner.policy.architectures`.
    """

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    title: ClassVar[str]
    """Name for users."""
    name_pattern: ClassVar[str] = r"(?!)"
    """Regular expression that recognises lower-case names of published models, for predictions without a folder."""
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Sizes in config.json of published models by their number of parameters in the name: "7b"."""
    published_sizing: ClassVar[ImageSizing] = ImageSizing(14, 2, min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
    """Image scaling of published models, for predictions without a folder."""

    @abstractmethod
    def layout(self, config: Mapping[str, Any]) -> TensorLayout:
        """Return the tensors of a model by the content of its config.json, nested (`text_config`) or flat.

        Raises:
            ConfigError: a size is missing or invalid, or sizes contradict each other.
        """

    @abstractmethod
    def vision_sizes(self, config: Mapping[str, Any]) -> VisionSizes:
        """Return further sizes of the vision tower, by which memory and time are predicted.

        Raises:
            ConfigError: a size is invalid.
        """


class Sizes:
    """Sizes in a table of config.json.

    Args:
        values: the table.
        prefix: name of the table with a dot, for errors.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def size(self, name: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        """Return a positive integer; raises ConfigError if it is none."""
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            shown = "missing" if value is None else f"not a whole number from 1 to {limit}"
            raise ConfigError(f"{self._prefix}{name} is {shown}")
        return value

    def factor(self, name: str, default: float) -> float:
        """Return a positive number; raises ConfigError if it is none."""
        value = self.values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1024:
            raise ConfigError(f"{self._prefix}{name} is not a number above 0")
        return value


def text_and_vision(config: Mapping[str, Any]) -> tuple[Sizes, Sizes]:
    """Return the sizes of the language model and of the vision tower.

    Raises:
        ConfigError: a table is not a JSON object.
    """
    inner, vision = config.get("text_config", {}), config.get("vision_config", {})
    if not isinstance(inner, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError("text_config and vision_config must be JSON objects")
    return Sizes({**config, **inner}), Sizes(vision, "vision_config.")


def language_tensors(
    text: Sizes, layer: Iterable[tuple[str, Shape]], num_features: int, tied: bool
) -> dict[str, Shape]:
    """Return the tensors of a language model: embedding, decoder layers, last norm and, unless it is tied, head.

    Args:
        text: sizes of the language model.
        layer: tensors of one decoder layer.
        num_features: number of features of an image token.
        tied: whether the head is the embedding.

    Raises:
        ConfigError: an image token has another number of features than a text token.
    """
    hidden, vocab = text.size("hidden_size"), text.size("vocab_size")
    if num_features != hidden:
        raise ConfigError(f"the vision tower's output has {num_features} features, but hidden_size is {hidden}")
    tensors: dict[str, Shape] = {EMBEDDING: (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors[HEAD] = (vocab, hidden)
    of_layer = list(layer)
    for index in range(text.size("num_hidden_layers", limit=MAX_LAYERS)):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in of_layer}
    return tensors


def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of a linear layer with a bias."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the output head is the embedding matrix."""
    inner = config.get("text_config", {})
    return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))


QWEN_TOKENS: Mapping[str, tuple[str, int]] = {
    "<|image_pad|>": ("image_token_id", 151655),
    "<|vision_start|>": ("vision_start_token_id", 151652),
    "<|vision_end|>": ("vision_end_token_id", 151653),
}
"""Key in config.json of the id of each special token of Qwen's models, and transformers' default."""


def read_token_ids(config: Mapping[str, Any], tokens: Mapping[str, tuple[str, int]] = QWEN_TOKENS) -> dict[str, int]:
    """Return the ids of special tokens.

    Args:
        config: content of config.json.
        tokens: key in config.json of the id of each token, and its default.

    Raises:
        ConfigError: a value is not an id.
    """
    ids = {token: config.get(key, default) for token, (key, default) in tokens.items()}
    for token, value in ids.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{tokens[token][0]} is not a token id")
    return ids
