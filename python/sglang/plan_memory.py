"""`python -m sglang.plan_memory`: does a model with a context fit on given devices, and why.

Reads a config.json (or knows the model by name), never weights. Prints a table, with `--json` one
JSON object. Exits 2 with one line on stderr when the question makes no sense.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sglang.planner.known_models import KNOWN_MODELS
from sglang.planner.machines import DEVICES, Device
from sglang.planner.memory_plan import (
    AdapterRoom,
    MemoryPlan,
    Question,
    Remedies,
    find_remedies,
    make_plan,
)
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.sizes import format_bytes, parse_bytes, parse_count

_KV_DTYPES = {
    "auto": None,
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "int8": "int8",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question; the exit status is 0 whether it fits or not."""
    args = _parse_arguments(argv)
    try:
        question = _question(args)
        plan = make_plan(question)
        remedies = find_remedies(question, plan)
    except ValueError as error:
        print(f"plan_memory: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(question, plan, remedies), indent=2))
    else:
        print(render(args.model_path, question, plan, remedies))
    return 0


def load_config(model: str, multimodal: bool = False) -> ModelConfig:
    """The config of a known model's name, or of a path as --model-path takes it.

    `multimodal`: with its vision tower. Raises ValueError that names the known models when it is
    neither.
    """
    raw = KNOWN_MODELS.get(model)
    if raw is None:
        try:
            return ModelConfig.from_path(model, multimodal=multimodal)
        except ValueError as error:
            names = ", ".join(KNOWN_MODELS)
            raise ValueError(f"{error}; models known by name: {names}") from error
    # The reader reads files; a known model's fields make one for the moment.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return ModelConfig.from_path(folder, multimodal=multimodal)


def as_json(question: Question, plan: MemoryPlan, remedies: Remedies) -> dict[str, Any]:
    """The plan as JSON: numbers in bytes, tokens, operations and seconds."""
    answer = asdict(plan)
    answer["device"]["mem_fraction"] = question.mem_fraction
    for group, value in zip(plan.groups, answer["groups"], strict=True):
        value["kept_bytes"] = group.kept_bytes
    answer["weights"]["all_bytes"] = plan.weights.all_bytes
    answer["weights"]["active_bytes"] = plan.weights.active_bytes
    answer["fits"] = plan.fits
    answer["remedies"] = asdict(remedies)
    return answer


def render(name: str, question: Question, plan: MemoryPlan, remedies: Remedies) -> str:
    """The plan as a table of lines, remedies last when it does not fit."""
    device = plan.device
    rows = [
        ("devices", f"{plan.tp_size} x {device.name}, {_gb(device.memory_bytes)} each"),
        ("context", f"{plan.context_length:,} tokens, one request; KV in {plan.kv_dtype}"),
        ("", ""),
        ("per device", f"{_gb(int(device.memory_bytes * question.mem_fraction))} usable"),
        *_weight_rows(plan),
        ("  left for KV", _gb(plan.budget_bytes)),
        ("  KV held", f"{_gb(plan.kv_bytes)} by a request of the whole context"),
        ("  KV at its peak", f"{_gb(plan.needed_bytes)} in whole segments, reserve included"),
        ("", ""),
        ("KV per token", f"{plan.bytes_per_token_all_layers:,} B if all layers kept all tokens"),
    ]
    ranks = plan.bytes_per_token_all_layers // sum(g.bytes_per_token for g in plan.groups)
    for group in plan.groups:
        span = "every token" if group.span is None else f"{group.span:,} tokens"
        text = f"{group.bytes_per_token * ranks:,} B in {group.num_layers} layers that keep {span}"
        rows.append((f"  {group.kind}", text))
    if question.config.latent is not None and plan.tp_size > 1:
        rows.append(("", f"latents of all heads: whole on each of {plan.tp_size} devices"))
    rows += [
        ("", ""),
        ("capacity", f"{plan.capacity_tokens:,} tokens in one request"),
        ("fits", "yes" if plan.fits else "no"),
        ("prefill, at least", _seconds(plan.prefill_s, "compute")),
        ("decode, at most", _rate(plan.decode_s)),
        (
            "not allocated",
            f"{format_bytes(plan.dense_table_bytes)}: a dense table of 2,048 such requests",
        ),
    ]
    if not plan.fits:
        rows += [("", ""), *_remedy_rows(plan, remedies)]
    lines = [f"{name}: {question.config.architecture}"]
    lines += [f"{left:<19} {right}".rstrip() for left, right in rows]
    return "\n".join(lines)


def _weight_rows(plan: MemoryPlan) -> list[tuple[str, str]]:
    weights = plan.weights
    numbers = weights.all_bytes - weights.adapter_bytes
    rows = [("  weights", f"{_gb(numbers)} ({weights.num_params / 1e9:.1f} B parameters)")]
    if weights.num_vision:
        share = weights.num_vision * weights.bytes_per_param
        rows.append(("", f"{_gb(share)} of it for the vision tower, whole on each device"))
    if weights.adapter_bytes:
        rows.append(("  adapters", f"{_gb(weights.adapter_bytes)} in their places"))
    return rows


def _remedy_rows(plan: MemoryPlan, remedies: Remedies) -> list[tuple[str, str]]:
    rows = [("what would fit", f"a context of {remedies.capacity_tokens:,} tokens")]
    if remedies.fp8_capacity_tokens is not None:
        enough = remedies.fp8_capacity_tokens >= plan.context_length
        text = f"{remedies.fp8_capacity_tokens:,} tokens with --kv-cache-dtype fp8_e4m3"
        rows.append(("", text if enough else f"{text}, still too few"))
    if remedies.tp_size is not None:
        rows.append(("", f"--tp-size {remedies.tp_size}"))
    rows.append(("", f"devices with {_gb(remedies.device_memory_bytes)} each"))
    return rows


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang.plan_memory", description=__doc__)
    parser.add_argument(
        "--model-path",
        required=True,
        help=f"a checkpoint's directory or .gguf file, or one of: {', '.join(KNOWN_MODELS)}",
    )
    parser.add_argument("--context-length", type=_checked(parse_count), help="default: trained")
    parser.add_argument("--tp-size", "--tp", type=int, default=1, help="devices of one model")
    parser.add_argument("--gpu", choices=[*DEVICES, "cpu"], default="h200")
    parser.add_argument("--gpu-memory", type=_checked(parse_bytes), help="instead of the device's")
    parser.add_argument("--kv-cache-dtype", choices=list(_KV_DTYPES), default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mem-fraction-static", type=float, default=0.9)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--chunked-prefill-size", type=_checked(parse_count), default=8192)
    parser.add_argument(
        "--enable-multimodal", action="store_true", help="count the vision tower, if there is one"
    )
    parser.add_argument("--max-lora-rank", type=int, help="count places of LoRA adapters")
    parser.add_argument("--max-loras-per-batch", type=int, default=8, help="places of adapters")
    parser.add_argument("--lora-target-modules", nargs="+", default=["all"], metavar="NAME|all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def _checked(parse: Callable[[str], int]) -> Callable[[str], int]:
    """A parser of sizes whose reason argparse shows."""

    def read(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _question(args: argparse.Namespace) -> Question:
    config = load_config(args.model_path, args.enable_multimodal)
    if not 0 < args.mem_fraction_static <= 1:
        raise ValueError(f"--mem-fraction-static {args.mem_fraction_static} is not in (0, 1]")
    rank = args.max_lora_rank
    for flag in (
        *("tp_size", "page_size", "chunked_prefill_size", "max_loras_per_batch"),
        *(() if rank is None else ("max_lora_rank",)),
    ):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1")
    context = config.max_position_embeddings if args.context_length is None else args.context_length
    if context < 1:
        raise ValueError("--context-length must be at least 1")
    dtype = args.dtype or config.torch_dtype
    return Question(
        config=config,
        device=_device(args.gpu, args.gpu_memory),
        tp_size=args.tp_size,
        context_length=context,
        kv_dtype=_KV_DTYPES[args.kv_cache_dtype] or _own_kv_dtype(config) or dtype,
        dtype=dtype,
        mem_fraction=args.mem_fraction_static,
        page_size=args.page_size,
        prefill_chunk=args.chunked_prefill_size,
        adapters=_adapters(args),
    )


def _adapters(args: argparse.Namespace) -> AdapterRoom | None:
    """Room for adapters of the largest rank that is asked for, None where none is."""
    if args.max_lora_rank is None:
        return None
    targets = tuple(args.lora_target_modules)
    return AdapterRoom(args.max_loras_per_batch, args.max_lora_rank, targets)


def _own_kv_dtype(config: ModelConfig) -> str | None:
    """The type of the KV cache that the checkpoint names, None where it names none of ours."""
    return None if config.kv_cache is None else config.kv_cache.dtype


def _device(name: str, memory_bytes: int | None) -> Device:
    if name == "cpu":
        device = Device("cpu", read_host_memory().total_bytes, None, None, "this machine")
    else:
        device = DEVICES[name]
    return device if memory_bytes is None else replace(device, memory_bytes=memory_bytes)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _seconds(seconds: float | None, why: str) -> str:
    return "not known for this device" if seconds is None else f"{_figure(seconds)} s ({why})"


def _figure(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(seconds: float | None) -> str:
    if seconds is None:
        return "not known for this device"
    return f"{_figure(1 / seconds)} tokens/s (weights and KV read once a token)"


if __name__ == "__main__":
    sys.exit(main())
