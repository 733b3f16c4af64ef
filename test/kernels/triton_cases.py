"""Requests over a plane or segments of K and V for the Triton kernels, and float64 attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sgl_kernel.triton import (
    Chip,
    DeviceWork,
    Queries,
    Segments,
    Sight,
    Tables,
    Tile,
    heads_together,
    paged_attention,
    plan_work,
)

ALL = Sight()
SMALL, LARGE = Tile(16, 16), Tile(32, 16)
BUSY = Chip(programs=1, min_part_keys=1 << 20)  # no splits but those of the bound
IDLE = Chip(programs=1 << 20, min_part_keys=16)  # every range of keys is split


@dataclass
class Case:
    """Requests of (prefix, extend) tokens with random K and V, NaN where no token stands.

    `heads` is (query heads, kv heads), `dims` (head dim, value dim). `dropped[i]` pages of request
    i's head are in no table. `segment_pages`: the planes lie in segments of so many pages.
    `value_dim`: V are the first so many numbers of K. All of it lies on `device`, made from the
    same numbers on every one.
    """

    lengths: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (6, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    q_dtype: torch.dtype | None = None
    page_size: int = 16
    dropped: Sequence[int] = ()
    segment_pages: int | None = None
    seed: int = 0
    device: str = "cpu"
    value_dim: int | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        computed = self.q_dtype or (torch.float32 if self.dtype.itemsize == 1 else self.dtype)
        (num_heads, kv_heads), widths = self.heads, self.dims
        self.dropped = self.dropped or [0] * len(self.lengths)
        sizes = [p + e for p, e in self.lengths]
        pages = [
            -(-size // self.page_size) - drop
            for size, drop in zip(sizes, self.dropped, strict=True)
        ]
        order = np.random.default_rng(self.seed).permutation(np.arange(1, sum(pages) + 1))
        ids = order.astype(np.int32)
        starts = np.cumsum(pages) - pages
        origins = np.array(self.dropped, np.int32) * self.page_size
        arrays = (torch.from_numpy(array).to(self.device) for array in (ids, starts, origins))
        self.tables = Tables(*arrays, self.page_size)
        self.q = torch.randn(
            sum(e for _, e in self.lengths), num_heads, widths[0], generator=generator
        )
        self.q = self.q.to(computed).to(self.device)
        per_segment = (self.segment_pages or 1) * self.page_size
        slots = -(-(sum(pages) + 1) * self.page_size // per_segment) * per_segment
        self.planes, self.tokens = [], []
        for width in widths:
            plane = torch.full((slots, kv_heads, width), float("nan")).to(self.dtype)
            made = []
            for size, start, origin in zip(sizes, starts, origins, strict=True):
                tokens = torch.randn(size, kv_heads, width, generator=generator).to(self.dtype)
                at = np.arange(origin, size) - origin
                page = ids[start + at // self.page_size].astype(np.int64)
                loc = torch.from_numpy(page * self.page_size + at % self.page_size)
                plane.view(torch.uint8)[loc] = tokens[origin:].view(torch.uint8)
                made.append(tokens)
            self.planes.append(plane.to(self.device))
            self.tokens.append(made)
        if self.value_dim is not None:
            self.planes[1] = self.planes[0]
            self.tokens[1] = [tokens[..., : self.value_dim] for tokens in self.tokens[0]]
        self.parts = [[part.clone() for part in plane.split(per_segment)] for plane in self.planes]

    def memory(self) -> list[torch.Tensor | Segments]:
        if self.segment_pages is None:
            return list(self.planes)
        for plane in self.planes:
            plane.view(torch.uint8).fill_(255)  # what is read from here shows
        made: list[torch.Tensor | Segments] = [
            Segments(
                torch.tensor([part.data_ptr() for part in parts], device=self.device),
                self.dtype,
                self.heads[1],
                width,
                self.segment_pages * self.page_size,
            )
            for parts, width in zip(self.parts, self.dims, strict=True)
        ]
        return made if self.value_dim is None else [made[0], made[0]]

    def queries(self) -> Queries:
        counts = np.array([e for _, e in self.lengths], np.int64)
        return Queries(
            np.cumsum(counts) - counts,
            counts,
            np.array([p for p, _ in self.lengths], np.int64),
            np.arange(len(counts)),
        )

    def run(
        self,
        sight: Sight = ALL,
        *,
        chip: Chip = BUSY,
        small: Tile = SMALL,
        large: Tile = LARGE,
        logit_cap: float = 0.0,
        scale: float | None = None,
        v_scale: float = 1.0,
        sinks: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_heads, kv_heads = self.heads
        if self.value_dim is not None:
            kv_heads = num_heads // heads_together(num_heads)
        work = plan_work(
            self.queries(),
            sight,
            group=num_heads // kv_heads,
            kv_heads=kv_heads,
            small=small,
            large=large,
            chip=chip,
        )
        k, v = self.memory()
        shape = (*self.q.shape[:2], self.value_dim or self.dims[1])
        out = torch.full(shape, float("nan"), dtype=self.q.dtype, device=self.device)
        return paged_attention(
            self.q,
            k,
            v,
            self.tables,
            DeviceWork.upload(work, torch.device(self.device)),
            sight,
            scale=self.dims[0] ** -0.5 if scale is None else scale,
            v_scale=v_scale,
            logit_cap=logit_cap,
            sinks=sinks,
            out=out,
            lse=lse,
            value_dim=self.value_dim,
        )

    def reference(
        self,
        sight: Sight = ALL,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        v_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [R, H, E] and log-sum-exp [R, H], in float64."""
        outs, lses, row = [], [], 0
        num_heads, kv_heads = self.heads
        for (prefix, extend), k, v in zip(self.lengths, *self.tokens, strict=True):
            q = self.q[row : row + extend].cpu().double().transpose(0, 1)
            row += extend
            keys, values = (
                x.double().transpose(0, 1).repeat_interleave(num_heads // kv_heads, 0)
                for x in (k, v)
            )
            scores = q @ keys.transpose(1, 2) * self.dims[0] ** -0.5
            if logit_cap:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            at = np.arange(prefix, prefix + extend)
            key_at = np.arange(prefix + extend)
            seen = (key_at <= at[:, None]) & (key_at >= sight.first_seen(at)[:, None])
            scores = scores.masked_fill(~torch.from_numpy(seen), float("-inf"))
            if sinks is not None:
                sink = sinks.double().view(-1, 1, 1).expand(-1, extend, 1)
                scores = torch.cat((scores, sink), -1)
                values = torch.cat((values, torch.zeros_like(values[:, :1])), 1)
            outs.append((scores.softmax(-1) @ values).transpose(0, 1) * v_scale)
            lses.append(torch.logsumexp(scores, -1).t())
        return torch.cat(outs), torch.cat(lses)
