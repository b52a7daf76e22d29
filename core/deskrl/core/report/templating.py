"""The templates of pages that need nothing but themselves, their style sheet and script. Knows no page."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from deskrl.core.report import page


def templates() -> Environment:
    """All templates; whatever is put into them is escaped."""
    environment = Environment(
        loader=PackageLoader("deskrl.core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "span": page.span_text,
        "points": page.points_text,
        "percent": page.percent_text,
        "date": page.date_text,
    }
    return environment


def source(environment: Environment, name: str) -> str:
    """A file beside the templates, as it is: our own text, which needs no escaping."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
