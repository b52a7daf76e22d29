"""What values of a configuration are made of: their types, and the table. Knows no key."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveSeconds = Annotated[float, Field(gt=0)]
Device = Annotated[int, Field(ge=0)]


def refuse_no_address(value: str) -> str:
    """The value, if it is `host:port`; raises ValueError if not."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{value} is no host:port such as 127.0.0.1:7411")
    return value


Address = Annotated[str, AfterValidator(refuse_no_address)]


class Section(BaseModel):
    """A table of the TOML file: frozen, strict about names, its attribute docstrings are the help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
