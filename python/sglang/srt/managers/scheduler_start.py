"""What all schedulers of a server have to agree on before they are built.

Schedulers of one machine get their settings from one parent; those of several nodes were started by
several command lines, which may differ. See docs/structures.md, Note [Ranks].
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from sglang.srt.distributed.communicator import Communicator
from sglang.srt.mem_cache.device_budget import DeviceMemoryPlan
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.host_memory import HostMemory

# What a node may have of its own: where its files are, what it logs, which node it is.
_OWN = frozenset(
    {
        *("node_rank", "host", "port", "log_level", "log_level_http", "cpu_threads"),
        *("model_path", "tokenizer_path", "served_model_name", "chat_template"),
        *("api_key", "admin_api_key", "has_nodes_given", "dist_init_addr", "random_seed"),
        *("decode_log_interval", "watchdog_timeout", "enable_metrics"),
        "speculative_draft_model_path",
    }
)


def agree_on_settings(server_args: ServerArgs, everyone: Communicator) -> ServerArgs:
    """The settings with scheduler 0's seed; blocks until all schedulers have called.

    Raises ValueError naming the settings that scheduler 0 has otherwise.
    """
    theirs: dict[str, Any] = json.loads(
        bytes(everyone.broadcast(_encoded(server_args) if everyone.rank == 0 else None))
    )
    own: dict[str, Any] = json.loads(_encoded(server_args))
    seed = theirs.pop("random_seed")
    own.pop("random_seed")
    differing = sorted(
        name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)
    )
    # Everyone hears of it, so that nobody waits for ranks that have left.
    most = -everyone.agree((-len(differing),))[0]
    if differing:
        words = ", ".join(
            f"--{name.replace('_', '-')} ({own.get(name)} here, {theirs.get(name)} there)"
            for name in differing
        )
        raise ValueError(f"this node was started with other settings than node 0: {words}")
    if most:
        raise ValueError("another node was started with other settings than node 0")
    return dataclasses.replace(server_args, random_seed=seed)


def _encoded(server_args: ServerArgs) -> bytes:
    values = {
        name: value
        for name, value in server_args.public_dict().items()
        if name not in _OWN or name == "random_seed"
    }
    return json.dumps(values, sort_keys=True, default=str).encode()


def agreed_memory(
    everyone: Communicator | None, num_sharing: int, read: Callable[[], HostMemory]
) -> HostMemory:
    """What its machine or device has for one scheduler: the same on all, read once all have loaded.

    `everyone` None: there is no other. The `num_sharing` that have one memory get equal parts of
    what is left there, and the least that any of them sees counts. Blocks until all have called.
    """
    if everyone is None:
        return read()
    everyone.agree((0,))  # nobody's weights are still to come
    host = read()
    total, available = everyone.agree((host.total_bytes, host.available_bytes // num_sharing))
    return HostMemory(total, available, host.bound_by)


def agreed_device_plan(
    everyone: Communicator | None, plan: DeviceMemoryPlan | None
) -> DeviceMemoryPlan | None:
    """A device's plan with the least budget of all schedulers; None where there is no device.

    `everyone` None: there is no other. Blocks until all have called.
    """
    if everyone is None or plan is None:
        return plan
    return dataclasses.replace(plan, budget_bytes=everyone.agree((plan.budget_bytes,))[0])
