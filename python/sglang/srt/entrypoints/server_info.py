"""What a server tells of itself: /model_info, /server_info, /get_load, and the Engine alike."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from sglang.srt.entrypoints.server_context import ServerContext


def server_version() -> str:
    """This package's version, "unknown" when it runs uninstalled."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def model_info(context: ServerContext) -> dict[str, Any]:
    """The object of /model_info."""
    args = context.server_args
    config = context.serving.service.model_config
    parsers = context.serving.parsers
    return {
        "model_path": args.model_path,
        "served_model_name": args.served_model_name,
        "tokenizer_path": args.tokenizer_path,
        "is_generation": context.serving.kind.pooling is None,
        "preferred_sampling_params": args.preferred_sampling_params,
        "weight_version": args.weight_version,
        "load_format": args.load_format,
        "reasoning_parser": parsers.reasoning,
        "tool_call_parser": parsers.tool_call,
        "disaggregation_mode": "null",
        "has_image_understanding": config.vision is not None,
        "has_audio_understanding": False,
        "model_type": config.model_type,
        "architectures": [config.architecture],
    }


async def server_info(context: ServerContext) -> dict[str, Any]:
    """The object of /server_info; asks the scheduler. RequestError 503 when it is silent."""
    service = context.serving.service
    reply = await service.control("server_info")
    # The budget, and what follows from it, may move. Replicas have a pool each, of one size at
    # start: shown here is the first one's.
    states = reply.data.get("replicas", [reply.data])
    memory = states[0].get("memory", {})
    ready = service.pulse.ready
    facts: dict[str, Any] = {}
    if ready is not None:
        facts = {
            **ready.details,
            "max_total_num_tokens": memory.get("capacity_tokens", ready.capacity_tokens),
            "max_req_input_len": service.context_length - 1,
            "max_running_requests": ready.max_running_requests,
            "page_size": ready.page_size,
        }
    return {
        **context.server_args.public_dict(),
        **facts,
        "startup_time": context.ready_after_s,
        "version": server_version(),
        "frontend": "python",
        "memory": memory,
        "internal_states": states,
    }


def load_of(dp_rank: int, state: Mapping[str, Any]) -> dict[str, int]:
    """One replica's entry of /get_load from its internal state.

    `num_tokens` are those that running requests hold and those of the prompts that wait (of the
    oldest few hundred requests).
    """
    memory = state.get("memory", {})
    used = memory.get("pages", {}).get("used", 0) * memory.get("page_size", 1)
    waiting = [r for r in state.get("requests", ()) if r["state"] in ("waiting", "retracted")]
    num_waiting = state.get("num_queue_reqs", 0)
    return {
        "dp_rank": dp_rank,
        "num_reqs": state.get("num_running_reqs", 0) + num_waiting,
        "num_waiting_reqs": num_waiting,
        "num_tokens": used + sum(request["prompt_tokens"] for request in waiting),
    }
