"""`LinearAttention`: a layer's recurrent state over a packed batch, whatever holds it.

The counterpart of `RadixAttention`: models call it with the new tokens' projections. It reads each
request's state from its page, lets the tokens through the convolution and the gated delta rule, and
writes the states that the step leaves. Written in PyTorch for any device.

Legend: T packed tokens, H value heads, J key heads, K and V widths, C = 2 J K + H V channels, W
inputs that the convolution keeps, N requests that compute one token, E that compute several.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.errors import InvariantError
from sglang.srt.layers.linear_attention.gated_delta import Chunks, Tokens, advance, solve, step
from sglang.srt.layers.linear_attention.state_plan import (
    ChunkBlock,
    Extends,
    SingleTokens,
    StatePlan,
    plan_states,
)
from sglang.srt.mem_cache.state_pool import LayerState, MambaPool
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch

_NORM_EPS = 1e-6  # of queries and keys
# Numbers of a layer's state from which on requests go one by one, each in its own page: then
# nothing is copied, and a few calls more cost little beside what they read.
_OWN_PAGE_NUMBERS = 1 << 16


class StatePlanner:
    """Makes a step's plan once for all layers; each model has one."""

    def __init__(self) -> None:
        self._last: tuple[BatchGeometry, StatePlan] | None = None

    def plan(self, geometry: BatchGeometry, pool: MambaPool) -> StatePlan:
        """The plan of `geometry`, which must not be changed between."""
        if self._last is None or self._last[0] is not geometry:
            made = plan_states(geometry, pool.group, pool.shape.conv_tokens, pool.device)
            self._last = (geometry, made)
        return self._last[1]


class LinearAttention(nn.Module):
    """The gated delta rule of layer `layer_id` with this rank's heads.

    Value head h goes with key head h // (`value_heads` / `key_heads`).
    """

    def __init__(
        self,
        layer_id: int,
        planner: StatePlanner,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.planner = planner
        self.key_heads, self.value_heads = key_heads, value_heads
        self.key_dim, self.value_dim = key_dim, value_dim

    def forward(
        self,
        mixed: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        filters: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """What each token reads, float32 [T, H, V].

        `mixed` [T, C] are queries, keys and values before the convolution with `filters`
        [C, W + 1]; `g` <= 0 and `b` float32 [T, H] are the logarithm of the decay and the strength
        of what is written. Side effect: the states that the step leaves are in their pages.
        """
        pool: MambaPool | None = forward_batch.token_to_kv_pool.states
        if pool is None:
            raise InvariantError("linear attention without a pool of states")
        plan = self.planner.plan(forward_batch.geometry, pool)
        taps = filters.float().t().contiguous()  # [W + 1, C]
        if plan.extends is None and plan.singles is not None:
            return self._single(plan.singles, pool, mixed.float(), g, b, taps)
        read = torch.empty(len(mixed), self.value_heads, self.value_dim, device=mixed.device)
        if plan.singles is not None:
            rows = plan.singles.rows
            own = (mixed[rows].float(), g[rows], b[rows])
            read[rows] = self._single(plan.singles, pool, *own, taps)
        if plan.extends is not None:
            self._extend(plan.extends, pool, mixed, g, b, taps, read)
        return read

    # ---- one token of each request ------------------------------------------------------------

    def _single(
        self,
        plan: SingleTokens,
        pool: MambaPool,
        inputs: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        taps: torch.Tensor,
    ) -> torch.Tensor:
        """inputs [N, C], g and b [N, H]: [N, H, V]."""
        if len(plan.pages) > 1 and pool.shape.matrix_numbers < _OWN_PAGE_NUMBERS:
            before = pool.load(self.layer_id, plan.source)
            if plan.any_fresh:
                _clear(before, plan.fresh)
            after = LayerState(before.matrix, torch.empty_like(before.inputs))
            read = self._step(inputs, g, b, taps, before, after)
            pool.store(self.layer_id, plan.target, after)
            return read
        parts = []
        for row, (source, target) in enumerate(plan.pages):
            one = slice(row, row + 1)
            after = pool.view(self.layer_id, target)
            before = after if source == target else pool.view(self.layer_id, source)
            if source == 0:
                before = after
                after.matrix.zero_()
                after.inputs.zero_()
            parts.append(self._step(inputs[one], g[one], b[one], taps, before, after))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(
        self,
        inputs: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        taps: torch.Tensor,
        before: LayerState,
        after: LayerState,
    ) -> torch.Tensor:
        window = torch.cat((before.inputs, inputs.unsqueeze(1)), 1)
        mixed = F.silu((window * taps).sum(1))
        after.inputs.copy_(window[:, 1:])
        q, k, v = self._heads(mixed)
        count = self.value_heads // self.key_heads
        q, k = q.repeat_interleave(count, 1), k.repeat_interleave(count, 1)
        return step(Tokens(q, k, v, g, b), before.matrix, after.matrix)

    # ---- several tokens -----------------------------------------------------------------------

    def _extend(
        self,
        plan: Extends,
        pool: MambaPool,
        mixed: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        taps: torch.Tensor,
        read: torch.Tensor,
    ) -> None:
        """Let the extending requests' tokens through, and put what they read into `read`."""
        if len(plan.rows) < len(mixed):
            mixed, g, b = mixed[plan.rows], g[plan.rows], b[plan.rows]
        before = pool.load(self.layer_id, plan.source)
        _clear(before, plan.fresh)
        count = len(mixed) + plan.kept_places.numel()
        joined = torch.empty(count, mixed.shape[1], device=mixed.device)
        joined.index_copy_(0, plan.places, mixed.float())
        joined[plan.kept_places] = before.inputs
        # Row i of what comes out ends W places further on.
        through = _convolve(joined, taps)
        state = before.matrix
        for block in plan.blocks:
            at = block.rows.flatten()
            heads = self._heads(through[plan.places[at] - (len(taps) - 1)])
            chunks = solve(Tokens(*(_chunked(x, block) for x in (*heads, g[at], b[at]))))
            found = self._through(block, plan, pool, chunks, joined, state)
            rows = plan.rows[block.known_rows]
            read.index_copy_(0, rows, found.index_select(0, block.known))
        pool.store(self.layer_id, plan.target, LayerState(state, joined[plan.tails]))

    def _through(
        self,
        block: ChunkBlock,
        plan: Extends,
        pool: MambaPool,
        chunks: Chunks,
        joined: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """Let the states through a block, storing those at borders; what is read, [N * C, H, V]."""
        reads = []
        for part, count, at_border in block.steps:
            reads.append(advance(chunks, part, state[:count]))
            if at_border is not None:
                tails = joined[plan.border_tails[at_border]]
                left = LayerState(state[at_border], tails)
                pool.store(self.layer_id, plan.border_pages[at_border], left)
        return torch.cat(reads).transpose(1, 2).flatten(0, 1)

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and k [*, J, K] and v [*, H, V] of the channels [*, C] after the convolution."""
        key_width = self.key_heads * self.key_dim
        widths = (key_width, key_width, self.value_heads * self.value_dim)
        q, k, v = mixed.split_with_sizes(widths, -1)
        heads = (len(mixed), self.key_heads, self.key_dim)
        q, k = _unit(q.reshape(heads)), _unit(k.reshape(heads))
        return (
            q.mul_(self.key_dim**-0.5),
            k,
            v.reshape(len(mixed), self.value_heads, self.value_dim),
        )


def _clear(state: LayerState, fresh: torch.Tensor) -> None:
    """Let the states of requests that begin, bool [N], be zero, whatever was read for them."""
    state.matrix.masked_fill_(fresh.view(-1, 1, 1, 1), 0.0)
    state.inputs.masked_fill_(fresh.view(-1, 1, 1), 0.0)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def _convolve(joined: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Every row but the first W with the W before it, tap by tap: [* - W, C]."""
    count = len(joined) - len(taps) + 1
    total = joined[:count] * taps[0]
    for back in range(1, len(taps)):
        total.addcmul_(joined[back : back + count], taps[back])
    return F.silu(total, inplace=True)


def _chunked(rows: torch.Tensor, block: ChunkBlock) -> torch.Tensor:
    """Rows [N * C, *] as chunks [N, heads, C, *], zero where a chunk has no token."""
    shape = block.valid.shape
    chunks = rows.reshape(*shape, *rows.shape[1:])
    valid = block.valid.view(*shape, *(1,) * (rows.dim() - 1))
    # In the order of heads, as products want it: copied here once, not in each of them.
    return (chunks * valid).transpose(1, 2).contiguous()
