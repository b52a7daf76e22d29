"""The learner's part of the model architectures: forward pass, faster layers and tiny models."""

from deskrl.learner.policy.architectures.chat_format import QWEN_CHAT, ChatFormat
from deskrl.learner.policy.architectures.learner_architecture import TINY_MERGE, TINY_PATCH_PIXELS, LearnerArchitecture
from deskrl.learner.policy.architectures.learner_architecture_registry import (
    LEARNER_ARCHITECTURES,
    check_architecture,
    check_transformers,
    load_learner_architecture,
)

__all__ = [
    "LEARNER_ARCHITECTURES",
    "QWEN_CHAT",
    "TINY_MERGE",
    "TINY_PATCH_PIXELS",
    "ChatFormat",
    "LearnerArchitecture",
    "check_architecture",
    "check_transformers",
    "load_learner_architecture",
]
