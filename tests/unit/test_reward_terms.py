"""Terms of the reward apart: from the evidence of an episode to the learner's records, gauges and the viewer's text."""

from __future__ import annotations

import json

import pytest
from prometheus_client import REGISTRY

from deskrl.analysis.formatting import format_evidence
from deskrl.core.reward_evidence import reward_terms
from deskrl.learner.episode_types import TaskGroup, Trajectory, decode_episode
from deskrl.learner.metrics import prometheus
from deskrl.learner.metrics.metric_records import evaluation_record
from deskrl.proto.v1 import replay_pb2, rollout_pb2

EVIDENCE = json.dumps({"terms": {"task": 1.0, "brevity": 0.5}, "evidence": {"task": {"checks": []}}})


def episode(evidence_json: str) -> Trajectory:
    result = rollout_pb2.EpisodeResult(reward=0.75, evidence_json=evidence_json)
    return decode_episode(replay_pb2.Episode(episode_id="e", task_id="a", result=result))


@pytest.mark.parametrize(
    "evidence",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "null",
        '{"checks": []}',
        '{"destroyed": "gone"}',
        '{"terms": 1}',
        '{"evaluation": ""}',
    ],
)
def test_other_evidence_has_no_terms(evidence: str) -> None:
    assert reward_terms(evidence) == {}


def test_terms_of_an_evaluation_after_a_format_error_are_found() -> None:
    nested = json.dumps({"format_error": "no action", "evaluation": json.loads(EVIDENCE)})
    assert reward_terms(nested) == reward_terms(EVIDENCE) == {"task": 1.0, "brevity": 0.5}


def test_records_have_the_mean_of_each_term_over_the_episodes_that_were_evaluated() -> None:
    other = json.dumps({"terms": {"task": 0.0, "brevity": 1.0}})
    members = (episode(EVIDENCE), episode(other), episode('{"destroyed": "the desktop is gone"}'))
    record = evaluation_record([TaskGroup("g", "a", members)], 0, 0.1, (None, None))
    assert record["reward_terms"] == {"task": 0.5, "brevity": 0.75}
    alone = evaluation_record([TaskGroup("g", "a", (episode('{"checks": []}'),))], 0, 0.1, (None, None))
    assert alone["reward_terms"] == {}


def test_an_update_sets_the_gauge_of_each_term() -> None:
    counts = {"dropped": {}, "replayed": 0, "num_trajectories": 0, "num_tokens": 0, "per_task": {}, "applied": True}
    gauges = dict.fromkeys(
        ("loss", "success_rate", "average_reward", "gradient_norm", "clip_fraction", "entropy", "kl", "mismatch_max"),
        None,
    )
    late = {"lagged_difference_mean": None, "staleness_max": None}
    prometheus.observe_update(counts | gauges | late | {"reward_terms": {"brevity": 0.25}}, {}, {})
    assert REGISTRY.get_sample_value("deskrl_learner_reward_term_mean", {"term": "brevity"}) == 0.25


def test_the_viewer_shows_the_terms_first() -> None:
    assert format_evidence(EVIDENCE).splitlines()[0] == "reward terms: task 1, brevity 0.5"
    assert format_evidence('{"terms": "as text"}') == "terms: as text"
