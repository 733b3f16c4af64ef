"""Stage 4: what attention reaches of what the device can do, beside others in the same run.

Ceilings come first: a copy's bandwidth and a matrix product's rate, measured here. Decode is told
in K and V bytes per second, prompts in multiply-adds of visible pairs; both also as a share.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu_check.attention_batch import OnePool, make_batch, make_tables, spec_of
from gpu_check.quantized import time_codes
from gpu_check.records import Journal
from gpu_check.setting import Setting, time_ms
from gpu_check.shapes import LLAMA_8B, SCOUT_RANK, TINY, AttentionShape, Heads, decode_shapes
from gpu_check.shapes import extend_shapes as all_extend_shapes
from gpu_check.stage_kernels import BACKENDS, backend_class
from gpu_check.stage_memory import growth_stall

_MEMORY_SHARE = 0.85  # of what is free, for the pool of a shape
_FLEX_TOKENS = 100_000  # of the longest prompt that FlexAttention is compiled for
_SDPA_BYTES = 8 << 30  # contiguous copies of K and V for torch's own attention


def measure_ceilings(setting: Setting, journal: Journal) -> tuple[float, float]:
    """Bytes per second of a copy (read and written) and multiply-add FLOP per second in bf16."""
    copied, read = _memory_rates(setting)
    side = 128 if setting.is_dry else 8192
    a, b = (torch.randn(side, side, device=setting.device).to(torch.bfloat16) for _ in range(2))
    product_ms = time_ms(setting, lambda: a @ b)
    rate = 2 * side**3 / product_ms * 1e3
    journal.note(
        "ceilings",
        copy_gb_per_s=copied / 1e9,
        read_gb_per_s=read / 1e9,
        bf16_tflop_per_s=rate / 1e12,
    )
    return copied, rate


def _memory_rates(setting: Setting) -> tuple[float, float]:
    """Bytes per second of a copy, read and written, and of a sum over a large tensor."""
    numbers = 1 << (18 if setting.is_dry else 30)
    source = torch.ones(numbers, dtype=torch.bfloat16, device=setting.device)
    target = torch.empty_like(source)
    copy_ms = time_ms(setting, lambda: target.copy_(source))
    read_ms = time_ms(setting, lambda: source.sum())
    return 2 * source.nbytes / copy_ms * 1e3, source.nbytes / read_ms * 1e3


def check_codes(setting: Setting, journal: Journal) -> None:
    """Products with quantised weights beside a copy's bandwidth."""
    copied, _ = _memory_rates(setting)
    time_codes(setting, journal, copied)


def check_attention(setting: Setting, journal: Journal) -> None:
    """Ceilings, then decode and prompts of every backend that loads, then torch's own."""
    copied, rate = measure_ceilings(setting, journal)
    for heads, shape in _decodes(setting):
        _time_shape(setting, journal, shape, _kv_bytes(shape), copied, "gb_per_s", 1e9)
        _time_torch_decode(setting, journal, heads, shape, copied)
    for shape in _extends(setting):
        work = _pair_flops(shape)
        _time_shape(setting, journal, shape, work, rate, "tflop_per_s", 1e12)
        _time_torch_extend(setting, journal, shape, rate)


def _decodes(setting: Setting) -> Iterator[tuple[Heads, AttentionShape]]:
    for heads in (TINY,) if setting.is_dry else (SCOUT_RANK, LLAMA_8B):
        for one in decode_shapes(setting.is_dry):
            lengths = ((one.context - 1, 1),) * one.batch
            name = f"decode {one.batch} x {one.context:,}"
            yield heads, AttentionShape(name, heads, lengths)


def _extends(setting: Setting) -> Iterator[AttentionShape]:
    for heads in (TINY,) if setting.is_dry else (SCOUT_RANK, LLAMA_8B):
        for prefix, extend in all_extend_shapes(setting.is_dry):
            yield AttentionShape(f"prompt {extend} at {prefix:,}", heads, ((prefix, extend),))


def _kv_bytes(shape: AttentionShape) -> float:
    tokens = sum(prefix + extend for prefix, extend in shape.lengths)
    return 2.0 * tokens * shape.heads.kv_heads * shape.heads.head_dim * 2


def _pair_flops(shape: AttentionShape) -> float:
    pairs = sum(e * p + e * (e + 1) // 2 for p, e in shape.lengths)
    return 4.0 * pairs * shape.heads.num_heads * shape.heads.head_dim


def _time_shape(
    setting: Setting,
    journal: Journal,
    shape: AttentionShape,
    work: float,
    ceiling: float,
    unit: str,
    scale: float,
) -> None:
    """All backends on one shape, over one pool."""
    what = f"{shape.name} {shape.heads.name}"
    free = setting.runtime.read_memory().available_bytes
    if _kv_bytes(shape) > _MEMORY_SHARE * free:
        journal.skip(what, f"{_kv_bytes(shape) / 1e9:.1f} GB of K and V do not fit")
        return
    _, num_slots = make_tables(shape.lengths, shape.page_size, scattered=shape.scattered)
    with setting.runtime.computing(), torch.inference_mode():
        pool = OnePool(num_slots, shape.heads, shape.dtype, setting.device)
        for name in BACKENDS:
            if name == "torch_native" and not setting.is_dry:
                continue  # the reference is not meant to be fast
            if setting.seconds_left <= 0:
                journal.skip(f"{name} {what}", "no time is left")
                return
            try:
                backend = backend_class(name, setting)(
                    spec_of(shape.heads, shape.dtype, shape.page_size)
                )
                batch = make_batch(shape, backend, pool, setting.device)
                ms = time_ms(setting, lambda: batch.attend(backend))  # noqa: B023
            except (ValueError, NotImplementedError) as reason:
                journal.skip(f"{name} {what}", str(reason))
                continue
            except Exception as reason:  # noqa: BLE001  one backend that breaks is one finding
                journal.fail(f"{name} {what}", f"{type(reason).__name__}: {reason}")
                continue
            speed = work / ms * 1e3
            journal.note(
                f"{name} {what}", ms=ms, **{unit: speed / scale}, of_ceiling=speed / ceiling
            )


def _time_torch_decode(
    setting: Setting, journal: Journal, heads: Heads, shape: AttentionShape, copied: float
) -> None:
    """torch's fused attention over contiguous K and V of one length; no paging."""
    batch, context = len(shape.lengths), shape.lengths[0][0] + 1
    work = _kv_bytes(shape)
    what = f"torch SDPA {shape.name} {heads.name}"
    if work > _SDPA_BYTES:
        journal.skip(what, "contiguous K and V are kept below 8 GiB")
        return
    q = torch.randn(batch, heads.num_heads, 1, heads.head_dim, device=setting.device)
    k = torch.randn(batch, heads.kv_heads, context, heads.head_dim, device=setting.device)
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    v = torch.randn_like(k)
    _time_call(
        setting,
        journal,
        what,
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda ms: {"gb_per_s": work / ms / 1e6, "of_ceiling": work / ms * 1e3 / copied},
    )


def _time_torch_extend(
    setting: Setting, journal: Journal, shape: AttentionShape, rate: float
) -> None:
    """torch's SDPA and FlexAttention, a chunk of queries over contiguous K and V."""
    heads, (prefix, extend) = shape.heads, shape.lengths[0]
    total = prefix + extend
    q = torch.randn(1, heads.num_heads, extend, heads.head_dim, device=setting.device)
    k = torch.randn(1, heads.kv_heads, total, heads.head_dim, device=setting.device)
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    v = torch.randn_like(k)
    work = _pair_flops(shape)

    def figures(ms: float) -> dict[str, float]:
        return {"tflop_per_s": work / ms / 1e9, "of_ceiling": work / ms * 1e3 / rate}

    def sdpa() -> torch.Tensor:
        from torch.nn.attention.bias import causal_lower_right

        bias: Any = causal_lower_right(extend, total)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

    name = f"{shape.name} {heads.name}"
    _time_call(setting, journal, f"torch SDPA {name}", sdpa, figures)
    if setting.is_dry or total > _FLEX_TOKENS:
        journal.skip(f"torch FlexAttention {name}", "compiled once, for a GPU and short prompts")
        return

    def make_flex() -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(batch: Any, head: Any, at: Any, key: Any) -> Any:
            del batch, head
            return key <= at + prefix

        mask = create_block_mask(seen, None, None, extend, total, device=str(setting.device))
        compiled: Any = torch.compile(flex_attention)
        return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)

    try:
        flex = make_flex()
    except Exception as reason:  # noqa: BLE001  another project's compiler
        journal.skip(f"torch FlexAttention {name}", f"{type(reason).__name__}: {reason}")
        return
    _time_call(setting, journal, f"torch FlexAttention {name}", flex, figures)


def _time_call(
    setting: Setting,
    journal: Journal,
    what: str,
    call: Callable[[], object],
    figures: Callable[[float], dict[str, float]],
) -> None:
    """A call of somebody else's: what breaks there is no failure of ours."""
    try:
        with torch.inference_mode():
            ms = time_ms(setting, call)
    except Exception as reason:  # noqa: BLE001
        journal.skip(what, f"{type(reason).__name__}: {reason}")
        return
    journal.note(what, ms=ms, **figures(ms))


def check_graphs(setting: Setting, journal: Journal) -> None:
    """Decode steps of a whole model with graphs and without, by bench_one_batch in processes."""
    folder = setting.folder / "bench_llama"
    write_config(folder, small=setting.is_dry)
    for name, flags in (("with graphs", []), ("without graphs", ["--disable-cuda-graph"])):
        if setting.seconds_left < 10:
            journal.skip(f"decode {name}", "no time is left")
            continue
        try:
            found = _bench(setting, folder, flags)
        except subprocess.TimeoutExpired:
            journal.skip(f"decode {name}", "no time is left")
            continue
        for figures in found:
            batch = figures.pop("batch_size")
            journal.note(f"decode of batch {batch:g} {name}", **figures)


def write_config(folder: Path, *, small: bool) -> None:
    """A Llama without weights: the server draws them."""
    folder.mkdir(exist_ok=True)
    width, layers = (64, 2) if small else (2048, 16)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512 if small else 32_000,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64 if not small else 2,
        "num_key_value_heads": 8 if not small else 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _bench(setting: Setting, folder: Path, flags: list[str]) -> list[dict[str, float]]:
    results = setting.folder / "bench.jsonl"
    with suppress(FileNotFoundError):
        results.unlink()
    sizes = ["1", "2"] if setting.is_dry else ["1", "32", "128"]
    command = [
        *(sys.executable, "-m", "sglang.bench_one_batch"),
        *("--model-path", str(folder), "--load-format", "dummy"),
        *("--batch-size", *sizes, "--input-len", "16" if setting.is_dry else "512"),
        *("--output-len", "4" if setting.is_dry else "64"),
        *("--repeats", "1", "--result-filename", str(results)),
        *("--cuda-graph-max-bs", sizes[-1]),  # graphs of larger batches would only take time
        *("--kv-memory-budget", "64MiB" if setting.is_dry else "20GiB"),
        *setting.flags,
        *flags,
    ]
    left = max(5.0, setting.seconds_left)
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-400:])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in lines]


PARTS = (
    ("graphs", check_graphs),
    ("quantised weights", check_codes),
    ("attention", check_attention),
    ("growth", growth_stall),
)
