"""Where needles lie, and what prompts of equal seed share."""

from __future__ import annotations

import numpy as np
import pytest

from haystack.circuit import Shape
from haystack.prompts import Needle, Placement, Vocabulary, random_needles
from haystack.tasks import circuit_task, given_task

DEPTHS = (0, 25, 50, 75, 100)
CHUNK = 1024


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("length", [1000, 5120, 5121, 64_000, 65_537])
def test_needles_lie_within_chunks_and_the_haystack_has_none(layers: int, length: int) -> None:
    shape = Shape(num_layers=layers)
    task = circuit_task(shape, DEPTHS, 8, seed=3)
    needle_ids = np.array(Vocabulary(shape.vocab_size).needle_ids)
    for prompt, needle in zip(task.prompts(length), task.needles, strict=True):
        ids = prompt.ids.tolist()
        size, asked = len(needle.text), len(needle.question)
        assert length - CHUNK < len(ids) <= length
        assert tuple(ids[prompt.needle_at : prompt.needle_at + size]) == needle.text
        assert tuple(ids[-asked:]) == needle.question
        assert prompt.needle_at // CHUNK == (prompt.needle_at + size - 1) // CHUNK
        assert prompt.needle_at % CHUNK >= shape.key_tokens - 1
        assert np.isin(prompt.ids, needle_ids).sum() == size + asked
        if layers == 4:  # the rows that generate lie within one chunk, too
            first, last = len(ids) - asked, len(ids) + len(needle.answer) - 2
            assert first // CHUNK == last // CHUNK


def test_depths_are_where_they_should_be() -> None:
    task = circuit_task(Shape(), DEPTHS, 8, seed=3)
    places = [prompt.needle_at / 64_000 for prompt in task.prompts(64_000)]
    assert places == pytest.approx([depth / 100 for depth in DEPTHS], abs=0.001)
    assert task.prompts(64_000)[0].needle_at == 0
    # The last needle ends where the question begins, when no border is in between.
    assert task.prompts(64_000)[-1].needle_at == 64_000 - 1 - 9


def test_prompts_share_their_prefix_up_to_the_earlier_needle() -> None:
    one, other = circuit_task(Shape(), (25, 75), 8, seed=3).prompts(20_000)
    assert np.flatnonzero(one.ids != other.ids)[0] == one.needle_at


def test_shared_prompts_differ_in_their_question_only() -> None:
    task = circuit_task(Shape(num_layers=4), DEPTHS, 8, seed=3)
    prompts = task.shared_prompts(20_000)
    for prompt, needle in zip(prompts, task.needles, strict=True):
        assert np.array_equal(prompt.ids[:-2], prompts[0].ids[:-2])
        assert tuple(prompt.ids[prompt.needle_at :][:10].tolist()) == needle.text
        assert prompt.answer == needle.answer
    with pytest.raises(ValueError, match="overlap"):
        circuit_task(Shape(), (0, 0), 8, seed=3).shared_prompts(20_000)


def test_needles_share_no_token() -> None:
    needles = random_needles(Vocabulary(1024), 7, 2, 70, seed=0)
    tokens = [token for needle in needles for token in needle.text]
    assert len(set(tokens)) == len(tokens) == 7 * 72
    with pytest.raises(ValueError, match="for needles"):
        random_needles(Vocabulary(1024), 8, 2, 70, seed=0)


def test_a_given_needle_lies_anywhere() -> None:
    task = given_task([5, 6, 7], [50, 51, 52], [60, 61], [52], (0, 50, 100), chunk=None)
    prompts = task.prompts(100)
    assert [prompt.needle_at for prompt in prompts] == [0, 48, 95]
    assert prompts[1].ids[:6].tolist() == [5, 6, 7, 5, 6, 7]
    assert prompts[2].ids[-5:].tolist() == [50, 51, 52, 60, 61]


def test_what_does_not_fit_is_told() -> None:
    needle = Needle.of_key([1], range(2, 12))
    with pytest.raises(ValueError, match="attention chunks of 8"):
        Placement(chunk=8).needle_position(100, 0, needle)
    with pytest.raises(ValueError, match="in a prompt of 10"):
        Placement().needle_position(10, 0, needle)
