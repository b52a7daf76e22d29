"""Interface of the learner's part of a model architecture. Suffixes: L positions of all rows, D hidden size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from deskrl.learner.policy.architectures.chat_format import QWEN_CHAT, ChatFormat

if TYPE_CHECKING:
    from torch import Tensor

    from deskrl.learner.batches.collator import MicroBatch

TINY_PATCH_PIXELS = 28
"""Side of a patch of a tiny model in pixels."""
TINY_MERGE = 2
"""Side of the square of a tiny model's patches that makes one image token."""


class LearnerArchitecture(ABC):
    """What the learner does with transformers' models of one architecture. It holds no state.

    `deskrl.models.architectures.Architecture` has the facts that all roles need and is registered under the same name.
    It is another class because `models` imports no engine; one class of your own may derive from both. Import engines
    in the bodies of methods only: the sizes of a tiny model are also read without them.
    """

    model_type: ClassVar[str]
    """`model_type` in config.json, by which transformers finds the classes of the model."""
    processor_class: ClassVar[str]
    """Name of transformers' processor."""
    image_processor_type: ClassVar[str] = "Qwen2VLImageProcessor"
    """Name of transformers' image processor."""
    video_processor_type: ClassVar[str | None] = None
    """Name of transformers' video processor; None if neither the processor nor vLLM needs one."""
    counts_frames: ClassVar[bool] = False
    """Whether the limits of the image processor count the pixels of all frames of a still image."""
    chat_format: ClassVar[ChatFormat] = QWEN_CHAT
    """Special tokens and chat template of a tiny model."""

    @abstractmethod
    def tiny_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Return `text_config` and `vision_config` of a model with a few million parameters, by transformers' names.

        Patches have `TINY_PATCH_PIXELS` and are merged `TINY_MERGE` x `TINY_MERGE`; vocabulary and ids of tokens are
        left out.
        """

    @abstractmethod
    def language_model(self, model: Any) -> Any:
        """Return the decoder layers of a model as one module."""

    @abstractmethod
    def vision_tower(self, model: Any) -> Any:
        """Return the vision tower of a model as one module."""

    @abstractmethod
    def install(self, model: Any) -> None:
        """Replace attention and slow layers in place. Names and values of parameters, and results, do not change.

        The attention of the language model must separate rows by their lengths, as `varlen_attention` does.
        """

    @abstractmethod
    def position_ids(
        self, model: Any, input_ids_1L: Tensor, image_mask_1L: Tensor, grid_thw_U3: Tensor | None
    ) -> Tensor:
        """Return the position ids of one row, of shape (3, 1, L).

        Args:
            model: transformers model.
            input_ids_1L: token ids of the row.
            image_mask_1L: 1 at the tokens of screenshots, otherwise 0.
            grid_thw_U3: number of patches of each screenshot in time, height and width; None if there is none.
        """

    @abstractmethod
    def encode_images(self, model: Any, pixel_values: Tensor, grid_thw_U3: Tensor) -> Sequence[Tensor]:
        """Return the features of each screenshot: a tensor with one row for each image token, of any width.

        They are all that `hidden_states` needs of a screenshot, because they are cached if the tower is frozen.

        Args:
            model: transformers model.
            pixel_values: patches of all screenshots.
            grid_thw_U3: number of patches of each screenshot in time, height and width.
        """

    @abstractmethod
    def hidden_states(self, model: Any, batch: MicroBatch, features: Tensor | None) -> Tensor:
        """Return the last hidden states of a micro-batch, of shape (L, D). No row attends to another one.

        Args:
            model: transformers model.
            batch: rows of tokens, on the model's device.
            features: features of the screenshots in `batch.image_indices`, in order; None if there are none.
        """


def embed_tokens(model: Any, batch: MicroBatch, features: Tensor | None) -> Tensor:
    """Return the token embeddings of a micro-batch, of shape (L, D), with features at the positions of image tokens.

    Args:
        model: transformers model whose configuration has an `image_token_id`.
        batch: rows of tokens, on the model's device.
        features: features of the image tokens in order, of shape (image tokens, D); None if there are none.
    """
    embeds_LD: Tensor = model.model.get_input_embeddings()(batch.input_ids_L)
    if features is None:
        return embeds_LD
    is_image_L1 = (batch.input_ids_L == model.config.image_token_id)[:, None]
    return embeds_LD.masked_scatter(is_image_L1, features.to(embeds_LD.dtype))
