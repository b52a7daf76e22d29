"""Abilities of this machine's processor that tests depend on."""

from __future__ import annotations

from deskrl.core.errors import UserError
from deskrl.inference.int4_quantization import check_processor


def int4_problem() -> str:
    """Return why no 4-bit replica can run on this machine's processor; empty if one can."""
    try:
        check_processor()
    except UserError as error:
        return error.message
    return ""
