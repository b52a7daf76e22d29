"""Lets a CUDA build of torchvision be imported beside a CPU build of torch. Part of the environment, never of deskrl.

Such a torchvision cannot load its compiled operators, and then fails while it is imported, because it describes two of
them to torch ("operator torchvision::nms does not exist"). Image transforms, all that a Qwen2.5-VL processor wants,
need none of them. So the two are declared, without a body, just before torchvision runs.

`install_shim.py` copies this module into site-packages with a .pth file that calls `install` in every interpreter of
the environment, spawned workers included. It costs nothing until somebody imports torchvision.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _DeclareOperators(importlib.abc.Loader):
    """Runs torchvision as its own loader would, after the missing operators were declared."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        for name, schema in _SCHEMAS.items():
            torch.library.define(name, schema)
        self._loader.exec_module(module)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision where it lies and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclareOperators(spec.loader)
        return spec


def install() -> None:
    """Called by the .pth file when an interpreter starts."""
    sys.meta_path.insert(0, _TorchvisionFinder())
