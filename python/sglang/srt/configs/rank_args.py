"""How many processes compute a model, how they share it, and where they meet.

A part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.configs.flag_spec import flag

RANKS = "Ranks, replicas and nodes"


@dataclass(frozen=True)
class RankArgs:
    """Settings of ranks, of replicas and of the nodes that share them."""

    tp_size: int = flag(
        1,
        "Tensor-parallel ranks, a process each.",
        group=RANKS,
        aliases=("--tensor-parallel-size", "--tp"),
        parse=int,
        metavar="N",
        minimum=1,
    )
    disable_custom_all_reduce: bool = flag(
        False,
        "Let ranks of one machine exchange small tensors over sockets too, not in shared memory.",
        group=RANKS,
    )
    kv_parallel_size: int = flag(
        1,
        "Ranks over which the KV of each request is spread, for each tensor-parallel rank. "
        "Not in SGLang.",
        group=RANKS,
        parse=int,
        metavar="N",
        minimum=1,
    )
    dp_size: int = flag(
        1,
        "Replicas of the model behind one port, each with ranks and memory of its own.",
        group=RANKS,
        aliases=("--data-parallel-size", "--dp"),
        parse=int,
        metavar="N",
        minimum=1,
    )
    load_balance_method: str = flag(
        "round_robin",
        "Which replica gets a request: the next, the one with the fewest requests, or the one "
        "that has seen its prefix (not in SGLang) unless it is far busier than others.",
        group=RANKS,
        choices=("auto", "round_robin", "shortest_queue", "cache_aware"),
    )
    nnodes: int = flag(
        None,
        "Nodes that share the ranks; the same command is started on each.",
        group=RANKS,
        parse=int,
        default_text="1, or as many processes as torchrun started",
        metavar="N",
        minimum=1,
    )
    node_rank: int = flag(
        0,
        "Which node this is; node 0 has the HTTP server.",
        group=RANKS,
        parse=int,
        metavar="N",
        minimum=0,
    )
    dist_init_addr: str | None = flag(
        None,
        "Address and port of node 0 at which ranks meet, such as 10.0.0.1:5000.",
        group=RANKS,
        aliases=("--nccl-init-addr",),
        default_text="needed with several nodes only",
        metavar="HOST:PORT",
    )
    dist_timeout: int = flag(
        600,
        "Seconds that a rank waits for the others, at start and in a step, before the server ends.",
        group=RANKS,
        parse=int,
        metavar="SECONDS",
        minimum=1,
    )

    @property
    def num_ranks(self) -> int:
        """Ranks that compute one model: a process each."""
        return self.tp_size * self.kv_parallel_size

    @property
    def ranks_per_node(self) -> int:
        """Schedulers that a node starts."""
        return self.dp_size * self.num_ranks // self.nnodes
