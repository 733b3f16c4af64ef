"""From arguments to numbers: dtypes, and what ranks agree on."""

from __future__ import annotations

import pytest

from sglang.srt.environ import Environ
from sglang.srt.managers.scheduler_dtypes import resolve_dtype
from sglang.srt.managers.scheduler_setup import agreed_memory, build_scheduler_parts
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.host_memory import HostMemory
from sglang.srt.utils.progress import Progress
from srt.distributed.thread_ranks import ThreadRanks

GIB = 1 << 30
HOST = HostMemory(total_bytes=24 * GIB, available_bytes=20 * GIB, bound_by="MemAvailable")


def args(**kwargs: object) -> ServerArgs:
    return ServerArgs.from_kwargs(model_path="/models/any", **kwargs)


@pytest.mark.parametrize(
    ("requested", "checkpoint", "result"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float16", "bfloat16"),
        ("auto", "float32", "bfloat16"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_dtype(requested: str, checkpoint: str, result: str) -> None:
    assert resolve_dtype(requested, checkpoint) == result


def test_ranks_share_what_the_least_of_them_sees() -> None:
    assert agreed_memory(None, 1, lambda: HOST) is HOST
    ranks = ThreadRanks(2)
    seen = [
        HostMemory(30 * GIB, 20 * GIB, "MemAvailable"),
        HostMemory(24 * GIB, 14 * GIB, "a cgroup"),
    ]
    agreed = ranks.run(lambda rank: agreed_memory(ranks.links(rank).control, 2, lambda: seen[rank]))
    assert [(host.total_bytes, host.available_bytes) for host in agreed] == [
        (24 * GIB, 7 * GIB)
    ] * 2
    ranks.close()


def test_several_ranks_need_links() -> None:
    with pytest.raises(ValueError, match="--tp-size 2: only a server or an Engine"):
        build_scheduler_parts(args(tp_size=2), Environ(), Progress())
    with pytest.raises(ValueError, match="--tp-size 2, --kv-parallel-size 3: only a server"):
        build_scheduler_parts(args(tp_size=2, kv_parallel_size=3), Environ(), Progress())
