"""Check of single values of the run configuration, for values that come from elsewhere, such as ARPO's files."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from deskrl.core.config.engine_arg_checks import check_engine_args
from deskrl.core.config.run import RunConfig

_ENGINE_ARGS = "inference.engine_args."


def value_problem(key: str, value: Any) -> str | None:
    """Return why a key of the run cannot have a value; None if it can.

    Checks that concern several keys are not made.

    Args:
        key: dotted key of the run, such as `learner.grpo.learning_rate`.
        value: value in the types of TOML.
    """
    if key.startswith(_ENGINE_ARGS):
        try:
            check_engine_args({key.removeprefix(_ENGINE_ARGS): value})
        except ValueError as error:
            return str(error)
        return None
    field = _field_of(key)
    adapter: TypeAdapter[Any] = TypeAdapter(
        Annotated[field.annotation, Field(), *field.metadata],  # type: ignore[arg-type]
        config=ConfigDict(allow_inf_nan=False),
    )
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


def _field_of(key: str) -> FieldInfo:
    schema: type[BaseModel] = RunConfig
    *sections, name = key.split(".")
    for section in sections:
        annotation = schema.model_fields[section].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        schema = next(kind for kind in kinds if issubclass(kind, BaseModel))
    return schema.model_fields[name]
