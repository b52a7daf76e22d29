"""Jinja environment of the self-contained pages: run report and sweep report."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from deskrl.analysis import report
from deskrl.analysis.formatting import format_date, format_duration, format_percent, format_points


def template_environment() -> Environment:
    """Return the environment of the templates; it escapes every value."""
    environment = Environment(
        loader=PackageLoader(report.__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": format_duration,
        "points": format_points,
        "percent": format_percent,
        "date": format_date,
    }
    return environment


def read_asset(environment: Environment, name: str) -> str:
    """Return a style sheet or script from the template folder unchanged, to be inserted without escaping."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
