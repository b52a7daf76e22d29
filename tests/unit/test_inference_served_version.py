"""Served versions: conversion to labels and messages, and the spans of tokens per version."""

from deskrl.inference.served_version import INITIAL_VERSION, ServedVersion, SpanTracker, VersionedSpan


def test_a_version_equals_itself_after_conversion_to_a_label_or_a_message_and_back() -> None:
    for version in (INITIAL_VERSION, ServedVersion("run/with/slashes", 12)):
        assert ServedVersion.from_label(str(version)) == version
        assert ServedVersion.from_message(version.to_message()) == version


def test_spans_cover_all_tokens_and_consecutive_tokens_of_one_version_form_one_span() -> None:
    old, new = ServedVersion("a", 1), ServedVersion("a", 2)
    tracker = SpanTracker()
    for version, num_tokens in ((old, 1), (old, 4), (new, 4), (new, 6), (new, 7)):
        tracker.advance_to(version, num_tokens)
    assert tracker.spans() == (VersionedSpan(old, 0, 4), VersionedSpan(new, 4, 7))


def test_an_action_without_tokens_has_no_spans() -> None:
    tracker = SpanTracker()
    tracker.advance_to(INITIAL_VERSION, 0)
    assert tracker.spans() == ()
