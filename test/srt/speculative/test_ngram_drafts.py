"""Drafts of a request's own text: what they say, how far they are trusted, what they cost."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.speculative.draft_plan import Offer
from sglang.srt.speculative.ngram_drafts import NgramDrafts, NgramRules

RULES = NgramRules(
    max_draft_tokens=6, min_match=2, max_match=12, max_step_tokens=64, drafts_edited=True
)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_a_draft_is_what_followed_the_longest_match() -> None:
    tokens = ids(9, 1, 2, 30, 31, 8, 1, 2, 40, 41, 42, 9, 1, 2)
    drafts = NgramDrafts(RULES, 32)
    assert drafts.offer(tokens, 6) == Offer(0.3, 6)
    assert drafts.take(tokens, 3) == (30, 31, 8), "three tokens match there, two at the newer place"
    assert drafts.take(tokens, 6) == (30, 31, 8, 1, 2, 40)
    assert drafts.offer(tokens, 2) == Offer(0.3, 2)
    assert drafts.offer(tokens, 0) == Offer(0.0, 0)


def test_text_that_repeats_itself_is_drafted_beyond_its_end() -> None:
    tokens = ids(5, 6, 7, 5, 6, 7, 5, 6)
    drafts = NgramDrafts(RULES, 32)
    assert drafts.offer(tokens, 6).most == 6
    assert drafts.take(tokens, 6) == (7, 5, 6, 7, 5, 6)
    same = ids(4, 4, 4, 4)
    drafts = NgramDrafts(RULES, 32)
    assert drafts.offer(same, 6).most == 6
    assert drafts.take(same, 5) == (4, 4, 4, 4, 4)


def test_a_draft_ends_where_an_image_begins() -> None:
    drafts = NgramDrafts(RULES, 32)
    tokens = ids(1, 2, 3, 4, -7, -8, 5, 1, 2)
    assert drafts.offer(tokens, 6).most == 6
    assert drafts.take(tokens, 6) == (3, 4)
    tokens = ids(1, 2, -7, -8, 5, 1, 2)
    drafts = NgramDrafts(RULES, 32)
    assert drafts.offer(tokens, 6).most == 6
    assert drafts.take(tokens, 6) == ()


def test_nothing_is_offered_for_text_that_is_new() -> None:
    drafts = NgramDrafts(RULES, 32)
    assert drafts.offer(ids(1, 2, 3, 4), 6) == Offer(0.0, 0)
    assert drafts.take(ids(1, 2, 3, 4), 0) == ()
    assert drafts.offer(ids(3), 6) == Offer(0.0, 0)


def test_chances_follow_what_was_taken_for_each_class_of_matches() -> None:
    short = ids(1, 2, 3, 9, 1, 2)
    long = ids(*range(20), *range(12))
    drafts = NgramDrafts(RULES, 64)
    assert drafts.offer(short, 6).chance == pytest.approx(0.3)
    for _ in range(4):
        drafts.note(4, 0)
    assert (drafts.num_verified, drafts.num_proposed, drafts.num_correct) == (4, 16, 0)
    low = drafts.offer(short, 6).chance
    assert low == pytest.approx(0.6 / (2 + 1 + 0.9 + 0.81 + 0.729))
    other = NgramDrafts(RULES, 64)
    assert other.offer(long, 6).chance == pytest.approx(0.8)
    other.note(6, 6)
    assert other.offer(long, 6).chance == pytest.approx((6 + 1.6) / 8)
    for _ in range(60):
        drafts.take(short, 0)
    assert low < drafts.offer(short, 6).chance < 0.3, "what went wrong is tried again by and by"
    assert "0.80, 0.55, " in repr(drafts)


def test_a_long_cached_prompt_is_indexed_in_pieces() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 40_000).astype(np.int32)
    tokens[-2:] = tokens[30_000:30_002]
    drafts = NgramDrafts(RULES, 40_000)
    assert [drafts.offer(tokens, 4).most for _ in range(3)] == [0, 4, 4]
    assert drafts.take(tokens, 2) == tuple(tokens[30_002:30_004].tolist())
