"""Whoever waits for the other side of a transfer waits for a bounded time, and is told why it was in vain."""

from __future__ import annotations

import threading
import time

import pytest

from deskrl.core.bounds import GaveUp, in_background, outcome, wait_until


def test_what_blocks_for_ever_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(GaveUp, match="joining: nothing within 0 s"):
        outcome(in_background(never.wait), 0.05, "joining")
    never.set()


def test_what_was_done_in_the_background_is_had_or_raised() -> None:
    assert outcome(in_background(lambda: 3), 10, "counting") == 3
    with pytest.raises(ValueError, match="invalid literal"):
        outcome(in_background(lambda: int("x")), 10, "counting")


def test_waiting_ends_as_it_happens_and_not_later() -> None:
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), 10, "the third answer")
    assert next(answers, "none left") == "none left"


def test_waiting_for_what_does_not_happen_ends() -> None:
    with pytest.raises(GaveUp, match="a bucket: nothing within 0 s"):
        wait_until(lambda: False, 0.01, "a bucket")


def test_waiting_for_what_cannot_happen_any_more_ends_at_once() -> None:
    began_s = time.monotonic()
    with pytest.raises(GaveUp, match="a bucket: the other side is gone"):
        wait_until(lambda: False, 3600, "a bucket", possible=lambda: False)
    assert time.monotonic() - began_s < 3600
