"""Checks of a model directory before anything starts: files, tensors, tokenizer, chat template, quantisation.

Only small files and the headers of weight files are read, so that errors appear within a second.
"""

from deskrl.models.model_checks.completeness import check_complete
from deskrl.models.model_checks.run_checks import (
    check_model_not_quantized,
    check_not_quantized,
    quantization_method,
)
from deskrl.models.model_checks.weights import fingerprint_weights

__all__ = [
    "check_complete",
    "check_model_not_quantized",
    "check_not_quantized",
    "fingerprint_weights",
    "quantization_method",
]
