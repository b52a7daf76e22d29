"""Check of the processor for replicas with 4-bit weights on a CPU."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from deskrl.core.errors import UserError
from deskrl.inference import int4_quantization

AVX2, AVX512 = "flags\t\t: fpu sse4_2 avx avx2 bmi2\n", "flags\t\t: fpu avx avx2 avx512f avx512dq\n"


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that lists the abilities of an x86-64 processor."""
    monkeypatch.setattr(int4_quantization, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return tmp_path / "cpuinfo"


def test_a_processor_without_avx512_is_rejected_by_the_key_and_the_reason(processor: Path) -> None:
    processor.write_text(AVX2)
    with pytest.raises(
        UserError, match=r"inference.quantization = int4: .*AVX-512.*hint: unset inference.quantization"
    ):
        int4_quantization.check_processor()


def test_a_processor_with_avx512_is_accepted(processor: Path) -> None:
    processor.write_text(AVX512)
    int4_quantization.check_processor()


def test_a_processor_of_another_architecture_is_not_rejected(processor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.write_text("Features\t: fp asimd\n")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    int4_quantization.check_processor()
