"""Slots whose element and byte offsets pass 2^31 and 2^32, on address space that costs nothing."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from srt.layers.attention_cases import Case, FakePool, FakeTable, make_layer, make_spec

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13 on
NUM_SLOTS = (1 << 28) + 4096  # of 32 elements: the last offset is past 2^33 elements


def reserved_plane(num_slots: int, heads: int, width: int) -> torch.Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, num_slots * heads * width * 2, flags=flags)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(num_slots, heads, width)


class FarPool(FakePool):
    def __init__(self, spec: KVCacheSpec, num_slots: int) -> None:
        del num_slots
        self.k = [reserved_plane(NUM_SLOTS, spec.kv_heads, spec.head_dim)]
        self.v = [reserved_plane(NUM_SLOTS, spec.kv_heads, spec.v_head_dim)]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_far_slots(batched: bool, scattered: bool) -> None:
    page_size, far = 16, NUM_SLOTS // 16
    spec = make_spec(page_size=page_size, dtype="bfloat16")
    lengths = [(60, 1), (61, 1), (50, 9), (62, 1)]
    tables = []
    for i in range(4):
        ids = np.array([far - 4 * i - k for k in (4, 3, 2, 1)], np.int32)
        tables.append(FakeTable(ids[::-1].copy() if scattered else ids, 0, page_size))
    case = Case(spec, lengths, tables, make_layer(spec), make_pool=FarPool)
    tuning = TorchNativeTuning(batch_row_bytes=1024 if batched else 0)
    out = case.run(TorchNativeAttnBackend(spec, tuning))
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=2e-2)
