"""SGLang's public memory API over pages and locked handles; not used by our scheduler.

For scripts and extensions that were written against SGLang's names. Slots are spelled out here and
nowhere else. See docs/kv_segments.md, Note [Upstream names].
"""

from sglang.srt.mem_cache.upstream.allocators import (
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from sglang.srt.mem_cache.upstream.evict_policy import (
    EvictionStrategy,
    FIFOStrategy,
    LFUStrategy,
    LRUStrategy,
    PriorityStrategy,
)
from sglang.srt.mem_cache.upstream.radix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    NodeRef,
    RadixCache,
    RadixKey,
)
from sglang.srt.mem_cache.upstream.req_to_token import ReqToTokenPool

__all__ = [
    "EvictParams",
    "EvictResult",
    "EvictionStrategy",
    "FIFOStrategy",
    "InsertParams",
    "InsertResult",
    "LFUStrategy",
    "LRUStrategy",
    "MatchPrefixParams",
    "MatchResult",
    "NodeRef",
    "PagedTokenToKVPoolAllocator",
    "PriorityStrategy",
    "RadixCache",
    "RadixKey",
    "ReqToTokenPool",
    "TokenToKVPoolAllocator",
]
