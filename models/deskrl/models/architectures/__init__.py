"""Model architectures: the tensors and sizes of a model by its config.json, as far as all roles need them."""

from deskrl.models.architectures.architecture_registry import ARCHITECTURES, architecture_of, load_architecture
from deskrl.models.architectures.model_architecture import (
    HEAD,
    Architecture,
    ConfigError,
    Shape,
    TensorLayout,
    VisionSizes,
)

__all__ = [
    "ARCHITECTURES",
    "HEAD",
    "Architecture",
    "ConfigError",
    "Shape",
    "TensorLayout",
    "VisionSizes",
    "architecture_of",
    "load_architecture",
]
