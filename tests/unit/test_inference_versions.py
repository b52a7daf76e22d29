"""Which tokens were sampled under which policy."""

from deskrl.inference.versions import INITIAL, Span, SpanCounter, Version


def test_a_version_survives_being_an_engines_label() -> None:
    for version in (INITIAL, Version("run/with/slashes", 12)):
        assert Version.from_label(str(version)) == version
        assert Version.from_message(version.to_message()) == version


def test_spans_cover_all_tokens_and_join_what_belongs_together() -> None:
    old, new = Version("a", 1), Version("a", 2)
    counter = SpanCounter()
    for version, num_tokens in ((old, 1), (old, 4), (new, 4), (new, 6), (new, 7)):
        counter.count_to(version, num_tokens)
    assert counter.spans() == (Span(old, 0, 4), Span(new, 4, 7))


def test_no_tokens_have_no_spans() -> None:
    counter = SpanCounter()
    counter.count_to(INITIAL, 0)
    assert counter.spans() == ()
