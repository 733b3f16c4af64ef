"""Stop patterns: what they match, what they hold back, and that no pattern makes them slow."""

from __future__ import annotations

import re
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import RequestError
from sglang.srt.managers.regex_program import MAX_NODES, compile_program
from sglang.srt.managers.stop_regex import PatternMatcher, TextStops, check_stop_regex

# Over "ab\n", so that drawn texts match; the semantics of all of them are those of `re`.
PATTERNS = [
    "ab",
    "a+b",
    "a*?b",
    "(a|b)a{2,3}",
    "[^a]b",
    "a.b",
    "(?s)a.b",
    "^b",
    "(?m)^b",
    r"\Aab",
    "ba$",
    r"b\nb\Z",
    "(?i)A[A]B",
    "(?:(?i:A)|b)b",
    "(a|ab)(b|aa)b",
    "((a*)*b)+a",
    "bb|abab|b{3}a",
    r"\s\S\s",
    r"[\na]\w\W",
    "a(?:b|)a",
    "(?x) a  b a",
]


def first_match(pattern: str, text: str) -> tuple[int, int] | None:
    """(end, start) of the match in the shortest beginning of `text` that has one; by `re`."""
    for end in range(len(text) + 1):
        match = re.search(pattern, text[:end])
        if match is not None:
            return end, match.start()
    return None


@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12),
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2, unique=True),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=1),
    keep=st.booleans(),
)
def test_the_first_match_ends_the_text_wherever_it_is_cut(
    pieces: list[str], patterns: list[str], stops: list[str], keep: bool
) -> None:
    text = "".join(pieces)
    sources = [(stop, re.escape(stop)) for stop in stops] + [(one, one) for one in patterns]
    found = [(*span, name) for name, one in sources if (span := first_match(one, text))]
    matcher = TextStops(stops, patterns, keep_match=keep)
    shown = ""
    for piece in pieces:
        match = matcher.feed(piece)
        shown += match.text
        if match.matched is not None:
            end, start, name = min(found)
            assert match.matched == name
            assert shown == text[: end if keep else start]
            return
        assert text.startswith(shown)
    assert not found
    assert shown + matcher.flush() == text


def held(pattern: str, text: str) -> str:
    matcher = TextStops((), (pattern,))
    return text.removeprefix(matcher.feed(text).text)


@pytest.mark.parametrize(
    ("pattern", "text", "kept"),
    [
        (r"\d{4}-\d\d", "in 17 or 1984-", "1984-"),
        (r"\n\n(User|Human):", "so.\n\nHum", "\n\nHum"),
        (r"\n\n(User|Human):", "so.\n\nHumb", ""),
        (r"(?s)<a>.*</a>", "x<a>long, long <a>", "<a>long, long <a>"),
        (r"\bend\b", "the end", "end"),
        (r"\bend\b", "the ends", ""),
        (r"^abc", "ab", "ab"),
        (r"^abc", "xab", ""),
    ],
)
def test_only_what_may_become_a_match_is_held(pattern: str, text: str, kept: str) -> None:
    assert held(pattern, text) == kept


def test_a_border_of_words_is_decided_by_the_next_character() -> None:
    """`re` on the text so far would take the end of "food" in "foo" for a border."""
    for cut in range(1, 12):
        matcher = TextStops((), (r"\bfoo\b",), keep_match=True)
        text, shown = "food, a foo!", ""
        results = [matcher.feed(text[i : i + cut]) for i in range(0, len(text), cut)]
        shown = "".join(result.text for result in results)
        assert (shown, results[-1].matched) == ("food, a foo", r"\bfoo\b")
    assert re.search(r"\Boo\B", "foo") is None
    assert held(r"o\B", "o") == "o"


def test_matches_before_the_text_is_armed_are_ordinary_text() -> None:
    matcher = TextStops(("zz",), ("ab+c", "b"))
    assert matcher.feed("xb", armed=False).text == "xb"
    assert matcher.feed("ab", armed=False).text == ""  # "ab+c" may still come
    assert matcher.feed("a").text == "ab"
    match = matcher.feed("bc")
    assert (match.text, match.matched) == ("a", "b")


def test_a_match_that_began_before_the_text_was_armed_counts() -> None:
    matcher = TextStops((), ("ab+c",))
    assert matcher.feed("xabb", armed=False).text == "x"
    assert matcher.feed("bcd").matched == "ab+c"


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|aa)+b", "(a*)*b", "(a?){100}a{100}b", "((a|a)+(a|a)+)+b", "(?s)(.*)*x"],
)
def test_no_pattern_looks_at_a_character_more_often_than_it_has_nodes(pattern: str) -> None:
    """Counted, not timed: lines of the matcher that run for each character of a hostile text."""
    matcher = PatternMatcher(compile_program(pattern))
    for _ in range(300):
        assert matcher.step("a") is None
    lines = 0

    def count(frame: types.FrameType, event: str, arg: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        matcher.step("a")
    finally:
        sys.settrace(before)
    assert 0 < lines <= 40 * len(compile_program(pattern).nodes)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "no regular expression"),
        ("[z-a]", "no regular expression"),
        (r"\p{Lu}", "no regular expression"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "look-around"),
        ("(?>a)b", "look-around"),
        ("a++b", "look-around"),
        ("a$b", "at a pattern's end only"),
        ("a*", "matches an empty text"),
        ("x|", "matches an empty text"),
        (r"\b", "matches an empty text"),
        ("", "matches an empty text"),
        ("a" * 1025, "1025 characters"),
        ("a{100000}", "repeats"),
        ("a{0,2147483647}", "repeats"),
        ("(((a{99}){99}){99}){99}", "repeats"),
        ("(" * 500 + "a" + ")" * 500, "nested too deeply"),
    ],
)
def test_patterns_that_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(RequestError, match=f"^stop_regex .*{re.escape(reason)}") as caught:
        check_stop_regex([pattern])
    assert caught.value.http_status == 400


def test_many_patterns_share_one_bound() -> None:
    check_stop_regex([f"a{{{MAX_NODES - 1}}}"])
    check_stop_regex(["a{100}"] * 4)
    with pytest.raises(RequestError, match="in all"):
        check_stop_regex(["a{100}"] * 5)
