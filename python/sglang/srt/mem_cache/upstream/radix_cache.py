"""SGLang's prefix-cache API over ours: keys and slots outside, pages and handles inside.

A match locks nothing and `inc_lock_ref` does; inside it is one act, so a lock here is a match that
is kept. One layer group, since a slot names one place. See Note [Upstream names].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache import radix_cache
from sglang.srt.mem_cache.base_prefix_cache import PrefixHandle
from sglang.srt.mem_cache.upstream.allocators import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.upstream.slots import as_int64, pages_in_order, slots_of_pages

Int32Array = npt.NDArray[np.int32]


class RadixKey:
    """Tokens and a namespace; `cache_salt` and `extra_key` together keep others out."""

    __slots__ = ("cache_salt", "extra_key", "token_ids")

    def __init__(
        self,
        token_ids: Sequence[int] | npt.NDArray[Any],
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> None:
        self.token_ids: Int32Array = np.asarray(token_ids, np.int32)
        self.extra_key = extra_key
        self.cache_salt = cache_salt

    @property
    def namespace(self) -> str | None:
        """One text for both, different for different pairs; None when neither is given."""
        if not self.extra_key and not self.cache_salt:
            return None
        salt = self.cache_salt or ""
        return f"{len(salt)}:{salt}{self.extra_key or ''}"

    def page_aligned(self, page_size: int) -> RadixKey:
        """The whole pages at its beginning."""
        return self[: len(self) - len(self) % page_size]

    def match(self, other: RadixKey, page_size: int = 1) -> int:
        """Length of the common beginning in whole pages; 0 across namespaces."""
        if self.namespace != other.namespace:
            return 0
        count = min(len(self), len(other))
        differ = self.token_ids[:count] != other.token_ids[:count]
        same = int(differ.argmax()) if differ.any() else count
        return same - same % page_size

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, place: slice) -> RadixKey:
        return RadixKey(self.token_ids[place], self.extra_key, self.cache_salt)

    def __repr__(self) -> str:
        return f"RadixKey(tokens={len(self)}, namespace={self.namespace!r})"


class NodeRef:
    """The end of a matched prefix; `lock_ref` counts the locks that were taken through it."""

    __slots__ = ("_handles", "key")

    def __init__(self, key: RadixKey) -> None:
        self.key = key
        self._handles: list[PrefixHandle] = []

    @property
    def lock_ref(self) -> int:
        return len(self._handles)

    def __repr__(self) -> str:
        return f"NodeRef({self.key!r}, locks={self.lock_ref})"


@dataclass(frozen=True)
class MatchPrefixParams:
    key: RadixKey


@dataclass(frozen=True)
class MatchResult:
    """`device_indices` int64 [n] are the slots of the hit. There is no host tier."""

    device_indices: torch.Tensor
    last_device_node: NodeRef
    host_hit_length: int = 0

    @property
    def device_prefix_len(self) -> int:
        return len(self.device_indices)

    @property
    def last_host_node(self) -> NodeRef:
        return self.last_device_node

    @property
    def best_match_node(self) -> NodeRef:
        return self.last_device_node


@dataclass(frozen=True)
class InsertParams:
    """`value` int64 [n]: the slots of the key's tokens, at least of its whole pages."""

    key: RadixKey
    value: torch.Tensor
    priority: int = 0


@dataclass(frozen=True)
class InsertResult:
    """`prefix_len` tokens were there already: their slots are still the caller's, to free."""

    prefix_len: int
    last_device_node: NodeRef = field(repr=False)


@dataclass(frozen=True)
class EvictParams:
    num_tokens: int


@dataclass(frozen=True)
class EvictResult:
    num_tokens_evicted: int


class RadixCache:
    """A prefix cache whose pages come from, and go back to, one allocator."""

    def __init__(
        self, allocator: PagedTokenToKVPoolAllocator, eviction_policy: str = "lru"
    ) -> None:
        self.page_size = allocator.page_size
        self.token_to_kv_pool_allocator = allocator
        self._index = allocator.pages.index
        self._device = allocator.device
        self.inner = radix_cache.RadixCache([self._index], self.page_size, eviction_policy)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longest cached beginning of the key; nothing is locked."""
        key = params.key
        hit = self.inner.match(key.token_ids, key.namespace, len(key))
        self.inner.release(hit.handle)
        slots = slots_of_pages(hit.page_ids[0], self.page_size)
        indices = torch.from_numpy(slots).to(self._device)
        return MatchResult(indices, NodeRef(key[: hit.num_tokens]))

    def insert(self, params: InsertParams) -> InsertResult:
        """Hand over the slots of the key's whole pages; those past `prefix_len` are the cache's.

        Raises ValueError when the slots are not whole pages in order.
        """
        key = params.key.page_aligned(self.page_size)
        if len(params.value) < len(key):
            raise ValueError(f"{len(params.value)} slots for {len(key)} tokens")
        pages = pages_in_order(as_int64(params.value)[: len(key)], self.page_size)
        hit = self.inner.match(key.token_ids, key.namespace, len(key), priority=params.priority)
        self.inner.insert(hit.handle, key.token_ids, len(key), (pages,))
        self._index.drop_row(pages[hit.num_tokens // self.page_size :])
        self.inner.release(hit.handle)
        return InsertResult(hit.num_tokens, NodeRef(key))

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `num_tokens` unlocked tokens, in whole pages, as far as there are any."""
        freed = self.inner.evict(-(-params.num_tokens // self.page_size))
        return EvictResult(freed * self.page_size)

    def inc_lock_ref(self, node: NodeRef) -> None:
        """Keep the prefix until `dec_lock_ref`. Raises InvariantError when it is gone."""
        hit = self.inner.match(node.key.token_ids, node.key.namespace, len(node.key))
        if hit.num_tokens != len(node.key):
            self.inner.release(hit.handle)
            raise InvariantError(f"{node!r} was evicted before it was locked")
        node._handles.append(hit.handle)

    def dec_lock_ref(self, node: NodeRef) -> None:
        """Take one lock back. Raises InvariantError when there is none."""
        if not node._handles:
            raise InvariantError(f"{node!r} is not locked")
        self.inner.release(node._handles.pop())

    def reset(self) -> None:
        """Free everything that is not locked."""
        self.inner.clear()

    def evictable_size(self) -> int:
        """Tokens that could be evicted now."""
        return self.inner.num_evictable_pages * self.page_size

    def protected_size(self) -> int:
        """Tokens under a lock."""
        return self.inner.num_locked_pages * self.page_size

    def total_size(self) -> int:
        """Tokens in the cache."""
        return self.inner.num_pages * self.page_size

    def __repr__(self) -> str:
        return f"upstream.{self.inner!r}"
