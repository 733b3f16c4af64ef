"""Which tokens are chosen: by score, of equal scores the earliest, in whatever parts they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention.token_choice import (
    BestTokens,
    IndexQuery,
    best_columns,
    best_columns_unseen,
    index_scores,
    merge_best,
)

INF = float("inf")


def by_sorting(scores: torch.Tensor, count: int) -> list[list[int]]:
    rows = scores.tolist()
    return [sorted(sorted(range(len(r)), key=lambda i: (-r[i], i))[:count]) for r in rows]


def test_scores_are_weighted_sums_of_what_is_positive() -> None:
    heads = torch.tensor([[[1.0, 0.0], [0.0, -2.0]]])
    keys = torch.tensor([[3.0, -1.0], [-3.0, 1.0], [float("nan"), 0.0], [1e38, -1e38]])
    scores = index_scores(IndexQuery(heads, torch.tensor([[2.0, -1.0]])), keys)
    assert scores.tolist()[0][:3] == [4.0, 0.0, -INF]
    many = torch.randn(5, 7, 16), torch.rand(5, 7), torch.randn(30, 16)
    exact = torch.einsum("mix,nx->min", many[0].double(), many[2].double()).relu()
    exact = torch.einsum("min,mi->mn", exact, many[1].double())
    ours = index_scores(IndexQuery(many[0], many[1]), many[2])
    torch.testing.assert_close(ours, exact.float())


# Few values, so that most choices are among equals; NaN never comes here.
TABLES = st.integers(1, 5).flatmap(
    lambda m: st.integers(1, 40).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([-INF, -1.0, 0.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n),
            min_size=m,
            max_size=m,
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.data())
def test_any_blocks_choose_what_one_look_does(
    table: list[list[float]], data: st.DataObject
) -> None:
    scores = torch.tensor(table)
    n = scores.shape[1]
    count = data.draw(st.integers(1, n))
    expected = by_sorting(scores, count)
    assert best_columns(scores, count).tolist() == expected
    assert best_columns_unseen(scores, count).tolist() == expected
    best, at = BestTokens(count), 0
    while at < n:
        step = data.draw(st.integers(1, n - at))
        best.add(scores[:, at : at + step], at)
        at += step
    assert best.places is not None
    assert best.places.tolist() == expected
    assert torch.equal(best.scores, scores.gather(-1, best.places))


@settings(max_examples=40, deadline=None)
@given(TABLES, st.integers(1, 4), st.data())
def test_bests_of_parts_make_the_best_of_all(
    table: list[list[float]], ranks: int, data: st.DataObject
) -> None:
    """Tokens dealt out in any way, each part choosing for itself and padded to one width."""
    scores = torch.tensor(table)
    m, n = scores.shape
    count = data.draw(st.integers(1, n))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, ranks - 1), min_size=n, max_size=n)))
    parts, places = [], []
    for rank in range(ranks):
        own = (owner == rank).nonzero().flatten()
        best = BestTokens(count)
        part = torch.full((m, count), -INF)
        place = torch.full((m, count), 1 << 30).add(torch.arange(count) + rank * count)
        if len(own):
            best.add(scores[:, own], 0)
            assert best.scores is not None
            assert best.places is not None
            part[:, : best.scores.shape[1]] = best.scores
            place[:, : best.scores.shape[1]] = own[best.places]
        parts.append(part)
        places.append(place)
    positions = torch.cat(places, -1)
    chosen = merge_best(torch.cat(parts, -1), positions, count)
    rows = [sorted(positions[row][chosen[row]].tolist()) for row in range(m)]
    assert rows == by_sorting(scores, count)


def test_a_row_of_nothing_takes_the_first() -> None:
    """As of a NaN in a query: what it sees must have been written."""
    assert best_columns(torch.full((2, 9), -INF), 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("count", [1, 4])
def test_places_begin_where_they_are_said_to(count: int) -> None:
    best = BestTokens(count)
    best.add(torch.zeros(1, 4), 10)
    best.add(torch.ones(1, 1), 20)
    assert best.places is not None
    assert best.places.tolist() == [[10, 11, 12, 20][-count:]]
