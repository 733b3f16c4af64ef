"""Which values of different flags can't stand together; called by `ServerArgs` alone."""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.configs.kv_events_config import KVEventsConfig
from sglang.srt.configs.lora_args import check_lora
from sglang.srt.configs.speculative_args import check_speculation


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port". Raises ValueError with one line."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--dist-init-addr must look like 10.0.0.1:5000, got {text!r}")
    return host, int(port)


def check_nodes(args: Any) -> None:
    """Raise ValueError with one line when the flags of several nodes or replicas contradict."""
    if args.node_rank >= args.nnodes:
        raise ValueError(f"--node-rank {args.node_rank} does not belong to --nnodes {args.nnodes}")
    if args.nnodes > 1:
        if args.dp_size > 1:
            raise ValueError("--dp-size: replicas share one machine; drop --nnodes")
        if args.num_ranks % args.nnodes:
            raise ValueError(
                f"--tp-size {args.tp_size} times --kv-parallel-size {args.kv_parallel_size} cannot "
                f"be divided among --nnodes {args.nnodes}"
                if args.kv_parallel_size > 1
                else f"--tp-size {args.tp_size} cannot be divided among --nnodes {args.nnodes}"
            )
        if args.dist_init_addr is None:
            raise ValueError("--nnodes needs --dist-init-addr, the address of node 0")
    if args.dist_init_addr is not None:
        split_address(args.dist_init_addr)


def check_disk_tier(args: Any) -> None:
    """Raise ValueError with one line when the flags of the disk tier contradict others."""
    if args.kv_disk_path is None:
        if args.kv_disk_size is not None:
            raise ValueError("--kv-disk-size needs --kv-disk-path, the directory to use")
        return
    if args.device != "cpu" or args.kv_backing not in ("auto", "mmap"):
        raise ValueError("--kv-disk-path: only --kv-backing mmap, on --device cpu, has a disk tier")
    if args.kv_parallel_size > 1:
        raise ValueError("--kv-disk-path and --kv-parallel-size don't go together, so far")


def check_host_tier(args: Any) -> None:
    """Raise ValueError with one line when the flags of the host tier contradict others."""
    if not args.enable_hierarchical_cache:
        return
    if args.device == "cpu":
        raise ValueError(
            "--enable-hierarchical-cache is for a GPU: on --device cpu the host's memory comes "
            "first, and below it a disk (--kv-disk-path)"
        )
    if args.kv_backing not in ("auto", "cuda_vmm"):
        raise ValueError("--enable-hierarchical-cache: only --kv-backing cuda_vmm has a host tier")
    if args.kv_parallel_size > 1:
        raise ValueError(
            "--enable-hierarchical-cache and --kv-parallel-size don't go together, so far"
        )


def check_priorities(args: Any) -> None:
    """Raise ValueError with one line when a flag of priorities could have no effect."""
    if args.enable_priority_scheduling:
        return
    if args.schedule_low_priority_values_first:
        raise ValueError("--schedule-low-priority-values-first needs --enable-priority-scheduling")
    if args.default_priority_value is not None:
        raise ValueError("--default-priority-value needs --enable-priority-scheduling")


def check_object(flag: str, text: str) -> None:
    """Raise ValueError with one line unless a flag's value is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object")


def check_combinations(args: Any) -> None:
    """Raise ValueError with one line when two flags of a `ServerArgs` contradict each other."""
    check_object("--json-model-override-args", args.json_model_override_args)
    check_object("--default-chat-template-kwargs", args.default_chat_template_kwargs)
    check_object("--preferred-sampling-params", args.preferred_sampling_params or "{}")
    KVEventsConfig.from_json(args.kv_events_config or "{}")
    check_nodes(args)
    check_disk_tier(args)
    check_host_tier(args)
    check_priorities(args)
    check_speculation(args)
    check_lora(args)
    if args.skip_tokenizer_init and args.chat_template is not None:
        raise ValueError("--chat-template needs a tokenizer; drop --skip-tokenizer-init")
    if (
        args.constrained_json_disable_any_whitespace
        and args.constrained_json_whitespace_pattern is not None
    ):
        raise ValueError(
            "--constrained-json-whitespace-pattern says which whitespace there may be; drop "
            "--constrained-json-disable-any-whitespace"
        )
    if args.skip_tokenizer_init and args.completion_template is not None:
        raise ValueError("--completion-template needs a tokenizer; drop --skip-tokenizer-init")
    if args.skip_tokenizer_init and (args.tool_call_parser or args.reasoning_parser):
        raise ValueError("parsers read text, which needs a tokenizer; drop --skip-tokenizer-init")
    if args.kv_backing == "static" and args.kv_segment_reserve > 0:
        raise ValueError("--kv-segment-reserve: --kv-backing static maps every segment at start")
    if args.kv_backing == "cuda_vmm" and args.device == "cpu":
        raise ValueError("--kv-backing cuda_vmm needs a CUDA device, this is --device cpu")
    if args.kv_backing == "mmap" and args.device != "cpu":
        raise ValueError("--kv-backing mmap is memory of the host; --device cuda takes cuda_vmm")
    if args.kv_parallel_size > 1 and args.device != "cpu":
        raise ValueError("--kv-parallel-size spreads KV on --device cpu only, so far")
    if args.kv_canary == "full" and args.kv_backing == "segment_table":
        raise ValueError("--kv-canary full reads a common range; segment_table takes chain")
    on_cpu = args.device == "cpu" and args.attention_backend not in ("triton", "flashinfer")
    if args.kv_cache_dtype == "int8" and not on_cpu:
        raise ValueError("--kv-cache-dtype int8 is read by the backends of a CPU; take an fp8 one")
    if args.quantization_param_path is not None and not args.kv_cache_dtype.startswith("fp8"):
        raise ValueError("--quantization-param-path scales a KV cache of fp8; set --kv-cache-dtype")
    if args.disable_radix_cache and args.max_cached_tokens is not None:
        raise ValueError("--max-cached-tokens bounds the radix cache; drop --disable-radix-cache")
    if args.disable_radix_cache and args.schedule_policy == "lpm":
        raise ValueError(
            "--schedule-policy lpm orders by cached prefix; drop --disable-radix-cache"
        )
