"""What a request offers of a draft model's tokens, and what it learns of them."""

from __future__ import annotations

import numpy as np

from sglang.srt.speculative.model_drafts import UNSAID, ModelDrafts, ModelRules

RULES = ModelRules(max_draft_tokens=4, max_step_tokens=64, drafts_edited=True, step_part=0.1)
TOKENS = np.arange(9, dtype=np.int32)


def test_as_many_as_there_is_room_for() -> None:
    drafts = ModelDrafts(RULES)
    assert [drafts.offer(TOKENS, room).most for room in (9, 3, 0, -1)] == [4, 3, 0, 0]
    assert drafts.take(TOKENS, 3) == (UNSAID,) * 3
    assert drafts.take(TOKENS, 0) == ()


def test_chances_follow_what_was_right_and_come_back_when_nothing_is_drafted() -> None:
    drafts = ModelDrafts(RULES)
    first = drafts.offer(TOKENS, 9).chance
    for _ in range(8):
        drafts.note(4, 0)
    low = drafts.offer(TOKENS, 9).chance
    assert low < 0.3 < first
    for _ in range(200):
        drafts.take(TOKENS, 0)
    assert 0.6 < drafts.offer(TOKENS, 9).chance < first
    for _ in range(8):
        drafts.note(4, 4)
    assert drafts.offer(TOKENS, 9).chance > 0.9
    assert (drafts.num_verified, drafts.num_proposed, drafts.num_correct) == (16, 64, 32)
