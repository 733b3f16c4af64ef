"""Backends over 1M, 4M and 10M positions whose table names the same few pages again and again.

The exact answer is a float64 softmax over the few keys, each weighted by how often the table shows
it, and over the step's own keys. One page is named once: its needle weighs as much as the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.utils.native import native_kernels
from sglang.srt.utils.progress import Progress
from srt.layers.attention_cases import DTYPES, FakePool, FakeTable, make_layer, make_spec

native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

PAGE = 64
FEW = 62  # pages that come again and again: 1..FEW
NEEDLE, OWN = FEW + 1, FEW + 2  # pages named once: in the middle, and at the end
WIDTH = 32


@dataclass(frozen=True)
class Long:
    """A request of `prefix` cached positions and `extend` new ones on page OWN."""

    spec: KVCacheSpec
    pool: FakePool
    layer: RadixAttention
    table: FakeTable
    queries: torch.Tensor  # [extend, H, D]
    extend: int

    @property
    def prefix(self) -> int:
        return PAGE * (len(self.table.page_ids) - 1)

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """[extend, H, D] through the layer, as a model calls it."""
        own = slice(PAGE * OWN, PAGE * OWN + self.extend)
        geometry = BatchGeometry(
            seq_lens=np.array([self.prefix + self.extend]),
            extend_prefix_lens=np.array([self.prefix]),
            extend_seq_lens=np.array([self.extend]),
            q_starts=np.array([0]),
            logits_rows=np.array([self.extend - 1]),
            block_tables=((self.table,),),
            page_size=PAGE,
        )
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if self.extend == 1 else ForwardMode.MIXED,
            input_ids=torch.zeros(self.extend, dtype=torch.long),
            positions=self.prefix + torch.arange(self.extend),
            geometry=geometry,
            out_cache_loc=(torch.arange(own.start, own.stop),),
            logits_rows=torch.tensor([self.extend - 1]),
            token_to_kv_pool=self.pool,
            attn_backend=backend,
            attn_plan=backend.plan(geometry),
            progress=Progress(),
        )
        k, v = self.pool.k[0][own].clone(), self.pool.v[0][own].clone()
        out = self.layer(self.queries.flatten(1), k.flatten(1), v.flatten(1), batch)
        return out.view(self.extend, -1, WIDTH)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[extend, H, D] in float64, and the needle's share [extend, H]."""
        counts = np.bincount(self.table.page_ids, minlength=OWN + 1)
        seen = torch.from_numpy(counts).double().repeat_interleave(PAGE).log()
        visible = seen.expand(self.extend, -1).clone()
        for row in range(self.extend):
            visible[row, PAGE * OWN + row + 1 :] = float("-inf")
        keys, values = (x[0][:, 0].double().nan_to_num() for x in (self.pool.k, self.pool.v))
        scores = self.queries.double() @ keys.T * self.layer.scaling + visible.unsqueeze(1)
        weights = scores.softmax(-1)
        return weights @ values, weights[..., PAGE * NEEDLE]


def make_long(length: int, extend: int, dtype: str) -> Long:
    spec = make_spec(page_size=PAGE, kv_heads=1, head_dim=WIDTH, dtype=dtype)
    rng, generator = np.random.default_rng(length), torch.Generator().manual_seed(length)
    pages = rng.integers(1, FEW + 1, length // PAGE).astype(np.int32)
    pages[100:3000] = np.arange(2900) % 30 + 1  # runs of pages, to be read in place
    pages[len(pages) // 2], pages[-1] = NEEDLE, OWN
    pool = FakePool(spec, PAGE * (OWN + 1))
    shape = (PAGE * (OWN + 1), 1, WIDTH)
    stored = slice(PAGE, PAGE * OWN + extend)
    pool.k[0][stored] = torch.randn(shape, generator=generator)[stored].to(DTYPES[dtype])
    # what averages to nothing would show no error
    pool.v[0][stored] = (torch.randn(shape, generator=generator) + 1.0)[stored].to(DTYPES[dtype])
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    queries = torch.randn(extend, 2, WIDTH, generator=generator) * 0.1 + 4.0 * direction
    layer = make_layer(spec, group=2)
    # a score of about the logarithm of all other keys' sum
    needle = direction * float(np.log(length) + 0.3) / (4.0 * layer.scaling)
    pool.k[0][PAGE * NEEDLE, 0] = needle.to(DTYPES[dtype])
    return Long(spec, pool, layer, FakeTable(pages, 0, PAGE), queries.to(DTYPES[dtype]), extend)


def _is_native(make_backend: object) -> bool:
    """Whether the backend computes this test's prompts itself."""
    kernels = native_kernels()
    return make_backend is CpuAttnBackend and kernels is not None and kernels.has_prompt_kernel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extend", [1, 5], ids=["decode", "extend"])
@pytest.mark.parametrize("length", [1_000_000, 4_000_000, 10_000_000])
@pytest.mark.parametrize(
    "make_backend",
    [TorchNativeAttnBackend, pytest.param(CpuAttnBackend, marks=native)],
    ids=["torch_native", "cpu"],
)
def test_equals_the_weighted_sum(
    make_backend: Callable[[KVCacheSpec], AttentionBackend],
    length: int,
    extend: int,
    dtype: str,
) -> None:
    long = make_long(length, extend, dtype)
    want, share = long.reference()
    assert 0.02 < share.median() < 0.98, "the needle and the rest both count"
    out = long.run(make_backend(long.spec))
    # torch's fused kernel loses more over long runs
    atol = 1.5e-2 if dtype == "bfloat16" else 2e-5 if _is_native(make_backend) else 3e-4
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
