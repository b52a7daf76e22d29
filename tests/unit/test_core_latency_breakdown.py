"""Latency breakdown of steps, with values computed by hand."""

from deskrl.core.latency_breakdown import percentiles_by_part, split_act_latency


def test_latency_that_the_replica_does_not_report_is_transport() -> None:
    parts = split_act_latency(100.0, image_ms=10.0, queue_ms=5.0, prefill_ms=25.0, decode_ms=40.0)
    assert parts == {"act": 100.0, "image": 10.0, "queue": 5.0, "prefill": 25.0, "decode": 40.0, "transport": 20.0}
    assert split_act_latency(10.0, 0.0, 0.0, 6.0, 4.5)["transport"] == 0.0


def test_percentiles_are_in_the_order_of_a_step_and_skip_missing_parts() -> None:
    percentiles = percentiles_by_part([{"act": 10.0, "reset": 500.0}, {"act": 20.0}, {"act": 60.0}])
    assert list(percentiles) == ["reset", "act"]
    assert percentiles == {"reset": {"median": 500.0, "p90": 500.0}, "act": {"median": 20.0, "p90": 52.0}}
    assert percentiles_by_part([]) == {}
