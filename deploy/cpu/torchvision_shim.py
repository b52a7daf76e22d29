"""Makes a CUDA build of torchvision importable with a CPU build of torch. Part of the environment, not of deskrl.

Such a torchvision cannot load its compiled operators, and its import fails because it registers fake implementations
for two of them ("operator torchvision::nms does not exist"). The image transforms that a Qwen2.5-VL processor uses do
not need these operators. The shim therefore declares both, without implementation, before torchvision is executed.

`install_shim.py` copies this module into site-packages with a .pth file that calls `install` in every interpreter of
the environment, including spawned workers. It has no effect until torchvision is imported.
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
    """Loader that declares the missing operators and then executes torchvision with its own loader."""

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
    """Finder for torchvision only."""

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
    """Install the finder; the .pth file calls this when an interpreter starts."""
    sys.meta_path.insert(0, _TorchvisionFinder())
