"""K and V that are stored divided by a layer's scales: every backend, against float64 by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, has_native_kernels
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.torch_native_table import SegmentTableAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.utils.native import triton_kernels
from srt.crossed import crossed
from srt.layers.attention.test_torch_native_table import pool_of
from srt.layers.attention_cases import Case, make_layer, make_spec, make_tables

LENGTHS = [(90, 1), (0, 40), (30, 9), (7, 1)]
K_SCALE, V_SCALE = 3.3, 250.0

MakeBackend = Callable[[KVCacheSpec], AttentionBackend]
BACKENDS: dict[str, MakeBackend] = {
    "torch_native": TorchNativeAttnBackend,
    "segment_table": lambda spec: SegmentTableAttnBackend(spec, (48,)),
    "torch on a device": TorchDeviceAttnBackend,
}
if has_native_kernels():
    BACKENDS["cpu"] = CpuAttnBackend
if triton_kernels() is not None:
    BACKENDS["triton"] = TritonAttnBackend


def scaled_case(dtype: str, **shape: Any) -> Case:
    """Values far beyond fp8's largest number, keys in multiples of a scale."""
    spec = make_spec(page_size=16, dtype=dtype)
    layer = make_layer(spec, **shape)
    layer.set_kv_scales(K_SCALE, V_SCALE)
    tables = make_tables(LENGTHS, 16, [2, 1])
    return Case(spec, LENGTHS, tables, layer, logits_rows=[0, 40, 49])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    crossed([{}, {"cap": 2.0}, {"sinks": True}, {"window": 21}], ["fp8_e4m3", "fp8_e5m2"]),
    ids=str,
)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_equals_dense_attention_over_the_numbers_themselves(
    name: str, shape: dict[str, Any], dtype: str
) -> None:
    case = scaled_case(dtype, **shape)
    if name == "segment_table":
        case.make_pool = pool_of(48)
    backend = BACKENDS[name](case.spec)
    out = case.run(backend).double()
    exact = case.reference()
    assert exact.abs().max() > 600
    torch.testing.assert_close(out / V_SCALE, exact / V_SCALE, rtol=0, atol=4e-6)
    pruned = case.run(backend, pruned=True).double()
    expected = exact[torch.tensor(case.logits_rows)] / V_SCALE
    torch.testing.assert_close(pruned / V_SCALE, expected, rtol=0, atol=4e-6)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_triton_multiplies_in_the_launch_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(x: torch.Tensor, factor: float) -> torch.Tensor:
        raise AssertionError(f"{tuple(x.shape)} times {factor}, in a launch of its own")

    monkeypatch.setattr("sglang.srt.layers.radix_attention.scaled", never)
    case = scaled_case("fp8_e4m3")
    out = case.run(BACKENDS["triton"](case.spec)).double()
    torch.testing.assert_close(out / V_SCALE, case.reference() / V_SCALE, rtol=0, atol=4e-6)
    with pytest.raises(AssertionError, match=f"times {V_SCALE}"):
        case.run(BACKENDS["torch_native"](case.spec))


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_scale_ends_saturation(name: str) -> None:
    """Values of a hundred thousand: saturated they are all 448, scaled they are near."""
    errors = []
    for v_scale in (1.0, 1000.0):
        case = scaled_case("fp8_e4m3")
        case.layer.set_kv_scales(1.0, v_scale)
        case.value_factor = 1e5 / v_scale
        if name == "segment_table":
            case.make_pool = pool_of(48)
        out = case.run(BACKENDS[name](case.spec)).double()
        exact = case.reference()
        errors.append(float((out - exact).abs().max() / exact.abs().max()))
    assert errors[0] > 0.9
    assert errors[1] < 0.1


def test_scales_can_be_set_again() -> None:
    layer = make_layer(make_spec())
    layer.set_kv_scales(4.0, 8.0)
    assert (layer.scaling, layer.k_scale, layer.v_scale) == (1.0, 4.0, 8.0)
    layer.set_kv_scales(1.0, 1.0)
    assert (layer.scaling, layer.k_scale, layer.v_scale) == (0.25, 1.0, 1.0)
