"""Events of the prefix cache for routers: which blocks (pages) were stored and removed.

The radix cache calls a `KVEventRecorder` when there is one; `KVMemory` hands what was recorded to
a sink at step boundaries. The wire types and their order of fields are what subscribers of
SGLang's and vLLM's event streams decode. See docs/kv_segments.md, Note [KV events].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.id_array import IdArray
from sglang.srt.mem_cache.radix_tree import TreeNode

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

MEDIUM_GPU = "GPU"
"""The first tier, whatever the device: the value that routers know it by."""

_IDS_PER_HASH = 2
"""A node keeps 64-bit hashes in an `IdArray` of int32."""


class KVCacheEvent(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """On the wire an array whose first element is the class's name."""


class BlockStored(KVCacheEvent, frozen=True):
    """Blocks in order, each `block_size` tokens, that continue `parent_block_hash` (None: nothing).

    `extra_keys` has one entry per block; of the first block of a sequence it is (namespace,).
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(KVCacheEvent, frozen=True):
    """Blocks that are gone."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent, frozen=True):
    """Nothing is cached any more."""


class KVEventBatch(msgspec.Struct, array_like=True, frozen=True):
    """Events of one step in order; `ts` in seconds since 1970."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    attn_dp_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """`BlockStored` before it is spelled out, so that this costs the scheduler nothing."""

    hashes: Int64Array
    parent: int | None
    tokens: Int32Array
    page_size: int
    extra_key: str | None

    def to_wire(self) -> BlockStored:
        keys: list[tuple[str, ...] | None] | None = None
        if self.parent is None and self.extra_key is not None:
            keys = [(self.extra_key,), *[None] * (len(self.hashes) - 1)]
        return BlockStored(
            self.hashes.tolist(),
            self.parent,
            self.tokens.tolist(),
            self.page_size,
            None,
            MEDIUM_GPU,
            None,
            keys,
        )


@dataclass(frozen=True, slots=True)
class Removed:
    """`BlockRemoved` before it is spelled out."""

    hashes: Int64Array

    def to_wire(self) -> BlockRemoved:
        return BlockRemoved(self.hashes.tolist(), MEDIUM_GPU)


@dataclass(frozen=True, slots=True)
class Cleared:
    """`AllBlocksCleared`."""

    def to_wire(self) -> AllBlocksCleared:
        return AllBlocksCleared()


KVEvent = Stored | Removed | Cleared
EventSink = Callable[[Sequence[KVEvent]], None]


class KVEventRecorder:
    """Hashes pages as they enter the tree and notes what comes and goes until `flush`.

    Invariant: a node below a root holds one hash per page of its edge, in `node.hashes`.
    """

    def __init__(self, page_size: int, sink: EventSink) -> None:
        self._page_size = page_size
        self._sink = sink
        self._events: list[KVEvent] = []

    def stored(self, node: TreeNode, num_pages: int) -> None:
        """The last `num_pages` pages of the node's edge are new."""
        if node.hashes is None:
            node.hashes = IdArray()
        parent = _last_hash(node) if len(node.hashes) else _last_hash(node.parent)
        tokens = node.tokens.view(len(node.tokens) - num_pages * self._page_size).copy()
        hashes = hash_pages(tokens, self._page_size, parent, node.extra_key)
        node.hashes.append(hashes.view(np.int32))
        self._events.append(Stored(hashes, parent, tokens, self._page_size, node.extra_key))

    def removed(self, node: TreeNode, num_pages: int) -> None:
        """The last `num_pages` pages of the node's edge are about to go."""
        if node.hashes is not None:
            self._events.append(Removed(_take_tail(node.hashes, num_pages)))

    def cleared(self, num_removals: int) -> None:
        """The last `num_removals` events were the end of everything: say so in one."""
        del self._events[len(self._events) - num_removals :]
        self._events.append(Cleared())

    def flush(self) -> None:
        """Hand the events since the last call to the sink; nothing when there were none."""
        if self._events:
            events, self._events = self._events, []
            self._sink(events)

    def check(self, node: TreeNode) -> None:
        """Raise InvariantError unless the node has one hash per page."""
        known = 0 if node.hashes is None else len(node.hashes)
        if known != _IDS_PER_HASH * node.num_pages:
            raise InvariantError(f"{node!r} has {known // _IDS_PER_HASH} hashes")

    def __repr__(self) -> str:
        return f"KVEventRecorder(events={len(self._events)})"


def hash_pages(
    tokens: Int32Array, page_size: int, parent: int | None, extra_key: str | None
) -> Int64Array:
    """64-bit hashes, int64 [len(tokens) / page_size], each of a page and all that is before it.

    SHA-256 over the 8 bytes of the hash before (without one: the SHA-256 of the namespace, or
    nothing) and the page's tokens as little-endian int32; its first 8 bytes, big-endian, signed.
    """
    if parent is not None:
        state = parent.to_bytes(8, "big", signed=True)
    else:
        state = b"" if extra_key is None else hashlib.sha256(extra_key.encode()).digest()
    data = np.ascontiguousarray(tokens, "<i4").tobytes()
    step = 4 * page_size
    digests = []
    for first in range(0, len(data), step):
        state = hashlib.sha256(state + data[first : first + step]).digest()[:8]
        digests.append(state)
    return np.frombuffer(b"".join(digests), ">i8").astype(np.int64)


def _last_hash(node: TreeNode | None) -> int | None:
    if node is None or node.hashes is None or len(node.hashes) == 0:
        return None
    return int(node.hashes.view(len(node.hashes) - _IDS_PER_HASH).copy().view(np.int64)[0])


def _take_tail(hashes: IdArray, num_pages: int) -> Int64Array:
    return hashes.cut_tail(_IDS_PER_HASH * num_pages).view(np.int64)
