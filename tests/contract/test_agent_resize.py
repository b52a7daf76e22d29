"""Image sizes: the agent computes the same size as the image processor; otherwise clicks would miss their targets."""

from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as processor_resize

from deskrl.actor.agent.ui_tars import UiTars15

QWEN_25_VL = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}


@given(st.integers(10, 8000), st.integers(10, 8000))
def test_the_agent_computes_the_image_size_of_the_processor(width: int, height: int) -> None:
    assume(max(width, height) / min(width, height) <= 200)  # the processor rejects narrower images
    seen_height, seen_width = processor_resize(height, width, **QWEN_25_VL)
    assert UiTars15().coordinate_range(width, height) == (seen_width, seen_height)
