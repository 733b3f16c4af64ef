"""The gated delta rule against its definition, token by token in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from sglang.srt.layers.linear_attention.gated_delta import Tokens, advance, solve, step
from sglang.srt.layers.linear_attention.state_plan import StatePages, plan_states
from sglang.srt.model_executor.forward_batch_info import BatchGeometry
from srt.models.harness import TableView

HEADS, K, V = 3, 5, 7


def drawn(count: int, seed: int = 1) -> Tokens:
    """Tokens [count, HEADS, *] with keys of length 1, as models make them."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(count, HEADS, K, generator=draw) for _ in range(2))
    v = torch.randn(count, HEADS, V, generator=draw)
    g, b = -torch.rand(count, HEADS, generator=draw), torch.rand(count, HEADS, generator=draw)
    return Tokens(q, k / k.norm(dim=-1, keepdim=True), v, g, b)


def by_definition(tokens: Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read [T, HEADS, V] and the state after, in float64; `state` [HEADS, K, V]."""
    state, reads = state.double().clone(), []
    for q, k, v, g, b in zip(*(part.double() for part in tokens), strict=True):
        for h in range(HEADS):
            decayed = math.exp(g[h]) * state[h]
            state[h] = decayed + b[h] * torch.outer(k[h], v[h] - decayed.T @ k[h])
        reads.append(torch.stack([state[h].T @ q[h] for h in range(HEADS)]))
    return torch.stack(reads), state


def test_steps_are_the_definition() -> None:
    tokens = drawn(9)
    first = torch.randn(HEADS, K, V, generator=torch.Generator().manual_seed(2))
    wanted, after = by_definition(tokens, first)
    state, other = first.clone().unsqueeze(0), torch.full((1, HEADS, K, V), math.nan)
    for t in range(9):
        one = Tokens(*(part[t : t + 1] for part in tokens))
        if t % 2:  # into other memory, and in place
            read = step(one, state, other)
            state, other = other, state.fill_(math.nan)
        else:
            read = step(one, state, state)
        torch.testing.assert_close(read[0].double(), wanted[t], atol=1e-5, rtol=0)
    torch.testing.assert_close(state[0].double(), after, atol=1e-5, rtol=0)


def test_chunks_are_the_definition_whatever_fills_them() -> None:
    """Two requests in chunks of 8, of which the second one's last is not full."""
    tokens, firsts = drawn(24), torch.randn(2, HEADS, K, V)
    counts = (16, 8)
    padded = [torch.zeros(2, 16, *part.shape[1:]) for part in tokens]
    pieces = (slice(0, 16), slice(16, 21))
    for request, piece in enumerate(pieces):
        for target, part in zip(padded, tokens, strict=True):
            target[request, : len(part[piece])] = part[piece]
    chunks = solve(
        Tokens(
            *(
                part.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 1).transpose(1, 2)
                for part in padded
            )
        )
    )
    state = firsts.clone()
    reads = torch.cat([advance(chunks, slice(2 * i, 2 * i + 2), state) for i in range(2)], 2)
    for request, piece in enumerate(pieces):
        own = Tokens(*(part[piece] for part in tokens))
        wanted, after = by_definition(own, firsts[request])
        found = reads[request].transpose(0, 1)[: len(wanted)]
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(state[request].double(), after, atol=1e-5, rtol=0)
    assert counts[0] == len(tokens.q[pieces[0]])


def test_far_tokens_overflow_nothing() -> None:
    """Decays of e^-40 a token: ratios of far tokens are 0, never infinite."""
    tokens = drawn(64)._replace(g=torch.full((64, HEADS), -40.0))
    chunked = Tokens(*(part.transpose(0, 1).unsqueeze(0) for part in tokens))
    state = torch.zeros(1, HEADS, K, V)
    read = advance(solve(chunked), slice(0, 1), state)
    wanted, after = by_definition(tokens, torch.zeros(HEADS, K, V))
    torch.testing.assert_close(read[0].transpose(0, 1).double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(state[0].double(), after, atol=1e-5, rtol=0)


def test_where_states_come_from_and_go_to() -> None:
    table = TableView(np.array([11, 12, 0, 14, 15], np.int32), (0, 0), first_position=8)
    # Pages of 4 tokens from position 8 on: 11 has 8 to 11, 12 has 12 to 15, then a gap.
    assert StatePages.of(table, 14, 27, 4) == (12, 14, 10, 15)
    assert StatePages.of(table, 12, 15, 4) == (11, 0, 0, 12)
    assert StatePages.of(table, 14, 16, 4) == (12, 0, 0, 12)
    assert StatePages.of(table, 24, 25, 4) == (14, 0, 0, 15)
    new = TableView(np.array([7, 8], np.int32), (0, 0))
    assert StatePages.of(new, 0, 8, 4) == (0, 7, 4, 8)
    assert StatePages.of(new, 0, 3, 4) == (0, 0, 0, 7)


def test_a_plan_covers_every_token_once_and_stops_at_borders() -> None:
    """Requests of 1, 150, 1 and 70 new tokens; the second begins at 30, in pages of 64."""
    prefix, lens = np.array([5, 30, 0, 64]), np.array([1, 150, 1, 70])
    ends = prefix + lens
    tables = [
        TableView(np.arange(10 * n + 1, 10 * n + 1 - (-end // 64), dtype=np.int32), (0, 0))
        for n, end in enumerate(ends)
    ]
    starts = np.cumsum(lens) - lens
    geometry = BatchGeometry(
        ends, prefix, lens, starts, np.array([0]), (tuple(tables),), page_size=64
    )
    plan = plan_states(geometry, 0, 3, torch.device("cpu"))
    assert plan.singles is not None
    assert plan.extends is not None
    assert plan.singles.rows.tolist() == [0, 151]
    assert plan.singles.pages == ((1, 1), (0, 21))
    extends = plan.extends
    assert extends.rows.tolist() == [*range(1, 151), *range(152, 222)]
    assert extends.source.tolist() == [11, 31]
    assert extends.border_pages.tolist() == [12, 32]
    assert extends.target.tolist() == [13, 33]
    (block,) = extends.blocks
    assert sorted(block.known_rows.tolist()) == list(range(220))
    assert torch.equal(block.rows.flatten()[block.known], block.known_rows)
    assert torch.equal(block.rows[block.valid], block.known_rows)
    # 98 tokens to the border at 128 and 52 behind it; 64 to the border, and 6.
    counts = block.valid.sum(1).tolist()
    steps = [(counts[part], None if at is None else at.tolist()) for part, _, at in block.steps]
    assert steps == [([64, 64], [1]), ([34, 6], [0]), ([52], None)]
    # The kept inputs of a request, then its own: the last three of all are the tail.
    assert extends.kept_places.tolist() == [[0, 1, 2], [153, 154, 155]]
    assert extends.places.tolist() == [*range(3, 153), *range(156, 226)]
    assert extends.tails.tolist() == [[150, 151, 152], [223, 224, 225]]
    assert extends.border_tails.tolist() == [[98, 99, 100], [217, 218, 219]]
