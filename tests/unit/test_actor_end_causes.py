"""Causes of an episode's end: every row of the table, and rules that hold for every combination of causes."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import pytest

from deskrl.actor.desktops.base import DesktopGone
from deskrl.actor.end_causes import (
    EndCause,
    InfrastructureFault,
    Phase,
    PolicyFailure,
    Problem,
    attribute_end,
    machine_error,
)
from deskrl.proto.v1 import rollout_pb2

LOST = rollout_pb2.FAULT_KIND_DESKTOP_LOST
EVALUATOR = rollout_pb2.FAULT_KIND_EVALUATOR
DESTROYED = rollout_pb2.TERMINATION_DESKTOP_DESTROYED
UNREADABLE = rollout_pb2.TERMINATION_STATE_UNREADABLE
BEFORE_THE_EPISODE = (Phase.SETUP, Phase.FIRST_SCREENSHOT)


def all_causes() -> Iterator[EndCause]:
    """Return every combination of causes."""
    answers = (False, True)
    for values in itertools.product(Phase, Problem, answers, answers, answers):
        yield EndCause(*values)


@pytest.mark.parametrize(
    ("cause", "fault"),
    [
        (EndCause(Phase.SAMPLING, Problem.MODEL_UNREACHABLE, True, True, False), rollout_pb2.FAULT_KIND_INFERENCE),
        (EndCause(Phase.SETUP, Problem.DESKTOP_LOST, False, True, False), LOST),
        (EndCause(Phase.SETUP, Problem.TIMEOUT, False, True, False), rollout_pb2.FAULT_KIND_TASK_SETUP),
        (EndCause(Phase.SETUP, Problem.EVALUATOR_ERROR, False, True, False), rollout_pb2.FAULT_KIND_TASK_SETUP),
        (EndCause(Phase.FIRST_SCREENSHOT, Problem.TIMEOUT, False, True, False), rollout_pb2.FAULT_KIND_DESKTOP_HUNG),
        (EndCause(Phase.FIRST_SCREENSHOT, Problem.OPERATION_FAILED, False, True, False), LOST),
        (EndCause(Phase.EVALUATING, Problem.EVALUATOR_ERROR, True, True, False), EVALUATOR),
        (EndCause(Phase.SAMPLING, Problem.DESKTOP_LOST, False, True, False), LOST),
        (EndCause(Phase.EVALUATING, Problem.TIMEOUT, False, True, False), EVALUATOR),
        (EndCause(Phase.EVALUATING, Problem.STATE_UNREADABLE, False, True, False), EVALUATOR),
        (EndCause(Phase.SAMPLING, Problem.UNEXPECTED_ERROR, False, True, False), rollout_pb2.FAULT_KIND_ACTOR),
        (EndCause(Phase.ACTING, Problem.DESKTOP_LOST, True, True, True), LOST),
        (EndCause(Phase.EVALUATING, Problem.UNEXPECTED_ERROR, True, False, True), LOST),
        (EndCause(Phase.SAMPLING, Problem.DESKTOP_LOST, True, False, False), rollout_pb2.FAULT_KIND_CONNECTION_LOST),
        (EndCause(Phase.EVALUATING, Problem.DESKTOP_LOST, True, False, False), rollout_pb2.FAULT_KIND_CONNECTION_LOST),
    ],
)
def test_a_fault_has_a_cause_outside_the_policy(cause: EndCause, fault: rollout_pb2.FaultKind) -> None:
    assert attribute_end(cause) == InfrastructureFault(fault)


@pytest.mark.parametrize(
    ("phase", "problem", "can_observe_host", "termination"),
    [
        (Phase.SAMPLING, Problem.DESKTOP_LOST, True, DESTROYED),
        (Phase.ACTING, Problem.DESKTOP_LOST, True, DESTROYED),
        (Phase.EVALUATING, Problem.DESKTOP_LOST, True, DESTROYED),
        (Phase.ACTING, Problem.TIMEOUT, True, DESTROYED),
        (Phase.ACTING, Problem.OPERATION_FAILED, True, DESTROYED),
        (Phase.ACTING, Problem.UNEXPECTED_ERROR, True, DESTROYED),
        (Phase.EVALUATING, Problem.TIMEOUT, True, UNREADABLE),
        (Phase.EVALUATING, Problem.OPERATION_FAILED, True, UNREADABLE),
        (Phase.EVALUATING, Problem.STATE_UNREADABLE, True, UNREADABLE),
        (Phase.EVALUATING, Problem.UNEXPECTED_ERROR, True, UNREADABLE),
        (Phase.ACTING, Problem.TIMEOUT, False, DESTROYED),
        (Phase.EVALUATING, Problem.STATE_UNREADABLE, False, UNREADABLE),
    ],
)
def test_what_breaks_after_an_action_is_the_failure_of_the_policy(
    phase: Phase, problem: Problem, can_observe_host: bool, termination: rollout_pb2.Termination
) -> None:
    assert attribute_end(EndCause(phase, problem, True, can_observe_host, False)) == PolicyFailure(termination)


def test_the_policy_never_fails_before_its_first_action() -> None:
    for cause in all_causes():
        if not cause.has_acted or cause.phase in BEFORE_THE_EPISODE:
            assert isinstance(attribute_end(cause), InfrastructureFault), cause


def test_after_an_action_only_evidence_outside_the_desktop_makes_a_fault() -> None:
    for cause in all_causes():
        if not cause.has_acted or cause.phase in BEFORE_THE_EPISODE:
            continue
        is_independent = cause.problem in (Problem.MODEL_UNREACHABLE, Problem.EVALUATOR_ERROR)
        is_unobservable_loss = cause.problem is Problem.DESKTOP_LOST and not cause.can_observe_host
        is_fault = is_independent or cause.has_host_evidence or is_unobservable_loss
        assert isinstance(attribute_end(cause), InfrastructureFault) == is_fault, cause


def test_only_the_loss_of_a_desktop_that_the_host_cannot_observe_is_counted_as_a_lost_connection() -> None:
    for cause in all_causes():
        if attribute_end(cause) == InfrastructureFault(rollout_pb2.FAULT_KIND_CONNECTION_LOST):
            assert cause.has_acted and cause.problem is Problem.DESKTOP_LOST, cause
            assert not cause.can_observe_host and not cause.has_host_evidence, cause


def test_only_an_evaluation_on_a_desktop_that_responds_is_an_unreadable_state() -> None:
    for cause in all_causes():
        if attribute_end(cause) == PolicyFailure(UNREADABLE):
            assert cause.phase is Phase.EVALUATING and cause.problem is not Problem.DESKTOP_LOST, cause


def test_a_lack_of_descriptors_or_space_of_the_machine_is_found_behind_another_error() -> None:
    try:
        try:
            raise OSError(errno.EMFILE, "too many open files")
        except OSError as cause:
            raise DesktopGone("cannot connect") from cause
    except DesktopGone as error:
        assert "too many open files" in (machine_error(error) or "")
    assert machine_error(DesktopGone("cannot connect")) is None
    assert machine_error(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
