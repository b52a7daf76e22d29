"""Causes of an episode's end: decides whether a problem is a failure of the policy or a fault of the infrastructure.

A failure is a result with reward 0 and a termination of its own. A fault has no reward, and the rollout is leased
again. After the policy's first action, whatever its own programs break until the evaluation has ended is its failure:
breaking the desktop or the evaluation must not be a way to avoid a low reward. A fault needs evidence on the host's
side. The first row that matches applies:

     1  the model was unreachable                                            fault      inference
     2  setup: the desktop was lost                                          fault      desktop_lost
     3  setup: any other problem                                             fault      task_setup
     4  first screenshot: it took too long                                   fault      desktop_hung
     5  first screenshot: any other problem                                  fault      desktop_lost
     6  the evaluator or a reward is defective, whatever the state is        fault      evaluator
     7  before the policy's first action: the desktop was lost               fault      desktop_lost
     8  before it, in the evaluation: any other problem                      fault      evaluator
     9  before it, elsewhere: any other problem                              fault      actor
    10  the host has evidence of another cause                               fault      desktop_lost
    11  the desktop was lost, and the host cannot observe it                 fault      connection_lost
    12  the desktop was lost                                                 failure    desktop_destroyed
    13  evaluation: any other problem                                        failure    state_unreadable
    14  any other problem                                                    failure    desktop_destroyed

Row 6 includes an evaluator's program that does not exist in the desktop's read-only folders: the policy cannot remove
one, and the folders of its PATH are not the policy's. A program in a folder that the policy can write to counts as
missing evidence (reward 0), an exit status of 127 of a program that exists is a result, and where the host cannot
observe the desktop, whose system the policy may have changed, a missing program is row 8 or 13.

Rows 10 to 14 apply after the policy's first action, which counts from the moment at which it is sent. In row 11 a
policy could be the cause; such faults are counted per task by the replay service, with an alert. A rollout that is no
longer leased, or whose actor is stopped, has no end: its lease is released or expires.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields
from enum import StrEnum

from deskrl.core.error_text import chain_of
from deskrl.proto.v1 import rollout_pb2


class Phase(StrEnum):
    """Part of an episode in which a problem occurred."""

    SETUP = "setup"
    FIRST_SCREENSHOT = "first screenshot"
    SAMPLING = "sampling"
    """The model samples an action, and the desktop is not used."""
    ACTING = "acting"
    """The action is executed, and the screen settles."""
    EVALUATING = "evaluating"


class Problem(StrEnum):
    """Kind of a problem."""

    MODEL_UNREACHABLE = "the model was unreachable"
    EVALUATOR_ERROR = "the evaluator is defective"
    """The evaluation would fail whatever the state of the desktop is, or a reward of the user's own failed, took too
    long or returned an invalid value: `EvaluatorError`."""
    DESKTOP_LOST = "the desktop was lost"
    """The desktop no longer exists, the connection to it was lost, or it does not answer a health check."""
    TIMEOUT = "it took too long"
    """An operation or the evaluation exceeded its time limit, although the desktop answers a health check."""
    OPERATION_FAILED = "an operation failed"
    """An operation on the desktop failed, although the desktop answers a health check."""
    STATE_UNREADABLE = "the state cannot be read"
    """The evaluation failed because of the state of the desktop: `UnreadableStateError`."""
    UNEXPECTED_ERROR = "an unexpected error"
    """An operation or the evaluation raised an exception of another type, possibly because of what the desktop sent."""


@dataclass(frozen=True)
class EndCause:
    """Everything that decides on an end."""

    phase: Phase
    problem: Problem
    has_acted: bool
    """Whether an action of the policy has been sent to the desktop."""
    can_observe_host: bool
    """Whether the host can tell who ended the desktop (`Desktop.can_observe_host`)."""
    has_host_evidence: bool
    """Whether the host has evidence of a cause outside the desktop (`Desktop.death_cause`, `machine_error`)."""


@dataclass(frozen=True)
class PolicyFailure:
    """The policy's failure: a result with reward 0."""

    termination: rollout_pb2.Termination


@dataclass(frozen=True)
class InfrastructureFault:
    """A fault: no result, and the rollout is leased again."""

    kind: rollout_pb2.FaultKind


def attribute_end(cause: EndCause) -> PolicyFailure | InfrastructureFault:
    """Return to whom a problem is attributed, by the table of this module."""
    return next(row.end for row in _TABLE if row.matches(cause))


@dataclass(frozen=True)
class _Row:
    """Row of the table; None matches any value."""

    end: PolicyFailure | InfrastructureFault
    phase: Phase | None = None
    problem: Problem | None = None
    has_acted: bool | None = None
    can_observe_host: bool | None = None
    has_host_evidence: bool | None = None

    def matches(self, cause: EndCause) -> bool:
        return all(getattr(self, field.name) in (None, getattr(cause, field.name)) for field in fields(cause))


_LOST = InfrastructureFault(rollout_pb2.FAULT_KIND_DESKTOP_LOST)
_TABLE = (
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_INFERENCE), problem=Problem.MODEL_UNREACHABLE),
    _Row(_LOST, Phase.SETUP, Problem.DESKTOP_LOST),
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_TASK_SETUP), Phase.SETUP),
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_DESKTOP_HUNG), Phase.FIRST_SCREENSHOT, Problem.TIMEOUT),
    _Row(_LOST, Phase.FIRST_SCREENSHOT),
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_EVALUATOR), problem=Problem.EVALUATOR_ERROR),
    _Row(_LOST, problem=Problem.DESKTOP_LOST, has_acted=False),
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_EVALUATOR), Phase.EVALUATING, has_acted=False),
    _Row(InfrastructureFault(rollout_pb2.FAULT_KIND_ACTOR), has_acted=False),
    _Row(_LOST, has_host_evidence=True),
    _Row(
        InfrastructureFault(rollout_pb2.FAULT_KIND_CONNECTION_LOST),
        problem=Problem.DESKTOP_LOST,
        can_observe_host=False,
    ),
    _Row(PolicyFailure(rollout_pb2.TERMINATION_DESKTOP_DESTROYED), problem=Problem.DESKTOP_LOST),
    _Row(PolicyFailure(rollout_pb2.TERMINATION_STATE_UNREADABLE), Phase.EVALUATING),
    _Row(PolicyFailure(rollout_pb2.TERMINATION_DESKTOP_DESTROYED)),
)

_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Errors of the actor's own system calls that only the actor's machine can cause."""


def machine_error(error: BaseException | None) -> str | None:
    """Return the error in a chain of exceptions that says that this machine lacks resources; None if there is none."""
    for cause in chain_of(error):
        if isinstance(cause, OSError) and cause.errno in _MACHINE_ERRORS:
            return f"{type(cause).__name__}: {cause}"
    return None
