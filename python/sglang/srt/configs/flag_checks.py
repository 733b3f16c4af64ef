"""Which values of different flags can't stand together; called by `ServerArgs` alone."""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.configs.kv_events_config import KVEventsConfig


def check_combinations(args: Any) -> None:
    """Raise ValueError with one line when two flags of a `ServerArgs` contradict each other."""
    try:
        overrides = json.loads(args.json_model_override_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--json-model-override-args is not JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise ValueError("--json-model-override-args must be a JSON object")
    KVEventsConfig.from_json(args.kv_events_config or "{}")
    if args.skip_tokenizer_init and args.chat_template is not None:
        raise ValueError("--chat-template needs a tokenizer; drop --skip-tokenizer-init")
    if args.kv_backing == "static" and args.kv_segment_reserve > 0:
        raise ValueError("--kv-segment-reserve: --kv-backing static maps every segment at start")
    if args.kv_backing == "cuda_vmm" and args.device == "cpu":
        raise ValueError("--kv-backing cuda_vmm needs a CUDA device, this is --device cpu")
    if args.kv_backing == "mmap" and args.device != "cpu":
        raise ValueError("--kv-backing mmap is memory of the host; --device cuda takes cuda_vmm")
    if args.tp_size > 1 and args.device != "cpu":
        raise ValueError("--tp-size: several ranks compute on --device cpu only, so far")
    if args.kv_canary == "full" and args.kv_backing == "segment_table":
        raise ValueError("--kv-canary full reads a common range; segment_table takes chain")
    if args.disable_radix_cache and args.max_cached_tokens is not None:
        raise ValueError("--max-cached-tokens bounds the radix cache; drop --disable-radix-cache")
    if args.disable_radix_cache and args.schedule_policy == "lpm":
        raise ValueError(
            "--schedule-policy lpm orders by cached prefix; drop --disable-radix-cache"
        )
