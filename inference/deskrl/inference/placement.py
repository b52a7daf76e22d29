"""How tensors of a checkpoint, in buckets, get into a model of vLLM's that is already loaded.

Straight into the parameters where these still are what the checkpoint says: which piece goes where is found out once,
by watching the model's own loader copy. Else layer by layer, as vLLM reloads a checkpoint: a CPU and quantised layers
repack what they load. Knows vLLM's models; knows nothing of how buckets come.
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

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Placement(Protocol):
    """Takes buckets in any number of buffers."""

    def place(self, index: int, buffer: Tensor) -> None:
        """Load the tensors of bucket `index`; the buffer (uint8) is free once the current stream has got there."""

    def finish(self) -> None:
        """All buckets have been placed."""


@dataclass(frozen=True)
class Copy:
    """A piece of a tensor, and the part of a parameter that it becomes."""

    destination: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of its first element in the tensor."""


class CannotPlace(RuntimeError):
    """The model does not hold its checkpoint's tensors as they are."""


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what would be copied out of tensors without data, and what would be filled, instead of doing it."""

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


def watch(model: Any, tensors: Sequence[TensorShape]) -> list[list[Copy]]:
    """For each tensor, where the model's loader puts its pieces.

    Raises:
        CannotPlace: some tensor goes nowhere or elsewhere than into parameters, or a parameter is not wholly covered.
    """
    empty = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
    owners = {_storage(tensor): index for index, tensor in enumerate(empty)}
    with _Watcher() as watcher:
        model.load_weights(zip((tensor.name for tensor in tensors), empty, strict=True))
    found: list[list[Copy]] = [[] for _ in tensors]
    for destination, source in watcher.copies:
        if destination.shape != source.shape:
            raise CannotPlace(f"{tuple(source.shape)} is spread over {tuple(destination.shape)}")
        if _storage(source) not in owners:
            raise CannotPlace("what is loaded is computed from a tensor, not a part of it")
        copy = Copy(destination, tuple(source.shape), source.stride(), source.storage_offset())
        found[owners[_storage(source)]].append(copy)
    for tensor, copies in zip(tensors, found, strict=True):
        if not copies:
            raise CannotPlace(f"{tensor.name} is not copied anywhere")
    _check_cover(model, [*(destination for destination, _ in watcher.copies), *watcher.filled])
    return found


def _check_cover(model: nn.Module, destinations: Sequence[Tensor]) -> None:
    """Raise CannotPlace unless every element of every parameter is written, and nothing else is."""
    missing = {_storage(p): p.untyped_storage().nbytes() // p.element_size() for p in model.parameters()}
    for destination in destinations:
        if _storage(destination) not in missing:
            raise CannotPlace(f"{tuple(destination.shape)} goes into something that is no parameter")
        missing[_storage(destination)] -= destination.numel()
    if any(missing.values()):
        raise CannotPlace("parameters hold other elements than the checkpoint")


def _storage(tensor: Tensor) -> int:
    """Names the memory that a tensor is a view of, if there is any memory to it or not."""
    return int(tensor.untyped_storage()._cdata)


class InPlace:
    """Copies each piece into its part of a parameter: nothing is allocated, and captured CUDA graphs stay valid."""

    def __init__(self, model: nn.Module, tensors: Sequence[TensorShape], buckets: Sequence[Bucket]) -> None:
        """Find out where everything goes; raises CannotPlace if that is not where it could simply be copied to."""
        self._copies = watch(model, tensors)
        self._tensors = tensors
        self._buckets = buckets
        self._destinations = [
            [copy.destination for piece in bucket.pieces for copy in self._copies[piece.tensor]] for bucket in buckets
        ]

    def place(self, index: int, buffer: Tensor) -> None:
        """See `Placement`."""
        sources = [
            view.as_strided(copy.size, copy.stride, view.storage_offset() + copy.offset)
            for piece in self._buckets[index].pieces
            for view in [_elements(buffer, piece.offset, piece.num_bytes, self._tensors[piece.tensor].dtype)]
            for copy in self._copies[piece.tensor]
        ]
        torch._foreach_copy_(self._destinations[index], sources)

    def finish(self) -> None:
        """See `Placement`."""


class Layerwise:
    """vLLM's own reload of a checkpoint, fed bucket by bucket; begins with the first one."""

    def __init__(
        self, model: Any, model_config: Any, tensors: Sequence[TensorShape], buckets: Sequence[Bucket]
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._tensors = tensors
        self._buckets = buckets
        self._begun = False

    def place(self, index: int, buffer: Tensor) -> None:
        """See `Placement`."""
        if not self._begun:
            begin_reload(self._model)
            self._begun = True
        tensors = [(self._tensors[piece.tensor], piece) for piece in self._buckets[index].pieces]
        # Copies, because vLLM keeps what it is given until a layer is complete, and the buffer is needed before.
        self._model.load_weights(
            (tensor.name, _elements(buffer, piece.offset, piece.num_bytes, tensor.dtype).view(tensor.shape).clone())
            for tensor, piece in tensors
        )

    def finish(self) -> None:
        """See `Placement`."""
        finish_reload(self._model, self._model_config)
        self._begun = False


def make_placement(
    model: nn.Module, model_config: Any, tensors: Sequence[TensorShape], buckets: Sequence[Bucket]
) -> Placement:
    """In place where that can be done, layer by layer where not."""
    # A CPU keeps packed copies beside or instead of its parameters, and a quantised model other numbers.
    if next(model.parameters()).device.type != "cpu" and model_config.quantization is None:
        try:
            return InPlace(model, tensors, buckets)
        except Exception as error:  # whatever a loader does with a tensor that holds no data
            _LOG.warning("weights are loaded layer by layer, not in place: %s", error)
    return Layerwise(model, model_config, tensors, buckets)


def begin_reload(model: nn.Module) -> None:
    """Make the model ready to take a checkpoint again.

    Layer by layer matters: backends repack weights when they load them and free the originals, so that copying into the
    parameters that one finds would fail (on CPUs) or be wrong (quantised layers).
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Repack what was loaded."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    # A head that is tied to the embedding owns no tensor of a checkpoint, so the reload passes it by: on a CPU it
    # would go on with its packed copy of the old one.
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def _elements(buffer: Tensor, offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    """A tensor's elements in a bucket, flat."""
    return buffer[offset : offset + num_bytes].view(dtype)
