"""LoRA: adds adapters of the peft library to a model's linear layers, and saves, loads, disables and merges them.

Adapters are injected after the layers were replaced by faster versions. Names and values are those of peft, so that its
own functions load a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core import ids
from deskrl.core.config import LoraConfig
from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from deskrl.learner.policy.architectures import LearnerArchitecture

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter, by peft's names."""
_ADAPTER = "default"
"""Name of the adapter in the layers; files leave it out."""
_FILE_PREFIX = "base_model.model."
"""Prefix of the names in a file, which is that of peft's own wrapper around the model."""


class Adapter:
    """LoRA adapter in the layers of a model.

    Args:
        model: transformers model, whose parameters are frozen. Its layers were replaced by the architecture.
        architecture: architecture of the model.
        config: rank, scale and layers.
        seed: seed of the initial values; the product of an adapter's matrices is 0 at first.

    Raises:
        UserError: no layer has the name of a target.
        ModuleNotFoundError: peft is not installed.
    """

    def __init__(self, model: Any, architecture: LearnerArchitecture, config: LoraConfig, seed: int) -> None:
        import torch
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        dtype = next(model.parameters()).dtype
        names = target_names(model, architecture, config)
        self._config: Any = PeftConfig(
            r=config.rank,
            lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
            target_modules=_pattern(model, architecture, config),
            exclude_modules=_exclusions(model, architecture, config, names) or None,
            lora_dropout=0.0,
            bias="none",
        )
        with torch.random.fork_rng():
            torch.manual_seed(ids.derive_seed(seed, "lora") % 2**63)
            inject_adapter_in_model(self._config, model, _ADAPTER)
        self._layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
        assert self._layers.keys() == set(names)
        for layer in self._layers.values():
            # peft's own forward pass adds the output of the adapter to that of the layer, whereas replicas serve merged
            # weights, whose rounding changes the logprobs. Only the forward pass is replaced, because peft's functions
            # depend on the modules and their names.
            layer.forward = partial(_forward, layer)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        self._by_weight = {id(layer.get_base_layer().weight): layer for layer in self._layers.values()}

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the adapter, which are the only trainable ones of the model."""
        return list(self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of the adapter by their names in files; shards under ZeRO 3."""
        return {
            f"{_FILE_PREFIX}{name}.{part}.weight": getattr(layer, part)[_ADAPTER].weight
            for name, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        }

    def layers(self) -> list[Any]:
        """Return the layers with an adapter; each computes with the parameters of all modules in it."""
        return list(self._layers.values())

    def needed_for(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that `merged` needs, in addition to the weights themselves, for some of the model."""
        layers = [layer for weight in weights if (layer := self._by_weight.get(id(weight))) is not None]
        return [getattr(layer, part)[_ADAPTER].weight for layer in layers for part in ("lora_A", "lora_B")]

    def merged(self, weight: Tensor) -> Tensor:
        """Return a live weight of the model with the adapter added, a new tensor; others are returned as they are."""
        from deskrl.learner.policy.merged_linear import merge

        layer = self._by_weight.get(id(weight))
        return weight if layer is None else merge(weight, *_matrices(layer), layer.scaling[_ADAPTER])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute without the adapter within the context, which is for forward passes without gradient."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def save_config(self, folder: Path, base: Path) -> None:
        """Write `adapter_config.json`, by which peft loads the adapter.

        Args:
            folder: folder of the adapter.
            base: folder of the model that it belongs to.
        """
        self._config.base_model_name_or_path = str(base.absolute())
        self._config.save_pretrained(folder)

    def read(self, folder: Path) -> list[tuple[Any, Tensor]]:
        """Return the live tensors of the adapter, each with its value in a folder.

        Raises:
            ValueError: the file has other tensors.
        """
        from safetensors.torch import load_file

        held, read = self.tensors(), load_file(folder / WEIGHTS)
        if held.keys() != read.keys():
            raise ValueError(f"the tensors of {WEIGHTS} are not those of the adapter that is trained")
        return [(tensor, read[name].to(tensor.device)) for name, tensor in held.items()]


def checkpoint_name(name: str) -> str | None:
    """Return the name of a tensor in a model without adapters; None for tensors of adapters."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def select_layers(names: Collection[str], targets: Sequence[str], key: str) -> list[str]:
    """Return the names of layers that end with one of the targets.

    Args:
        names: names of the linear layers of a part of the model.
        targets: last parts of names.
        key: configuration key of the targets, for errors.

    Raises:
        UserError: no layer has the name of a target.
    """
    for target in targets:
        if not any(_ends_with(name, target) for name in names):
            last_parts = {name.rpartition(".")[2] for name in names}
            known = ", ".join(sorted(part for part in last_parts if not part.isdigit()))
            raise UserError(f"{key}: no linear layer of the model is called {target}", f"choose from {known}")
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def select_all(language: Mapping[str, Any], vision: Mapping[str, Any], config: LoraConfig) -> list[Any]:
    """Return the values of the layers that get an adapter, by the names of the linear layers of both parts.

    Raises:
        UserError: no layer has the name of a target.
    """
    parts = ((language, config.targets, "targets"), (vision, config.vision_targets, "vision_targets"))
    return [
        layers[name] for layers, targets, key in parts for name in select_layers(layers, targets, f"learner.lora.{key}")
    ]


def target_names(model: Any, architecture: LearnerArchitecture, config: LoraConfig) -> list[str]:
    """Return the names of a model's layers that get an adapter; raises UserError as `select_layers` does."""
    from torch import nn

    def linear_layers(part: Any) -> dict[str, str]:
        return {
            name: f"{_name_of(model, part)}.{name}"
            for name, layer in part.named_modules()
            if isinstance(layer, nn.Linear)
        }

    return select_all(
        linear_layers(architecture.language_model(model)), linear_layers(architecture.vision_tower(model)), config
    )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _name_of(model: Any, part: Any) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is part]
    return names[0]


def _pattern(model: Any, architecture: LearnerArchitecture, config: LoraConfig) -> str:
    """Return the regular expression of the names of all layers that get an adapter."""
    parts = (
        (architecture.language_model(model), config.targets),
        (architecture.vision_tower(model), config.vision_targets),
    )
    return "|".join(
        rf"{re.escape(_name_of(model, part))}\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"
        for part, targets in parts
        if targets
    )


def _exclusions(model: Any, architecture: LearnerArchitecture, config: LoraConfig, names: Collection[str]) -> list[str]:
    """Return the names that the pattern matches although they are not linear layers, such as convolutions."""
    pattern = re.compile(_pattern(model, architecture, config))
    return [name for name, _ in model.named_modules() if pattern.fullmatch(name) and name not in names]


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """Return both matrices of the adapter of a layer, of shapes (rank, in features) and (out features, rank)."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _forward(layer: Any, hidden: Tensor) -> Tensor:
    """Compute a layer with the merged weight, or without its adapter while it is disabled."""
    from deskrl.learner.policy.fused_layers import AlignedLinear
    from deskrl.learner.policy.merged_linear import merged_linear

    base = layer.get_base_layer()
    if layer.disable_adapters:
        output: Tensor = base(hidden)
        return output
    num_zeros = (base.num_in, base.num_out) if isinstance(base, AlignedLinear) else (0, 0)
    return merged_linear(hidden, base.weight, base.bias, *_matrices(layer), layer.scaling[_ADAPTER], num_zeros)
