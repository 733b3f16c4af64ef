"""Stage 1: every attention backend that loads and the layers' kernels, against float64."""

from __future__ import annotations

from typing import Any

import torch

from gpu_check.attention_batch import OnePool, largest_error, make_batch, make_tables, spec_of
from gpu_check.precompile import compile_kernels
from gpu_check.quantized import check_codes
from gpu_check.records import Journal
from gpu_check.sampling import check_sampling
from gpu_check.setting import Setting
from gpu_check.shapes import AttentionShape, kernel_shapes
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import get_attention_backend
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES
from sglang.srt.mem_cache.segment_backing.segment_plane import raw, round_to
from sglang.srt.utils.native import triton_kernels

BACKENDS = ("triton", "flashinfer", "torch_native")
# The largest distance from float64 that rounding explains, by what K and V are stored in.
TOLERANCES = {
    "float32": 2e-5,
    "bfloat16": 3e-2,
    "float16": 4e-3,
    "fp8_e4m3": 3e-2,
    "fp8_e5m2": 3e-2,
}


def backend_class(name: str, setting: Setting) -> type[AttentionBackend]:
    """The class that a server would take. Raises ValueError with the reason when it has none."""
    return get_attention_backend(name, setting.device.type)


def check_attention(setting: Setting, journal: Journal) -> None:
    """Compare all backends on all shapes."""
    for name in BACKENDS:
        try:
            kind = backend_class(name, setting)
        except ValueError as error:
            journal.skip(f"attention {name}", str(error))
            continue
        for shape in kernel_shapes(setting.is_dry):
            if setting.seconds_left <= 0:  # a kernel of a new shape takes seconds to compile
                journal.skip(f"attention {name}, the rest", "no time is left")
                break
            _check_shape(setting, journal, name, kind, shape)


def _check_shape(
    setting: Setting,
    journal: Journal,
    name: str,
    kind: type[AttentionBackend],
    shape: AttentionShape,
) -> None:
    what = f"{name} {shape.name} {shape.heads.name} {shape.dtype} page {shape.page_size}"
    torch.manual_seed(0)
    try:
        backend = kind(spec_of(shape.heads, shape.dtype, shape.page_size))
        with setting.runtime.computing(), torch.inference_mode():
            _, num_slots = make_tables(shape.lengths, shape.page_size, scattered=shape.scattered)
            pool = OnePool(num_slots, shape.heads, shape.dtype, setting.device)
            batch = make_batch(shape, backend, pool, setting.device)
            out = batch.attend(backend)
            setting.synchronize()
            error = largest_error(batch, pool, out, shape)
    except NotImplementedError as reason:
        journal.skip(what, str(reason))
        return
    except Exception as reason:  # noqa: BLE001  one shape that breaks is one finding
        journal.fail(what, f"{type(reason).__name__}: {reason}")
        return
    bound = TOLERANCES[shape.dtype]
    journal.judge(what, error <= bound, f"above {bound:g}", max_error=error)


def check_layers(setting: Setting, journal: Journal) -> None:
    """The layers' kernels on the device against PyTorch in float64."""
    if triton_kernels() is None:
        journal.skip("layers", "sgl-kernel or triton is not installed")
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, check in LAYERS.items():
            what = f"{name} {str(dtype).removeprefix('torch.')}"
            try:
                with setting.runtime.computing(), torch.inference_mode():
                    error = check(setting, dtype)
            except Exception as reason:  # noqa: BLE001  one kernel that breaks is one finding
                journal.fail(what, f"{type(reason).__name__}: {reason}")
                continue
            bound = 1e-4 if dtype is torch.float32 else 5e-2
            journal.judge(what, error <= bound, f"above {bound:g}", max_error=error)


def _numbers(setting: Setting, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=setting.device).to(dtype)


def _distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance, as a share of the largest number."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def _norm(setting: Setting, dtype: torch.dtype) -> float:
    kernels: Any = triton_kernels()
    rows, width = (3, 64) if setting.is_dry else (513, 4096)
    x, weight = _numbers(setting, dtype, rows, width), _numbers(setting, dtype, width)
    residual = torch.randn(rows, width, device=setting.device)
    out, total = kernels.rms_norm(x, weight, 1e-5, residual)
    exact = x.double() + residual.double()
    scaled = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    return max(_distance(out, scaled), _distance(total, exact))


def _gate(setting: Setting, dtype: torch.dtype) -> float:
    kernels: Any = triton_kernels()
    x = _numbers(setting, dtype, *((3, 64) if setting.is_dry else (513, 28672)))
    gate, up = x.double().chunk(2, -1)
    return _distance(kernels.silu_and_mul(x), torch.nn.functional.silu(gate) * up)


def _mixture(setting: Setting, dtype: torch.dtype) -> float:
    kernels: Any = triton_kernels()
    tokens, hidden, width, experts = (5, 32, 16, 4) if setting.is_dry else (300, 2048, 1024, 16)
    x = _numbers(setting, dtype, tokens, hidden)
    gate_up = (_numbers(setting, torch.float32, experts, 2 * width, hidden) * 0.05).to(dtype)
    down = (_numbers(setting, torch.float32, experts, hidden, width) * 0.05).to(dtype)
    scores = torch.rand(tokens, experts, device=setting.device)
    weights, chosen = torch.topk(scores, 2)
    out = kernels.mixture(x, chosen, weights, gate_up, down)
    exact = torch.zeros(tokens, hidden, dtype=torch.float64, device=setting.device)
    for expert in range(experts):
        share = (weights * (chosen == expert)).sum(-1, keepdim=True).double()
        gate, up = (x.double() @ gate_up[expert].double().T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        exact += share * (inner @ down[expert].double().T)
    return _distance(out, exact)


def _store(setting: Setting, dtype: torch.dtype) -> float:
    kernels: Any = triton_kernels()
    rows, heads, dim = 7, 4, 64
    q = _numbers(setting, dtype, rows, heads * dim)
    k, v = (_numbers(setting, dtype, rows, heads * dim) for _ in range(2))
    planes = [torch.zeros(100, heads, dim, dtype=dtype, device=setting.device) for _ in range(2)]
    slots = torch.randperm(99, device=setting.device)[:rows] + 1
    angles = torch.rand(rows, dim // 2, device=setting.device, dtype=torch.float64) * 6.0
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    turned = kernels.rotate_and_store(q, k, v, cos.float(), sin.float(), slots, *planes)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        wide = x.double().view(rows, heads, dim)
        swapped = wide.roll(dim // 2, -1)
        return wide * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)

    return max(
        _distance(turned.view(rows, heads, dim), rotated(q)),
        _distance(planes[0][slots], rotated(k)),
        _distance(planes[1][slots], v.double().view(rows, heads, dim)),
    )


def _store_scaled(setting: Setting, dtype: torch.dtype) -> float:
    """0 where every byte is the one that PyTorch rounds to, 1 where one is another."""
    kernels: Any = triton_kernels()
    rows, heads, dim = 7, 4, 64
    slots = torch.arange(rows, device=setting.device) + 3
    x = _numbers(setting, dtype, rows, heads * dim) * 300
    same = True
    for name in ("fp8_e4m3", "fp8_e5m2"):
        kind = KV_TORCH_DTYPES[name]
        planes = [torch.zeros(20, heads, dim, device=setting.device).to(kind) for _ in range(2)]
        scales = {"k_scale": 0.3, "v_scale": 70.0}
        kernels.store_kv(x, x, slots, *planes, **scales)
        for plane, scale in zip(planes, scales.values(), strict=True):
            expected = raw(round_to(x, kind, scale)).view(rows, heads, dim)
            same &= torch.equal(raw(plane)[slots], expected)
    return 0.0 if same else 1.0


LAYERS = {
    "norm": _norm,
    "gate": _gate,
    "mixture": _mixture,
    "rotate and store": _store,
    "store scaled fp8": _store_scaled,
}
PARTS = (
    ("compile", compile_kernels),
    ("sampler", check_sampling),
    ("layers", check_layers),
    ("quantised weights", check_codes),
    ("attention", check_attention),
)
