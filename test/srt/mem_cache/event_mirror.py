"""A router's mirror of the prefix cache, kept from events only; for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
)
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_tree import TreeNode
from srt.mem_cache.memory_driver import MemoryDriver

PAGE = 4

Block = tuple[str | None, tuple[int, ...]]  # namespace, every token up to the block's end


class Mirror:
    """A router's view: blocks by hash, kept from events as they come over the wire."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}
        self.kinds: list[str] = []

    def __call__(self, events: Sequence[KVEvent]) -> None:
        """A sink of the recorder's: what it hands over goes through the wire's form."""
        batch = KVEventBatch(0.0, [event.to_wire() for event in events])
        self.hear(msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KVEventBatch))

    def hear(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            self.kinds.append(type(event).__name__)
            match event:
                case AllBlocksCleared():
                    self.blocks.clear()
                case BlockRemoved():
                    for block in event.block_hashes:
                        del self.blocks[block]
                case BlockStored():
                    self._store(event)

    def _store(self, event: BlockStored) -> None:
        assert event.block_size * len(event.block_hashes) == len(event.token_ids)
        if event.parent_block_hash is None:
            first = event.extra_keys[0] if event.extra_keys else None
            namespace, before = (first[0] if first else None), ()
        else:
            assert event.extra_keys is None
            namespace, before = self.blocks[event.parent_block_hash]
        for number, block in enumerate(event.block_hashes, start=1):
            assert block not in self.blocks, "stored twice"
            self.blocks[block] = (
                namespace,
                before + tuple(event.token_ids[: number * event.block_size]),
            )


def blocks_of(memory: KVMemory) -> set[Block]:
    """What the cache really holds, read from the tree."""
    assert isinstance(memory.cache, RadixCache)

    def below(node: TreeNode, before: tuple[int, ...]) -> Iterator[Block]:
        tokens = tuple(node.tokens.view().tolist())
        for end in range(PAGE, len(tokens) + 1, PAGE):
            yield node.extra_key, before + tokens[:end]
        for child in node.children.values():
            yield from below(child, before + tokens)

    roots = [node for node in memory.cache.tree.nodes() if node.is_root]
    return {block for root in roots for block in below(root, ())}


def live(driver: MemoryDriver, tokens: list[int], key: str | None = None) -> None:
    request = driver.open(tokens, key)
    assert request is not None
    assert driver.extend([(request, len(tokens) - request.num_computed)])
    driver.close(request, insert=True)
