"""Which tokens a query of sparse attention sees: scores of index keys and their best, in blocks.

The best k tokens are those of the highest scores, of equal scores the earliest. That order is
total, so the best of all are the best of the bests of any parts: blocks of one table, one after
another, or the tokens of several ranks. Pure functions and one accumulator; nothing here knows
slots. See docs/kv_segments.md, Note [Sparse attention]. Source: DeepSeek-V3.2-Exp's report,
section 2.1.

Legend: M queries, N keys, I index heads, X numbers of an index key, K tokens to choose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class IndexQuery(NamedTuple):
    """What chooses: `heads` [M, I, X] of any float type and their `weights` float32 [M, I]."""

    heads: torch.Tensor
    weights: torch.Tensor

    def rows(self, rows: torch.Tensor | slice) -> IndexQuery:
        """Some of the queries."""
        return IndexQuery(self.heads[rows], self.weights[rows])


def index_scores(query: IndexQuery, keys: torch.Tensor) -> torch.Tensor:
    """The sum over heads of weight x relu(head . key), float32 [M, N], of keys float32 [N, X].

    Computed in float32. NaN comes out as -inf, so that what is compared has an order.
    """
    m, heads, width = query.heads.shape
    products = query.heads.reshape(m * heads, width).float() @ keys.t()
    products = products.relu_().view(m, heads, -1)
    scores = torch.bmm(query.weights.float().unsqueeze(1), products).squeeze(1)
    return scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def best_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the `count` highest scores [M, N] of each row, ascending: int64 [M, count].

    Of equal scores the first columns are taken. N is at least `count`; no score is NaN.
    """
    m, n = scores.shape
    if n == count:
        return torch.arange(n, device=scores.device).expand(m, n)
    if scores.device.type != "cpu":
        return best_columns_unseen(scores, count)
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = scores >= least
    if int(chosen.sum()) > m * count:  # a row has more that equal its least than fit
        above = scores > least
        spare = count - above.sum(-1, keepdim=True)
        ties = chosen & ~above
        chosen = above | (ties & (ties.cumsum(-1) <= spare))
    return chosen.nonzero()[:, 1].view(m, count)


def best_columns_unseen(scores: torch.Tensor, count: int) -> torch.Tensor:
    """`best_columns` in steps whose sizes do not depend on scores: on a device nothing waits."""
    m, n = scores.shape
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, ties = scores > least, scores == least
    spare = count - above.sum(-1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(-1) <= spare))
    # The r-th chosen column goes to place r, all others to one place behind, which is cut off.
    places = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    columns = torch.arange(n, device=scores.device).expand(m, n)
    found = torch.zeros((m, count + 1), dtype=torch.int64, device=scores.device)
    return found.scatter_(-1, places, columns)[:, :count]


class BestTokens:
    """The best `count` of the keys that M queries were shown so far, in the order of positions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.scores: torch.Tensor | None = None  # float32 [M, at most count]
        self.places: torch.Tensor | None = None  # int64, likewise: those that `add` gave, ascending

    def add(self, scores: torch.Tensor, first_place: int) -> None:
        """Show all queries the next keys, which stand at places from `first_place` on.

        `scores` [M, N], -inf where a query doesn't see a key. Places grow from call to call.
        """
        m, n = scores.shape
        last = first_place + n
        places = torch.arange(first_place, last, device=scores.device).expand(m, n)
        if self.scores is not None and self.places is not None:
            scores = torch.cat((self.scores, scores), -1)
            places = torch.cat((self.places, places), -1)
        if scores.shape[1] > self._count:
            best = best_columns(scores, self._count)
            scores, places = scores.gather(-1, best), places.gather(-1, best)
        self.scores, self.places = scores, places


def merge_best(scores: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Which of N candidates [M, N] at distinct `positions` are the best `count`: bool [M, N].

    Candidates come in any order; those that stand for nothing have -inf and the last positions.
    """
    order = positions.argsort(-1)
    best = best_columns(scores.gather(-1, order), count)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, order.gather(-1, best), True)
