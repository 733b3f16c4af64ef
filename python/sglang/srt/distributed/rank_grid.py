"""`RankGrid`: which part of the model and of the KV memory a rank has, and who shares each.

With `--tp-size T --kv-parallel-size N` there are T x N ranks: number r computes tensor-parallel
part r mod T and holds KV part r div T. Ranks of one KV part sum as tensor-parallel ranks do; ranks
of one tensor-parallel part have the same weights and queries, and merge what each finds in its
keys. See docs/structures.md, Note [Ranks].

    T = 2, N = 2      tensor part 0   tensor part 1
    KV part 0         rank 0          rank 1            sums go along rows,
    KV part 1         rank 2          rank 3            attention is merged along columns
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.distributed.communicator import RankLinks, TensorCommunicator
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.mem_cache.kv_layout import ONE_KV_RANK, KVRanks


@dataclass(frozen=True)
class RankGrid:
    """One rank's place. `kv_group` joins the parts of attention, None with one KV part."""

    parallel: ParallelState
    kv_ranks: KVRanks
    kv_group: TensorCommunicator | None

    @classmethod
    def of(cls, links: RankLinks | None, kv_parallel_size: int) -> RankGrid:
        """The place of a rank by its `links`; None: it is alone.

        Raises ValueError when the ranks are no multiple of `kv_parallel_size`.
        """
        if links is None:
            return cls(ParallelState(), ONE_KV_RANK, None)
        tp_size, rest = divmod(links.size, kv_parallel_size)
        if rest:
            raise ValueError(f"{links.size} ranks are no multiple of {kv_parallel_size}")
        if kv_parallel_size == 1:
            parallel = ParallelState(links.rank, links.size, links.compute)
            return cls(parallel, ONE_KV_RANK, None)
        kv_rank, tp_rank = divmod(links.rank, tp_size)
        first = kv_rank * tp_size
        row = links.compute.among(range(first, first + tp_size)) if tp_size > 1 else None
        column = links.compute.among(range(tp_rank, links.size, tp_size))
        parallel = ParallelState(tp_rank, tp_size, row)
        return cls(parallel, KVRanks(kv_rank, kv_parallel_size), column)
