"""Loading of checkpoint tensors from buckets into a vLLM model that is already loaded.

If the parameters of the model hold the tensors of the checkpoint unchanged, buckets are copied into them in place; the
destination of each piece is determined once, by tracing the copies of the model's own loader. Otherwise (CPUs and
quantised layers repack what they load) vLLM's layerwise reload is used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deskrl.core.weights.buckets import Bucket

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointTensor:
    """Name, dtype and shape of a tensor in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class BucketLoader(Protocol):
    """Loads buckets, from any number of buffers."""

    def load(self, index: int, buffer: Tensor) -> None:
        """Load the tensors of bucket `index` from a buffer (uint8).

        The buffer may be overwritten once the current stream has reached this point.
        """

    def finish(self) -> None:
        """Complete the update after the last bucket."""


@dataclass(frozen=True)
class ParameterCopy:
    """Copy of a part of a checkpoint tensor into a part of a parameter."""

    destination: Tensor
    size: tuple[int, ...]
    """Shape of the part."""
    stride: tuple[int, ...]
    """Strides of the part in the checkpoint tensor."""
    offset: int
    """Index of the first element of the part in the checkpoint tensor."""


class CannotLoadInPlace(RuntimeError):
    """The parameters of the model are not plain copies of the tensors of its checkpoint."""


class _CopyRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records copies from meta tensors and fills, instead of executing them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.filled: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        if func is torch.ops.aten.fill_.Scalar and not args[0].is_meta:
            self.filled.append(args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


def trace_copies(model: Any, tensors: Sequence[CheckpointTensor]) -> list[list[ParameterCopy]]:
    """Return, for each tensor, the copies that the model's own loader would execute.

    Raises:
        CannotLoadInPlace: a tensor is not copied or is copied to something other than parameters, or a parameter is
            not covered completely.
    """
    sources = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
    owners = {_storage_id(tensor): index for index, tensor in enumerate(sources)}
    with _CopyRecorder() as recorder:
        model.load_weights(zip((tensor.name for tensor in tensors), sources, strict=True))
    found: list[list[ParameterCopy]] = [[] for _ in tensors]
    for destination, source in recorder.copies:
        if destination.shape != source.shape:
            raise CannotLoadInPlace(f"a copy broadcasts {tuple(source.shape)} to {tuple(destination.shape)}")
        if _storage_id(source) not in owners:
            raise CannotLoadInPlace("a copied value is computed from a tensor and not a part of it")
        copy = ParameterCopy(destination, tuple(source.shape), source.stride(), source.storage_offset())
        found[owners[_storage_id(source)]].append(copy)
    for tensor, copies in zip(tensors, found, strict=True):
        if not copies:
            raise CannotLoadInPlace(f"{tensor.name} is not copied into the model")
    _check_coverage(model, [*(destination for destination, _ in recorder.copies), *recorder.filled])
    return found


def _check_coverage(model: nn.Module, destinations: Sequence[Tensor]) -> None:
    """Raise CannotLoadInPlace unless the destinations are exactly all elements of all parameters."""
    num_missing = {_storage_id(p): p.untyped_storage().nbytes() // p.element_size() for p in model.parameters()}
    for destination in destinations:
        if _storage_id(destination) not in num_missing:
            raise CannotLoadInPlace(f"a destination of shape {tuple(destination.shape)} is not a parameter")
        num_missing[_storage_id(destination)] -= destination.numel()
    if any(num_missing.values()):
        raise CannotLoadInPlace("the elements of parameters and checkpoint differ")


def _storage_id(tensor: Tensor) -> int:
    """Return an identifier of the storage of a tensor, which meta tensors have too."""
    return int(tensor.untyped_storage()._cdata)


class InPlaceLoader:
    """Copies each piece into its part of a parameter: allocates nothing, and keeps captured CUDA graphs valid."""

    def __init__(self, model: nn.Module, tensors: Sequence[CheckpointTensor], buckets: Sequence[Bucket]) -> None:
        """Determine all destinations; raises CannotLoadInPlace if that is impossible."""
        self._copies = trace_copies(model, tensors)
        self._tensors = tensors
        self._buckets = buckets
        self._destinations = [
            [copy.destination for piece in bucket.pieces for copy in self._copies[piece.tensor]] for bucket in buckets
        ]

    def load(self, index: int, buffer: Tensor) -> None:
        """Implement `BucketLoader`."""
        sources = [
            view.as_strided(copy.size, copy.stride, view.storage_offset() + copy.offset)
            for piece in self._buckets[index].pieces
            for view in [_elements(buffer, piece.offset, piece.num_bytes, self._tensors[piece.tensor].dtype)]
            for copy in self._copies[piece.tensor]
        ]
        torch._foreach_copy_(self._destinations[index], sources)

    def finish(self) -> None:
        """Implement `BucketLoader`."""


class LayerwiseLoader:
    """Feeds buckets to vLLM's layerwise reload, which begins with the first bucket."""

    def __init__(
        self, model: Any, model_config: Any, tensors: Sequence[CheckpointTensor], buckets: Sequence[Bucket]
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._tensors = tensors
        self._buckets = buckets
        self._has_begun = False

    def load(self, index: int, buffer: Tensor) -> None:
        """Implement `BucketLoader`."""
        if not self._has_begun:
            begin_reload(self._model)
            self._has_begun = True
        tensors = [(self._tensors[piece.tensor], piece) for piece in self._buckets[index].pieces]
        # Cloned, because vLLM keeps the tensors until a layer is complete, and the buffer is reused before that.
        self._model.load_weights(
            (tensor.name, _elements(buffer, piece.offset, piece.num_bytes, tensor.dtype).view(tensor.shape).clone())
            for tensor, piece in tensors
        )

    def finish(self) -> None:
        """Implement `BucketLoader`."""
        finish_reload(self._model, self._model_config)
        self._has_begun = False


def make_bucket_loader(
    model: nn.Module, model_config: Any, tensors: Sequence[CheckpointTensor], buckets: Sequence[Bucket]
) -> BucketLoader:
    """Return a loader that copies in place if that is possible, else one that reloads layer by layer."""
    # On a CPU, vLLM keeps packed copies beside or instead of the parameters; quantised models hold other values.
    if next(model.parameters()).device.type != "cpu" and model_config.quantization is None:
        try:
            return InPlaceLoader(model, tensors, buckets)
        except Exception as error:  # a model's loader may raise anything when it gets meta tensors
            _log.warning("in-place loading is not possible, weights are loaded layer by layer: %s", error)
    return LayerwiseLoader(model, model_config, tensors, buckets)


def begin_reload(model: nn.Module) -> None:
    """Prepare a model for loading a checkpoint again.

    The reload is layerwise, because backends repack weights on loading and free the originals. Copying into the
    existing parameters would fail (on CPUs) or yield wrong values (in quantised layers).
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Repack the loaded weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    # The reload skips a head that is tied to the embedding, because no tensor of the checkpoint belongs to it. On a CPU
    # it would continue to use its packed copy of the old weights.
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def _elements(buffer: Tensor, offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    """Return the elements of a tensor in a buffer as a flat view."""
    return buffer[offset : offset + num_bytes].view(dtype)
