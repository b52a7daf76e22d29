"""The agent's idea of the size that the model sees is the processor's own, or every click would be off."""

from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as processor_resize

from deskrl.core.families import FAMILIES

QWEN_25_VL = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}


@given(st.integers(10, 8000), st.integers(10, 8000))
def test_the_agent_resizes_as_the_processor_does(width: int, height: int) -> None:
    assume(max(width, height) / min(width, height) <= 200)  # the processor refuses narrower images
    seen_height, seen_width = processor_resize(height, width, **QWEN_25_VL)
    assert FAMILIES["ui_tars_1_5"].span(width, height) == (seen_width, seen_height)
