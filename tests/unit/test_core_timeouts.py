"""Waiting with a timeout, and the errors of a failed wait."""

from __future__ import annotations

import threading
import time

import pytest

from deskrl.core.timeouts import WaitFailed, run_in_background, wait_for_result, wait_until


def test_a_call_that_blocks_forever_times_out() -> None:
    never = threading.Event()
    with pytest.raises(WaitFailed, match="joining: timed out after 0 s"):
        wait_for_result(run_in_background(never.wait), 0.05, "joining")
    never.set()


def test_the_result_or_the_error_of_background_work_is_returned_or_raised() -> None:
    assert wait_for_result(run_in_background(lambda: 3), 10, "counting") == 3
    with pytest.raises(ValueError, match="invalid literal"):
        wait_for_result(run_in_background(lambda: int("x")), 10, "counting")


def test_polling_ends_when_the_condition_holds() -> None:
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), 10, "the third answer")
    assert next(answers, "none left") == "none left"


def test_polling_ends_after_the_timeout() -> None:
    with pytest.raises(WaitFailed, match="a bucket: timed out after 0 s"):
        wait_until(lambda: False, 0.01, "a bucket")


def test_polling_ends_at_once_if_the_condition_is_impossible() -> None:
    began_s = time.monotonic()
    with pytest.raises(WaitFailed, match="a bucket: the peer has ended"):
        wait_until(lambda: False, 3600, "a bucket", is_possible=lambda: False)
    assert time.monotonic() - began_s < 3600
