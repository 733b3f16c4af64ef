"""Attention whose values are the first numbers of its keys, on every backend that serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, has_native_kernels
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.utils.native import triton_kernels
from srt.layers.attention_cases import Case, make_layer, make_spec, make_tables

# Pieces, blocks and gathers of a few tokens, so that small cases are cut everywhere.
TINY = TorchNativeTuning(
    query_block=8,
    min_run_bytes=256,
    gather_bytes=1 << 12,
    piece_work=1 << 16,
    batch_row_bytes=256,
)
LENGTHS = [(0, 37), (33, 1), (70, 1), (20, 21), (129, 3), (5, 1)]

BACKENDS: dict[str, Callable[[KVCacheSpec], AttentionBackend]] = {
    "torch_native": TorchNativeAttnBackend,
    "tiny": lambda spec: TorchNativeAttnBackend(spec, TINY),
    "device": TorchDeviceAttnBackend,
}
if has_native_kernels():
    BACKENDS["cpu"] = CpuAttnBackend
if triton_kernels() is not None:
    BACKENDS["triton"] = TritonAttnBackend


def case_of(
    *,
    dtype: str = "float32",
    lengths: Any = LENGTHS,
    group: int = 6,
    widths: tuple[int, int] = (48, 32),
    page_size: int = 4,
    **changes: Any,
) -> Case:
    spec = make_spec(
        kv_heads=1,
        head_dim=widths[0],
        v_head_dim=widths[1],
        dtype=dtype,
        page_size=page_size,
        values_in_keys=True,
    )
    layer = make_layer(spec, group=group, **changes)
    return Case(spec, lengths, make_tables(lengths, page_size, [1, 3, 2]), layer)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "atol"), [("float32", 3e-6), ("bfloat16", 2e-2), ("fp8_e4m3", 3e-6)]
)
def test_mixed_batches(name: str, dtype: str, atol: float) -> None:
    case = case_of(dtype=dtype)
    if dtype == "fp8_e4m3":
        case.layer.set_kv_scales(0.5, 7.0)
        assert case.layer.v_scale == 0.5, "values are keys"
    out = case.run(BACKENDS[name](case.spec))
    torch.testing.assert_close(out.double(), case.reference(), atol=atol, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_decode_steps_of_deepseeks_widths(name: str) -> None:
    case = case_of(lengths=[(200, 1), (64, 1), (3, 1)], group=16, widths=(576, 512), page_size=16)
    out = case.run(BACKENDS[name](case.spec))
    torch.testing.assert_close(out.double(), case.reference(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_pruned_rows(name: str) -> None:
    case = case_of()
    case.logits_rows = (3, 36, 38, 55)
    out = case.run(BACKENDS[name](case.spec), pruned=True)
    torch.testing.assert_close(out.double(), case.reference()[[3, 36, 38, 55]], atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("changes", [{"cap": 2.0}, {"window": 21}, {"sinks": True}], ids=str)
def test_caps_windows_and_sinks(name: str, changes: dict[str, Any]) -> None:
    case = case_of(**changes)
    out = case.run(BACKENDS[name](case.spec))
    torch.testing.assert_close(out.double(), case.reference(), atol=3e-6, rtol=0)


def test_flashinfer_says_that_it_does_not_serve_it() -> None:
    with pytest.raises(ValueError, match="flashinfer does not serve latent attention"):
        FlashInferAttnBackend(case_of(dtype="bfloat16").spec)
