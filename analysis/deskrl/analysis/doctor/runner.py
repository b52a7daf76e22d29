"""Runs all checks of `deskrl doctor` and prints their results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from deskrl.actor.desktops.provider_registry import select_provider
from deskrl.actor.extensions import check_extensions
from deskrl.analysis.doctor import machine_checks, network_checks
from deskrl.analysis.doctor.check_result import CheckResult, Severity, failed, run_check
from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.foreign_variables import check_engine_variables
from deskrl.core.security.peer_identity import IdentityFiles
from deskrl.launch import preflight
from deskrl.models import model_checks

_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
_SEVERITY_WIDTH = max(map(len, Severity))


def doctor(config: RunConfig | None, roles: Sequence[str], chosen_keys: Collection[str] = ()) -> int:
    """Run all checks and print a line for each result; returns the exit status, 1 if there is an error.

    Args:
        config: run configuration; None to check only this machine, with the defaults.
        roles: roles that are to run on this machine.
        chosen_keys: keys of the ports that `deskrl up` chooses, which another run may use at present.
    """
    console = Console()
    num_errors = 0
    for result in run_checks(config, roles, chosen_keys):
        num_errors += result.severity is Severity.ERROR
        console.print(_line(result), soft_wrap=True)
    summary = "no problems found"
    if num_errors:
        summary = f"{num_errors} {'problem' if num_errors == 1 else 'problems'} found"
    console.print(summary, style="bold")
    return 1 if num_errors else 0


def run_checks(
    config: RunConfig | None, roles: Sequence[str], chosen_keys: Collection[str] = ()
) -> Iterator[CheckResult]:
    """Run all checks: first of this machine, then of the configuration, then of the run's servers.

    Raises:
        UserError: an extension of an actor cannot be used, so that nothing else can be checked.
    """
    settings = config or RunConfig()
    if "actor" in roles:
        check_extensions(settings)
    yield from machine_checks.packages(roles)
    if "actor" in roles:
        yield machine_checks.desktop(settings)
        if select_provider(settings.desktop).provider.runs_machine_programs:
            yield machine_checks.browser()
            yield machine_checks.desktop_users()
    if "learner" in roles or "inference" in roles:
        yield from machine_checks.gpu(roles)
    yield from machine_checks.memory(settings, roles)
    yield from machine_checks.disk(settings)
    yield run_check("environment", "no variable that engines misread", check_engine_variables)
    yield run_check("socket paths", "short enough", lambda: preflight.check_socket_paths(settings, roles))
    if config is None:
        return
    yield from _configuration(config, roles)
    yield from network_checks.certificates(config, roles)
    try:
        _load_identity(config, roles)
    except UserError as cause:
        yield failed("certificate of operator", cause)
        return
    yield from network_checks.servers(config, roles, chosen_keys)
    yield from network_checks.metrics_ports(config, roles, chosen_keys)


def _load_identity(config: RunConfig, roles: Sequence[str]) -> None:
    """Load the operator's identity, or that of a role of this machine if it has only this: health is open to all.

    Raises:
        UserError: the identity cannot be loaded or is not valid.
    """
    folder = config.security.certificates_dir
    present = [it for it in ("operator", *roles) if folder is not None and IdentityFiles(folder, it).key.exists()]
    rpc.load_own_identity(present[0] if present else "operator", folder)


def _configuration(config: RunConfig, roles: Sequence[str]) -> Iterator[CheckResult]:
    """Check the configuration, and the tasks and the model that it names."""
    yield run_check("configuration", "consistent", lambda: preflight.check_consistency(config))
    if "actor" in roles:
        from deskrl.actor import materialize_tasks

        yield run_check("tasks", "all can run on this machine", lambda: materialize_tasks.load(config))
    if (path := config.model.path) is not None and ("learner" in roles or "inference" in roles):
        yield run_check("model", str(path), lambda: model_checks.check_complete(path, config.model.architecture))


def _line(result: CheckResult) -> Text:
    """Format a result like the message of a UserError."""
    line = Text(result.severity.ljust(_SEVERITY_WIDTH), style=_STYLES[result.severity])
    line.append(f"  {result.subject}: ", style="bold")
    line.append(result.message, style="")
    if result.hint:
        line.append(f" (hint: {result.hint})")
    return line
