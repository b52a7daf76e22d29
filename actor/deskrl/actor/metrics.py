"""What an actor process tells Prometheus of itself. Knows names and labels; those who do the work call it."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import Counter, Gauge, Histogram

from deskrl.proto.v1 import rollout_pb2

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)

ENV_STEPS = Counter("deskrl_actor_env_steps_total", "Turns of the policy that were played to their end.")
EPISODES = Counter("deskrl_actor_episodes_total", "Episodes with a result, by how they ended.", ["termination"])
FAULTS = Counter("deskrl_actor_faults_total", "Episodes that the infrastructure ended, by kind of fault.", ["kind"])
LEASES_LOST = Counter("deskrl_actor_leases_lost_total", "Episodes abandoned because their work was granted again.")
DESKTOPS_REPLACED = Counter("deskrl_actor_desktops_replaced_total", "Desktops closed and replaced by a fresh one.")
DESKTOPS = Gauge("deskrl_actor_desktops", "Desktops by what they are doing.", ["state"])
RESET_SECONDS = Histogram("deskrl_actor_reset_seconds", "Reset of a desktop.", buckets=_SECONDS)
ACT_SECONDS = Histogram("deskrl_actor_act_seconds", "One action from the served policy.", buckets=_SECONDS)
TRANSPORT_SECONDS = Histogram(
    "deskrl_actor_act_transport_seconds",
    "What an action took beyond what its replica accounts for: the wire, its coding, replicas asked in vain.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
SIMULATED_SECONDS = Counter(
    "deskrl_actor_simulated_seconds_total", "Time that simulated desktops were told to take, unscaled.", ["part"]
)
STEP_SECONDS = Histogram("deskrl_actor_step_seconds", "One action done and its screen settled.", buckets=_SECONDS)


class DesktopState(StrEnum):
    """What a desktop is doing, or what is being done to it."""

    REPLACING = "replacing"
    RESETTING = "resetting"
    IDLE = "idle"
    SETTING_UP = "setting_up"
    WAITING_FOR_MODEL = "waiting_for_model"
    ACTING = "acting"
    WAITING_FOR_OTHERS = "waiting_for_others"
    EVALUATING = "evaluating"


def termination_label(termination: int) -> str:
    """An episode's end as metrics and logs name it: `step_limit`."""
    return rollout_pb2.Termination.Name(termination).removeprefix("TERMINATION_").lower()


def fault_label(kind: int) -> str:
    """A kind of fault as metrics and logs name it: `desktop_hung`."""
    return rollout_pb2.FaultKind.Name(kind).removeprefix("FAULT_KIND_").lower()


# From the start all series are there, at zero: a rate sees the first one, and "none" is told apart from "not scraped".
for _state in DesktopState:
    DESKTOPS.labels(_state)
for _termination in rollout_pb2.Termination.DESCRIPTOR.values[1:]:  # the first is TERMINATION_UNSPECIFIED
    EPISODES.labels(termination_label(_termination.number))
for _kind in rollout_pb2.FaultKind.DESCRIPTOR.values[1:]:  # the first is FAULT_KIND_UNSPECIFIED
    FAULTS.labels(fault_label(_kind.number))


class StateGauge:
    """One desktop's place in the gauge of states: in exactly one state at a time."""

    def __init__(self) -> None:
        self.state = DesktopState.REPLACING
        DESKTOPS.labels(self.state).inc()

    def enter(self, state: DesktopState) -> None:
        """Move on to another state."""
        DESKTOPS.labels(self.state).dec()
        self.state = state
        DESKTOPS.labels(state).inc()

    def leave(self) -> None:
        """The desktop is no more."""
        DESKTOPS.labels(self.state).dec()
