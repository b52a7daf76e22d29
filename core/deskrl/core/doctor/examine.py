"""The order of the checks, and their lines. Knows every check by name, and none by what it does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from deskrl.core import model_folder, rpc
from deskrl.core.config import RunConfig
from deskrl.core.doctor import machine, network
from deskrl.core.doctor.findings import Finding, Mark, attempt, bad
from deskrl.core.errors import UserError
from deskrl.core.running import preflight

_SIGNS = {Mark.GOOD: ("ok  ", "green"), Mark.NOTE: ("note", "yellow"), Mark.BAD: ("BAD ", "bold red")}


def doctor(config: RunConfig | None, roles: Sequence[str]) -> int:
    """Examine this machine and print a line for each thing; returns 0 if nothing has to be mended, else 1.

    Args:
        config: of a run; None: of any, so that what only a configuration tells is left out.
        roles: which are to run on this machine.
    """
    console = Console()
    num_bad = 0
    for finding in examine(config, roles):
        num_bad += finding.mark is Mark.BAD
        console.print(_line(finding), soft_wrap=True)
    verdict = f"{num_bad} to mend" if num_bad else "nothing to mend"
    console.print(verdict, style="bold")
    return 1 if num_bad else 0


def examine(config: RunConfig | None, roles: Sequence[str]) -> Iterator[Finding]:
    """All findings, from the machine to the run and to its other machines."""
    settings = config or RunConfig()
    yield from machine.packages(roles)
    if "actor" in roles:
        yield machine.desktop(settings)
    if "learner" in roles or "inference" in roles:
        yield from machine.gpu(roles)
    yield from machine.memory(settings, roles)
    yield from machine.disk(settings)
    if config is None:
        return
    yield from _configuration(config, roles)
    yield from network.certificates(config, roles)
    try:
        rpc.identify_as("operator", config.security.folder)
    except UserError as error:
        yield bad("certificate of operator", error.message, error.mend)
        return
    yield from network.servers(config, roles)
    yield from network.metrics_ports(config, roles)


def _configuration(config: RunConfig, roles: Sequence[str]) -> Iterator[Finding]:
    """What the run's own roles say of their part of it."""
    yield attempt("configuration", "no contradictions", lambda: preflight.refuse_contradictions(config))
    if "actor" in roles:
        prepare = importlib.import_module("deskrl.actor.prepare")
        yield attempt("tasks", "all can be played", lambda: prepare.load(config))
    if (path := config.model.path) is not None and ("learner" in roles or "inference" in roles):
        yield attempt("model", str(path), lambda: model_folder.refuse_incomplete(path))


def _line(finding: Finding) -> Text:
    sign, style = _SIGNS[finding.mark]
    line = Text(sign, style=style)
    line.append(f"  {finding.what}: ", style="bold")
    line.append(finding.detail, style="")
    if finding.mend:
        line.append(f"; {finding.mend}")
    return line
