"""What schedulers agree on before they are built."""

from __future__ import annotations

import pytest

from sglang.srt.managers.scheduler_start import agree_on_settings, agreed_device_plan
from sglang.srt.mem_cache.device_budget import DeviceMemoryPlan
from sglang.srt.server_args import ServerArgs
from srt.distributed.thread_ranks import ThreadRanks


def args(**flags: object) -> ServerArgs:
    fields = {"model_path": "m", "tp_size": 2, "nnodes": 2, "dist_init_addr": "a:1", **flags}
    return ServerArgs.from_kwargs(**fields)


def test_the_first_ones_seed_counts_and_places_may_differ() -> None:
    ranks = ThreadRanks(2)
    given = [args(random_seed=5), args(random_seed=6, node_rank=1, model_path="/elsewhere")]
    settled = ranks.run(lambda rank: agree_on_settings(given[rank], ranks.links(rank).control))
    assert [one.random_seed for one in settled] == [5, 5]
    assert [one.model_path for one in settled] == ["m", "/elsewhere"]
    ranks.close()


def test_nodes_that_would_compute_otherwise_are_refused_on_all() -> None:
    ranks = ThreadRanks(2)
    given = [args(dtype="float32"), args(dtype="bfloat16")]

    def told(rank: int) -> str:
        with pytest.raises(ValueError) as refusal:
            agree_on_settings(given[rank], ranks.links(rank).control)
        return str(refusal.value)

    texts = ranks.run(told)
    assert texts[0] == "another node was started with other settings than node 0"
    assert texts[1].endswith("than node 0: --dtype (bfloat16 here, float32 there)")
    ranks.close()


def test_the_smallest_budget_of_the_devices_counts() -> None:
    ranks = ThreadRanks(2)
    plans = [DeviceMemoryPlan(100, 1, 20, 9, 0.9, (), budget) for budget in (70, 60)]
    agreed = ranks.run(lambda rank: agreed_device_plan(ranks.links(rank).control, plans[rank]))
    assert [plan and plan.budget_bytes for plan in agreed] == [60, 60]
    assert agreed_device_plan(None, plans[0]) is plans[0]
    assert agreed_device_plan(ranks.links(0).control, None) is None, "the host has none"
    ranks.close()
