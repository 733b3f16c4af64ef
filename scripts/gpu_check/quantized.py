"""Weights that stay quantised: products with their codes against float64, and what they reach.

Part of stages 1 and 4. A figure is the codes, scales and minima that a call must read, per second,
and that as a share of a copy's bandwidth; weights are more than a device's caches hold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_check.records import Journal
from gpu_check.setting import Setting, time_ms
from gpu_check.shapes import (
    CodesShape,
    ExpertsShape,
    checked_codes,
    checked_experts,
    timed_codes,
    timed_experts,
)
from sglang.srt.utils.native import triton_kernels

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP8 = 0  # as bits
# bits, group (of FP8 0: all inputs), with minima, values
_LAYOUTS: dict[str, tuple[int, int, bool, tuple[int, ...] | None]] = {
    "4 bits": (4, 32, False, None),
    "4 bits with minima": (4, 32, True, None),
    "MXFP4": (4, 32, False, _E2M1),
    "4 bits by table": (4, 32, False, _UNEVEN),
    "8 bits": (8, 32, False, None),
    "8 bits in 16": (8, 16, False, None),
    "FP8": (_FP8, 0, False, None),
    "FP8 in 128": (_FP8, 128, False, None),
    "FP8 rounding inputs": (_FP8, 0, False, None),
    "FP8 in 128 rounding inputs": (_FP8, 128, False, None),
}
_TIMED_BYTES = 512 << 20  # of weights that take turns: several times a device's caches
# The largest distance from float64 as a share of the largest number: weights are rounded once, and
# what goes from one of an expert's products to the next is too.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
_EXPERTS_TOLERANCE = 5e-2
_ROUNDING = 2.0**-4  # of the largest input: twice half a step of E4M3


def make_weight(setting: Setting, layout: str, outputs: int, inputs: int) -> Any:
    """Random codes as `sgl_kernel.triton.QuantizedWeight` [outputs, inputs] on the device."""
    kernels: Any = triton_kernels()
    bits, group, with_minima, values = _LAYOUTS[layout]
    device = setting.device
    if bits == _FP8:
        return _make_fp8(setting, layout, outputs, inputs, group or inputs)
    if bits == 4:
        size, kind, least = (outputs, inputs // 2), torch.uint8, 0
    else:
        size, kind, least = (outputs, inputs), torch.int8, -128
    codes = torch.randint(least, least + 256, size, dtype=kind, device=device)
    scales = (torch.rand(outputs, inputs // group, device=device) + 0.1).half()
    minima = -8 * scales if with_minima else None
    return kernels.QuantizedWeight(codes, scales, minima, 2.0**-6, values)


def _make_fp8(setting: Setting, layout: str, outputs: int, inputs: int, group: int) -> Any:
    kernels: Any = triton_kernels()
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8, device=setting.device)
    codes[codes & 127 == 127] = 1  # the smallest number in place of NaN
    scales = torch.rand(outputs, -(-inputs // group), device=setting.device) + 0.1
    codes = codes.view(torch.float8_e4m3fn)
    weight = kernels.QuantizedWeight(codes, scales, None, 2.0**-8, group=group)
    weight.rounds_inputs = layout.endswith("rounding inputs")
    return weight


def exact(weight: Any) -> torch.Tensor:
    """float64 [N, K]: what the codes stand for."""
    codes: torch.Tensor = weight.codes
    if weight.bits == 4:
        blocks = codes.view(len(codes), -1, 16)
        codes = torch.cat((blocks & 15, blocks >> 4), -1).flatten(1)
    wide: torch.Tensor = codes.double()
    if weight.values is not None:
        wide = torch.tensor(weight.values, device=codes.device).double()[codes.long()]
    wide = wide * weight.scales.double().repeat_interleave(weight.group, 1)[:, : wide.shape[1]]
    if weight.mins is not None:
        wide += weight.mins.double().repeat_interleave(weight.group, 1)
    wide *= weight.gain
    return wide


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def product_error(setting: Setting, shape: CodesShape) -> float:
    """The largest distance of a product, and of single outputs as numbers, from float64."""
    dtype = getattr(torch, shape.dtype)
    weight = make_weight(setting, shape.layout, shape.outputs, shape.inputs)
    x = torch.randn(shape.rows, shape.inputs, device=setting.device).to(dtype)
    bias = torch.randn(shape.outputs, device=setting.device).to(dtype)
    wide = exact(weight)
    out = weight.multiply(x, bias)
    ids = torch.tensor([shape.outputs - 1, 0], device=setting.device)
    rows = weight.dequantize_rows(ids, dtype)
    rounded = weight.rounded(x, weight.tile_for(shape.rows, dtype))
    inputs = x.double()
    if rounded is not None:
        scales = rounded.scales.double().repeat_interleave(weight.group, 1)[:, : shape.inputs]
        inputs = rounded.codes.double() * scales
        if _distance(inputs, x.double()) > _ROUNDING:
            raise ValueError("inputs are rounded too far")
    wanted = inputs @ wide.T + bias.double()
    return max(_distance(out, wanted), _distance(rows, wide[ids]))


def _expert_codes(setting: Setting, shape: ExpertsShape) -> tuple[Any, Any, Any]:
    """Gate, up and down of all experts; gate and up are one matrix."""
    kernels: Any = triton_kernels()
    width = shape.width
    both = make_weight(setting, shape.layout, shape.experts * 2 * width, shape.hidden)
    down = make_weight(setting, shape.layout, shape.experts * shape.hidden, width)
    halves = (kernels.ExpertCodes(both, 2 * width, first, width) for first in (0, width))
    return *halves, kernels.ExpertCodes(down, shape.hidden, 0, shape.hidden)


def _routing(setting: Setting, shape: ExpertsShape) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(shape.rows, shape.experts, device=setting.device)
    weights, experts = torch.topk(scores, shape.chosen)
    return experts, weights


def mixture_error(setting: Setting, shape: ExpertsShape) -> float:
    """The largest distance of a layer of experts from float64."""
    kernels: Any = triton_kernels()
    dtype = getattr(torch, shape.dtype)
    gate, up, down = _expert_codes(setting, shape)
    experts, weights = _routing(setting, shape)
    x = torch.randn(shape.rows, shape.hidden, device=setting.device).to(dtype)
    out = kernels.mixture(x, experts, weights, (gate, up), down, num_experts=shape.experts)
    wanted = torch.zeros(shape.rows, shape.hidden, dtype=torch.float64, device=setting.device)
    for expert in range(shape.experts):
        share = (weights * (experts == expert)).sum(-1, keepdim=True).double()
        first = expert * 2 * shape.width
        own = exact(gate.weight.rows(first, first + 2 * shape.width))
        given, wide = (x.double() @ own.T).chunk(2, -1)
        inner = torch.nn.functional.silu(given) * wide
        own = exact(down.weight.rows(expert * shape.hidden, (expert + 1) * shape.hidden))
        wanted += share * (inner @ own.T)
    return _distance(out, wanted)


def check_codes(setting: Setting, journal: Journal) -> None:
    """Products and experts of every layout against float64."""
    if triton_kernels() is None:
        journal.skip("quantised weights", "sgl-kernel or triton is not installed")
        return
    dry = setting.is_dry
    checks = [(f"product {one.name}", _TOLERANCES[one.dtype], partial(product_error, setting, one))
              for one in checked_codes(dry)]  # fmt: skip
    checks += [(f"experts {one.name}", _EXPERTS_TOLERANCE, partial(mixture_error, setting, one))
               for one in checked_experts(dry)]  # fmt: skip
    for name, bound, error_of in checks:
        if setting.seconds_left <= 0:
            journal.skip("quantised weights, the rest", "no time is left")
            return
        torch.manual_seed(0)
        try:
            with setting.runtime.computing(), torch.inference_mode():
                error = error_of()
        except Exception as reason:  # noqa: BLE001  one shape that breaks is one finding
            journal.fail(name, f"{type(reason).__name__}: {reason}")
            continue
        journal.judge(name, error <= bound, f"above {bound:g}", max_error=error)


def time_codes(setting: Setting, journal: Journal, copied: float) -> None:
    """Decode's products and gpt-oss-120b's experts; `copied` bytes per second are the ceiling."""
    if triton_kernels() is None:
        journal.skip("quantised weights", "sgl-kernel or triton is not installed")
        return
    dry = setting.is_dry
    calls = [(f"product {one.name}", partial(_product_calls, setting, one))
             for one in timed_codes(dry)]  # fmt: skip
    calls += [(f"experts {one.name}", partial(_mixture_calls, setting, one))
              for one in timed_experts(dry)]  # fmt: skip
    for name, make in calls:
        if setting.seconds_left <= 0:
            journal.skip(f"{name} and the rest", "no time is left")
            return
        try:
            with setting.runtime.computing(), torch.inference_mode():
                work, num_bytes, count = make()
                ms = time_ms(setting, work)
        except Exception as reason:  # noqa: BLE001  one shape that breaks is one finding
            journal.fail(name, f"{type(reason).__name__}: {reason}")
            continue
        speed = num_bytes / ms * 1e3
        journal.note(name, ms=ms / count, gb_per_s=speed / 1e9, of_ceiling=speed / copied)


def _product_calls(setting: Setting, shape: CodesShape) -> tuple[Callable[[], None], float, int]:
    """Products with weights in turn, the bytes that they read, and how many these are."""
    x = torch.randn(shape.rows, shape.inputs, device=setting.device)
    x = x.to(getattr(torch, shape.dtype))
    weights = [make_weight(setting, shape.layout, shape.outputs, shape.inputs)]
    count = 1 if setting.is_dry else -(-_TIMED_BYTES // weights[0].nbytes)
    for _ in range(count - 1):
        weights.append(make_weight(setting, shape.layout, shape.outputs, shape.inputs))

    def work() -> None:
        for weight in weights:
            weight.multiply(x)

    return work, float(sum(weight.nbytes for weight in weights)), count


def _mixture_calls(setting: Setting, shape: ExpertsShape) -> tuple[Callable[[], None], float, int]:
    """As `_product_calls`: steps that choose other experts, with those experts' bytes."""
    kernels: Any = triton_kernels()
    gate, up, down = _expert_codes(setting, shape)
    bytes_of_expert = (gate.weight.nbytes + down.weight.nbytes) / shape.experts
    x = torch.randn(shape.rows, shape.hidden, device=setting.device)
    x = x.to(getattr(torch, shape.dtype))
    routings: list[tuple[torch.Tensor, torch.Tensor]] = []
    num_bytes = 0.0
    while num_bytes < _TIMED_BYTES and not (setting.is_dry and routings):
        routings.append(_routing(setting, shape))
        num_bytes += len(torch.bincount(routings[-1][0].flatten()).nonzero()) * bytes_of_expert

    def work() -> None:
        for experts, weights in routings:
            kernels.mixture(x, experts, weights, (gate, up), down, num_experts=shape.experts)

    return work, num_bytes, len(routings)
