"""Prometheus metrics of an actor process."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import Counter, Gauge, Histogram

from deskrl.proto.v1 import rollout_pb2

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)

ENV_STEPS = Counter("deskrl_actor_env_steps_total", "Steps completed.")
EPISODES = Counter("deskrl_actor_episodes_total", "Episodes with a result, by termination.", ["termination"])
FAULTS = Counter("deskrl_actor_faults_total", "Episodes ended by an infrastructure fault, by kind of fault.", ["kind"])
LEASES_LOST = Counter("deskrl_actor_leases_lost_total", "Episodes abandoned because their lease was lost.")
DESKTOPS_REPLACED = Counter("deskrl_actor_desktops_replaced_total", "Desktops closed and replaced by a fresh one.")
START_FAILURES = Counter("deskrl_actor_desktop_start_failures_total", "Starts and resets of desktops that failed.")
DESKTOPS = Gauge("deskrl_actor_desktops", "Desktops by state.", ["state"])
RESET_SECONDS = Histogram("deskrl_actor_reset_seconds", "Duration of a desktop's reset.", buckets=_SECONDS)
ACT_SECONDS = Histogram("deskrl_actor_act_seconds", "Duration of sampling one action.", buckets=_SECONDS)
TRANSPORT_SECONDS = Histogram(
    "deskrl_actor_act_transport_seconds",
    "Part of the sampling duration that the replica does not report: network, serialisation, failed attempts.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
SIMULATED_SECONDS = Counter(
    "deskrl_actor_simulated_seconds_total", "Simulated duration of simulated desktops, unscaled.", ["part"]
)
STEP_SECONDS = Histogram(
    "deskrl_actor_step_seconds", "Duration of one action on the desktop until the screen has settled.", buckets=_SECONDS
)


class DesktopState(StrEnum):
    """State of a desktop."""

    REPLACING = "replacing"
    SET_ASIDE = "set_aside"
    """Did not start; is retried with growing pauses."""
    RESETTING = "resetting"
    IDLE = "idle"
    SETTING_UP = "setting_up"
    WAITING_FOR_MODEL = "waiting_for_model"
    ACTING = "acting"
    WAITING_FOR_OTHERS = "waiting_for_others"
    EVALUATING = "evaluating"


def termination_label(termination: int) -> str:
    """Return the name of a termination in metrics and logs, such as `step_limit`."""
    return rollout_pb2.Termination.Name(termination).removeprefix("TERMINATION_").lower()


def fault_label(kind: int) -> str:
    """Return the name of a kind of fault in metrics and logs, such as `desktop_hung`."""
    return rollout_pb2.FaultKind.Name(kind).removeprefix("FAULT_KIND_").lower()


# Create all series at zero, so that `rate` counts the first event, and zero is distinguishable from not scraped.
for _state in DesktopState:
    DESKTOPS.labels(_state)
for _termination in rollout_pb2.Termination.DESCRIPTOR.values[1:]:  # the first is TERMINATION_UNSPECIFIED
    EPISODES.labels(termination_label(_termination.number))
for _kind in rollout_pb2.FaultKind.DESCRIPTOR.values[1:]:  # the first is FAULT_KIND_UNSPECIFIED
    FAULTS.labels(fault_label(_kind.number))


class StateGauge:
    """Contribution of one desktop to the gauge of states."""

    def __init__(self) -> None:
        self.state = DesktopState.REPLACING
        DESKTOPS.labels(self.state).inc()

    def enter(self, state: DesktopState) -> None:
        """Move the desktop to another state."""
        DESKTOPS.labels(self.state).dec()
        self.state = state
        DESKTOPS.labels(state).inc()

    def remove(self) -> None:
        """Remove the desktop from the gauge."""
        DESKTOPS.labels(self.state).dec()
