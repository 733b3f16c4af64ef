"""Stand-ins for FlashInfer's wrappers: they do in torch what its documentation says of them.

Documented: page tables int32, a causal mask aligned at the end, log-sum-exps to base 2. A query at
place i of its sequence's keys sees keys j <= i with i - j <= window_left. `k_scale` is what K is
multiplied by.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sglang.srt.layers.attention.flashinfer_wrappers import PageBuffers

ATOL = {"bfloat16": 3e-2, "float16": 4e-3, "fp8_e4m3": 3e-2}
OPTIONS = {"window_left", "logits_soft_cap", "sm_scale", "q_data_type", "kv_data_type"}


class FakeWrapper:
    """A wrapper as long as nothing is recorded."""

    def __init__(self, single: bool) -> None:
        self.single = single
        self.num_plans = 0

    def plan(self, *tables: Any, **options: Any) -> None:
        self.num_plans += 1
        self.causal = True
        *arrays, heads, kv_heads, dim, page_size = tables
        for array in arrays:
            assert array.dtype is torch.int32
        if self.single:
            indptr, indices, last = arrays
            rows = torch.arange(len(indptr), dtype=torch.int32)
        else:
            rows, indptr, indices, last = arrays
            self.causal = options.pop("causal")
        assert (last >= 1).all()
        assert (last <= page_size).all()
        assert set(options) == OPTIONS
        self.tables = (rows.tolist(), indptr.tolist(), indices.long(), last.tolist())
        self.shape = (heads, kv_heads, dim, page_size)
        self.options = options

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, return_lse: bool, k_scale: float = 1.0
    ) -> Any:
        assert return_lse
        rows, indptr, indices, last = self.tables
        heads, kv_heads, dim, page_size = self.shape
        keys, values = paged_kv_cache
        assert q.dtype is self.options["q_data_type"]
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert keys.dtype is self.options["kv_data_type"]
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, dim)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        for n in range(len(last)):
            some = indices[indptr[n] : indptr[n + 1]]
            count = (len(some) - 1) * page_size + last[n]
            k, v = (
                plane[some].flatten(0, 1)[:count].float().repeat_interleave(heads // kv_heads, 1)
                for plane in paged_kv_cache
            )
            queries = q[rows[n] : rows[n + 1]].float()
            scores = torch.einsum("mhd,nhd->hmn", queries, k) * self.options["sm_scale"]
            scores = scores * k_scale
            cap = self.options["logits_soft_cap"]
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            at = torch.arange(count - len(queries), count).unsqueeze(1)
            key_at = torch.arange(count)
            visible = (key_at <= at) | (not self.causal)
            if self.options["window_left"] >= 0:
                visible &= at - key_at <= self.options["window_left"]
            scores = scores.masked_fill(~visible, float("-inf"))
            out[rows[n] : rows[n + 1]] = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v).to(
                q.dtype
            )
            lse[rows[n] : rows[n + 1]] = (scores.logsumexp(-1) / math.log(2.0)).transpose(0, 1)
        return out, lse


class FakeGraphWrapper:
    """Documented of use_cuda_graph: the tables are copied into buffers that never move, the batch
    is that of the construction for good, `plan` can't be captured and is called between replays.

    `run` is operations on tensors that reads nothing but those buffers, so that what was recorded
    does what was planned last. It goes over as many pages a sequence as the buffer has.
    """

    def __init__(self, buffers: PageBuffers) -> None:
        self.buffers = buffers
        self.size = len(buffers.last)
        assert len(buffers.indptr) == self.size + 1
        self.planned: tuple[Any, ...] | None = None
        self.num_plans = self.num_runs = 0

    def plan(self, *tables: Any, **options: Any) -> None:
        indptr, pages, last, *shape = tables
        for array in (indptr, pages, last):
            assert array.dtype is torch.int32
        assert set(options) == OPTIONS
        assert len(indptr) == self.size + 1, "the batch size is fixed"
        assert len(last) == self.size
        assert int(indptr[-1]) == len(pages) <= len(self.buffers.pages)  # a capture refuses this
        assert (last >= 1).all()
        assert (last <= shape[3]).all()
        assert (indptr.diff() >= 1).all()
        constants = (tuple(shape), tuple(sorted(options.items(), key=lambda item: item[0])))
        assert self.planned in (None, constants), "what is captured does not change"
        self.planned = constants
        self.shape, self.options = shape, options
        self.buffers.indptr.copy_(indptr)
        self.buffers.last.copy_(last)
        self.buffers.pages[: len(pages)].copy_(pages)
        self.num_plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, return_lse: bool, k_scale: float = 1.0
    ) -> Any:
        assert return_lse
        self.num_runs += 1
        heads, kv_heads, dim, page_size = self.shape
        assert q.shape == (self.size, heads, dim)
        assert q.dtype is self.options["q_data_type"]
        for plane in paged_kv_cache:
            assert plane.dtype is self.options["kv_data_type"]
            assert plane.shape[1:] == (page_size, kv_heads, dim)
        indptr, pages, last = (buffer.long() for buffer in self.buffers)
        most = len(pages)
        places = indptr[:-1, None] + torch.arange(most)
        held = places < indptr[1:, None]  # the others are read on the dump page and never seen
        ids = torch.where(held, pages[places.clamp(max=most - 1)], 0)
        count = (indptr.diff() - 1) * page_size + last
        at, key_at = (count - 1)[:, None], torch.arange(most * page_size)
        visible = key_at <= at
        if self.options["window_left"] >= 0:
            visible = visible & (at - key_at <= self.options["window_left"])
        k, v = (self._gathered(plane, ids, visible, heads) for plane in paged_kv_cache)
        scores = torch.einsum("nhd,nkhd->nhk", q.double(), k) * self.options["sm_scale"] * k_scale
        cap = self.options["logits_soft_cap"]
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        out = torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), v)
        return out.to(q.dtype), (scores.logsumexp(-1) / math.log(2.0)).float()

    def _gathered(
        self, plane: torch.Tensor, ids: torch.Tensor, visible: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """Keys or values float64 [N, pages * page_size, H, D]; 0 where nothing is seen."""
        some = plane.view(torch.uint8) if plane.dtype.itemsize == 1 else plane
        taken = some.index_select(0, ids.flatten()).view(plane.dtype).double()
        taken = taken.view(*visible.shape, *plane.shape[2:])
        taken = torch.where(visible[:, :, None, None], taken, 0.0)
        return taken.repeat_interleave(heads // plane.shape[2], 2)


class FakeWrappers:
    def __init__(self) -> None:
        self.made: list[FakeWrapper] = []
        self.recorded: list[FakeGraphWrapper] = []

    def decode(self, device: torch.device) -> FakeWrapper:
        self.made.append(FakeWrapper(True))
        return self.made[-1]

    def prefill(self, device: torch.device) -> FakeWrapper:
        self.made.append(FakeWrapper(False))
        return self.made[-1]

    def recorded_decode(self, buffers: PageBuffers) -> FakeGraphWrapper:
        self.recorded.append(FakeGraphWrapper(buffers))
        return self.recorded[-1]
