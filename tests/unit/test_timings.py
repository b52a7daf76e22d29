"""Where the time of turns went, on numbers worked out by hand."""

from deskrl.core.timings import split_act, spread_by_part


def test_what_the_replica_does_not_account_for_is_transport() -> None:
    parts = split_act(100.0, image_ms=10.0, queue_ms=5.0, prefill_ms=25.0, decode_ms=40.0)
    assert parts == {"act": 100.0, "image": 10.0, "queue": 5.0, "prefill": 25.0, "decode": 40.0, "transport": 20.0}
    assert split_act(10.0, 0.0, 0.0, 6.0, 4.5)["transport"] == 0.0


def test_parts_of_many_turns_come_in_the_order_of_a_turn_and_only_where_they_were() -> None:
    told = spread_by_part([{"act": 10.0, "reset": 500.0}, {"act": 20.0}, {"act": 60.0}])
    assert list(told) == ["reset", "act"]
    assert told == {"reset": {"median": 500.0, "p90": 500.0}, "act": {"median": 20.0, "p90": 52.0}}
    assert spread_by_part([]) == {}
