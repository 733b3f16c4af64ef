"""Stand-ins for FlashInfer's wrappers: they do in torch what its documentation says of them.

Documented: page tables int32, a causal mask aligned at the end, log-sum-exps to base 2. A query at
place i of its sequence's keys sees keys j <= i with i - j <= window_left. `k_scale` is what K is
multiplied by.
"""

from __future__ import annotations

import math
from typing import Any

import torch

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


class FakeWrappers:
    def __init__(self) -> None:
        self.made: list[FakeWrapper] = []

    def decode(self, device: torch.device) -> FakeWrapper:
        self.made.append(FakeWrapper(True))
        return self.made[-1]

    def prefill(self, device: torch.device) -> FakeWrapper:
        self.made.append(FakeWrapper(False))
        return self.made[-1]
