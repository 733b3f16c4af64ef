"""`LinearAttention` over pages of states: however tokens are cut into steps, the same is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.layers.linear_attention.mixer import LinearAttention, StatePlanner
from sglang.srt.layers.linear_attention.state_plan import plan_states
from sglang.srt.mem_cache.kv_layout import GroupId, GroupKind, KVGroupSpec, StateShape
from sglang.srt.mem_cache.state_pool import MambaPool
from sglang.srt.model_executor.forward_batch_info import BatchGeometry
from srt.models.harness import TableView

SHAPE = StateShape(heads=4, key_dim=6, value_dim=5, conv_tokens=3, channels=2 * 2 * 6 + 4 * 5)
PAGE, LENGTH = 32, 1300
PAGES_EACH = -(-LENGTH // PAGE)


class Bench:
    """A layer, a pool that reads NaN where nothing was written, and what two requests bring."""

    def __init__(self) -> None:
        num = 2
        draw = torch.Generator().manual_seed(4)
        numbers = -(-SHAPE.numbers // PAGE)
        plane = torch.full(((1 + num * PAGES_EACH) * PAGE, 1, numbers), torch.nan)
        group = KVGroupSpec((0,), GroupKind.STATE, state=SHAPE)
        self.pool = MambaPool(GroupId(0), group, PAGE, plane)
        self.layer = LinearAttention(
            0, StatePlanner(), key_heads=2, value_heads=4, key_dim=6, value_dim=5
        )
        self.mixed = torch.randn(num, LENGTH, SHAPE.channels, generator=draw)
        self.g = -torch.rand(num, LENGTH, 4, generator=draw) * 0.1
        self.b = torch.rand(num, LENGTH, 4, generator=draw)
        self.filters = torch.randn(SHAPE.channels, 4, generator=draw)

    def geometry(self, parts: list[tuple[int, int, int]]) -> BatchGeometry:
        prefix, ends = (np.array([part[i] for part in parts], np.int64) for i in (1, 2))
        tables = tuple(
            TableView(
                np.arange(1 + r * PAGES_EACH, 1 + (r + 1) * PAGES_EACH, dtype=np.int32), (0, 0)
            )
            for r, _, _ in parts
        )
        lens = ends - prefix
        starts = np.cumsum(lens) - lens
        return BatchGeometry(ends, prefix, lens, starts, np.array([0]), (tables,), PAGE)

    def step(self, *parts: tuple[int, int, int]) -> list[torch.Tensor]:
        """What the tokens [start, end) of (request, start, end) read, in one batch."""
        batch: Any = SimpleNamespace(
            geometry=self.geometry(list(parts)), token_to_kv_pool=SimpleNamespace(states=self.pool)
        )
        joined = [
            torch.cat([whole[r, start:end] for r, start, end in parts])
            for whole in (self.mixed, self.g, self.b)
        ]
        read = self.layer(*joined, self.filters, batch)
        sizes = [end - start for _, start, end in parts]
        return list(read.split_with_sizes(sizes))


@pytest.fixture(scope="module")
def token_by_token() -> list[torch.Tensor]:
    bench = Bench()
    return [torch.cat([bench.step((r, t, t + 1))[0] for t in range(LENGTH)]) for r in range(2)]


@pytest.mark.parametrize("cuts", [(LENGTH,), (1, 700, 701, 1280, LENGTH), (31, 32, 65, LENGTH)])
def test_prompts_in_any_steps(token_by_token: list[torch.Tensor], cuts: tuple[int, ...]) -> None:
    bench = Bench()
    starts = (0, *cuts[:-1])
    reads = [bench.step((0, start, end))[0] for start, end in zip(starts, cuts, strict=True)]
    torch.testing.assert_close(torch.cat(reads), token_by_token[0], atol=2e-5, rtol=1e-4)


def test_mates_and_what_is_left_at_borders(token_by_token: list[torch.Tensor]) -> None:
    """Prompts of different lengths beside each other; a third step begins at the first's border."""
    bench = Bench()
    first = bench.step((0, 0, 1000), (1, 0, 40))
    second = bench.step((1, 40, LENGTH), (0, 1000, 1001))
    border = 1000 // PAGE * PAGE
    again = bench.step((0, border, border + 1))
    for found, wanted in (
        (first[0], token_by_token[0][:1000]),
        (first[1], token_by_token[1][:40]),
        (second[0], token_by_token[1][40:]),
        (second[1], token_by_token[0][1000:1001]),
        (again[0], token_by_token[0][border : border + 1]),
    ):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_long_prompts_are_solved_block_by_block() -> None:
    bench = Bench()
    plan = plan_states(bench.geometry([(0, 5, 1205)]), 0, 3, torch.device("cpu"))
    assert plan.extends is not None
    blocks = plan.extends.blocks
    assert [len(block.rows) for block in blocks] == [8, 8, 4]
    rows = torch.cat([block.known_rows for block in blocks])
    assert rows.tolist() == list(range(1200))
    at_border = [
        n for n, block in enumerate(blocks) if any(at is not None for *_, at in block.steps)
    ]
    assert at_border == [2], "1,184 is the last border before 1,205"
