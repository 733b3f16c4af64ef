"""Stage 1: every attention backend that loads, against float64, over all shapes."""

from __future__ import annotations

import torch

from gpu_check.attention_batch import OnePool, largest_error, make_batch, make_tables, spec_of
from gpu_check.records import Journal
from gpu_check.setting import Setting
from gpu_check.shapes import AttentionShape, kernel_shapes
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import get_attention_backend

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


PARTS = (("attention", check_attention),)
