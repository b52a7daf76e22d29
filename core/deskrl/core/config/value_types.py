"""Value types and the section base class of the run configuration: every number is finite and bounded."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deskrl.core.addresses import HostPort, check_base_url, check_host

MAX_COUNT = 2**31 - 1
"""Largest count; engines keep such numbers in 32 bits."""
MAX_BYTES = 2**50
"""Largest size in bytes, a pebibyte."""
MAX_SECONDS = 366 * 24 * 3600
"""Longest duration in seconds, a year; timers of the operating system overflow at longer ones."""

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveBytes = Annotated[int, Field(ge=1, le=MAX_BYTES)]
NonNegativeBytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
NonNegativeSeconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveFactor = Annotated[float, Field(gt=0, le=1e6)]
NonNegativeFactor = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Sigma = Annotated[float, Field(ge=0, le=10)]
"""Standard deviation of the logarithm of a duration."""
Pixels = Annotated[int, Field(ge=1, le=32767)]
"""Width or height in pixels; X servers count them in 15 bits."""
Port = Annotated[int, Field(ge=0, le=65535)]
Days = Annotated[int, Field(ge=1, le=36500)]
Device = Annotated[int, Field(ge=0, le=1023)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""Seed of random number generators; NumPy accepts 32 bits."""

Address = HostPort
Host = Annotated[str, AfterValidator(check_host)]
HttpUrl = Annotated[str, AfterValidator(check_base_url)]


class Section(BaseModel):
    """Base class of the configuration's tables: immutable, unknown keys are rejected, attribute docstrings are help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
