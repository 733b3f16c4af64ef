"""Pure arithmetic of slots, pages and segments: no torch, no state, no effects.

Every room that turns one into another calls this module. `KVCacheSpec` says what a token costs,
`SegmentLayout` how a group's slot space is cut; see docs/kv_segments.md, Note [Slots, pages,
segments].

    slot = page * page_size + offset          page = segment * pages_per_segment + index

Segment 0 of every group is never allocated: it holds page 0, the dump page of padding rows, and
only its first granule of each plane is ever backed (`fixed_bytes`).

With several KV-parallel ranks the pages of a segment are dealt to them by turns; slots, pages and
segments keep their numbers on all ranks. See docs/kv_segments.md, Note [KV over ranks].
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NewType

GroupId = NewType("GroupId", int)
SegmentId = NewType("SegmentId", int)
PageId = NewType("PageId", int)
SlotId = NewType("SlotId", int)
ReqPoolIdx = NewType("ReqPoolIdx", int)

MAX_SLOTS = 1 << 31  # slot ids are int32

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "int8": 1,
}

INT8_SCALE_BYTES = 4  # behind each head's bytes: the float32 that they are multiples of
STATE_NUMBER_BYTES = 4  # recurrent states are float32


class GroupKind(enum.Enum):
    """What the layers of a group keep: all tokens, the last `window`, their chunk's, or no token
    but a state."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one layer of linear attention keeps of a request, on one rank, all in float32.

    A matrix [`key_dim`, `value_dim`] for each of `heads` heads, and the last `conv_tokens` inputs
    of a convolution over `channels` channels.
    """

    heads: int
    key_dim: int
    value_dim: int
    conv_tokens: int
    channels: int

    @property
    def matrix_numbers(self) -> int:
        """Numbers of all heads' matrices."""
        return self.heads * self.key_dim * self.value_dim

    @property
    def numbers(self) -> int:
        """Numbers of one layer's state."""
        return self.matrix_numbers + self.conv_tokens * self.channels


class KVHeads(NamedTuple):
    """The heads of a layer on one rank, as `KVCacheSpec` has them."""

    kv_heads: int
    head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers that keep the same. `window` is in tokens, of SLIDING and CHUNKED only; `state` is one
    layer's, of STATE only. `heads` are those of a second model's layers; None: the cache's own.

    In a STATE group a page is a request's whole state over all layers, its slots are parts of it.
    See docs/kv_segments.md, Note [Recurrent state].
    """

    layers: tuple[int, ...]
    kind: GroupKind = GroupKind.FULL
    window: int | None = None
    heads: KVHeads | None = None
    state: StateShape | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a KV group needs at least one layer")
        if (self.window is not None) != (self.kind in (GroupKind.SLIDING, GroupKind.CHUNKED)):
            raise ValueError("exactly the window groups have a window")
        if (self.state is not None) != (self.kind is GroupKind.STATE):
            raise ValueError("exactly the groups of states have a state")

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's state over all layers; 0 where tokens are kept."""
        if self.state is None:
            return 0
        return len(self.layers) * self.state.numbers * STATE_NUMBER_BYTES


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What the KV cache of one rank holds: its groups, heads and widths.

    `kv_heads` are this rank's. `dtype` is a key of `DTYPE_BYTES`. With `values_in_keys` a head's V
    are the first `v_head_dim` numbers of its K, and a layer has one plane instead of two: see
    docs/kv_segments.md, Note [Latent attention]. Layers `index_layers`, ascending, keep a key of
    `index_dim` numbers beside (0 and none: no layer does), in a plane of its own: Note [Sparse
    attention]. Heads, widths and bytes of a layer are those of groups that have no heads of their
    own: `of_group` answers for any. Raises ValueError when the groups do not cover layers 0..n-1
    exactly once, and for widths and types that can't be kept so.
    """

    groups: tuple[KVGroupSpec, ...]
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    page_size: int
    values_in_keys: bool = False
    index_dim: int = 0
    index_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers = layers_of(self.groups)
        if layers != list(range(len(layers))):
            raise ValueError("KV groups must cover every layer exactly once")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype}")
        if self.dtype == "int8" and (self.head_dim % 4 or self.v_head_dim % 4):
            raise ValueError(
                "a KV cache of int8 needs head widths that are multiples of 4, not "
                f"{self.head_dim} and {self.v_head_dim}"
            )
        if min(self.kv_heads, self.head_dim, self.v_head_dim, self.page_size) < 1:
            raise ValueError("heads, widths and page size must be positive")
        if self.values_in_keys and self.dtype == "int8":
            raise ValueError(
                "a KV cache of int8 can't hold latent attention, whose values are parts of keys"
            )
        if self.values_in_keys and self.v_head_dim > self.head_dim:
            raise ValueError(f"values of {self.v_head_dim} are no part of keys of {self.head_dim}")
        if bool(self.index_layers) != (self.index_dim > 0) or set(self.index_layers) - set(layers):
            raise ValueError(f"index keys of {self.index_dim} in layers {self.index_layers}")
        if self.index_layers and not self.values_in_keys:
            raise ValueError("index keys are kept beside latents only")
        for group in self.groups:
            if group.heads is not None:
                one = replace(self, groups=(KVGroupSpec((0,)),), index_dim=0, index_layers=())
                replace(one, **group.heads._asdict())

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def k_width(self) -> int:
        """Numbers of the KV dtype that one head's K takes in a plane: of int8 its scale too."""
        return self.head_dim + (INT8_SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def v_width(self) -> int:
        """As `k_width`, of V; 0 where V has no plane."""
        if self.values_in_keys:
            return 0
        return self.v_head_dim + (INT8_SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def k_bytes_per_slot_layer(self) -> int:
        """Bytes of one token's K in one layer (one plane)."""
        return self.kv_heads * self.k_width * DTYPE_BYTES[self.dtype]

    @property
    def v_bytes_per_slot_layer(self) -> int:
        """Bytes of one token's V in one layer (one plane); 0 where V has none."""
        return self.kv_heads * self.v_width * DTYPE_BYTES[self.dtype]

    @property
    def index_bytes_per_slot_layer(self) -> int:
        """Bytes of one token's index key in a layer that has one."""
        return self.kv_heads * self.index_dim * DTYPE_BYTES[self.dtype]

    def num_index_layers(self, group: GroupId) -> int:
        """Layers of `group` that keep index keys."""
        return len(set(self.groups[group].layers) & set(self.index_layers))

    def of_group(self, group: GroupId) -> KVCacheSpec:
        """What holds for one group: this, or the same with the group's own heads."""
        heads = self.groups[group].heads
        return self if heads is None else self.part((group,))

    def part(self, groups: Sequence[GroupId]) -> KVCacheSpec:
        """Some groups as the cache of one model: its layers are numbered from 0, in their order.

        Raises ValueError when the groups' heads are not alike.
        """
        chosen = [self.groups[group] for group in groups]
        heads = {group.heads for group in chosen}
        if len(heads) != 1:
            raise ValueError("the layers of one model have heads that are alike")
        numbers = {layer: at for at, layer in enumerate(layers_of(chosen))}
        own = heads.pop() or KVHeads(self.kv_heads, self.head_dim, self.v_head_dim)
        renumbered = tuple(
            replace(group, layers=tuple(numbers[layer] for layer in group.layers), heads=None)
            for group in chosen
        )
        index = tuple(numbers[layer] for layer in self.index_layers if layer in numbers)
        dim = self.index_dim if index else 0
        return replace(self, groups=renumbered, **own._asdict(), index_layers=index, index_dim=dim)

    def bytes_per_slot(self, group: GroupId) -> int:
        """Bytes of one token over all layers of `group`: K, V and index keys. Of a state, its share
        of a page, in whole numbers; layouts may round it up further."""
        one = self.groups[group]
        if one.state is not None:
            return -(-one.state_bytes // (self.page_size * STATE_NUMBER_BYTES)) * STATE_NUMBER_BYTES
        own = self.of_group(group)
        per_layer = own.k_bytes_per_slot_layer + own.v_bytes_per_slot_layer
        index = self.num_index_layers(group) * self.index_bytes_per_slot_layer
        return len(one.layers) * per_layer + index

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token that every group keeps; states keep none."""
        groups = (g for g, group in enumerate(self.groups) if group.state is None)
        return sum(self.bytes_per_slot(GroupId(g)) for g in groups)

    @property
    def tokens_per_state(self) -> int | None:
        """Tokens that take as much memory as a request's state; None without states.

        So far apart a long prompt leaves states in the cache, which at most double what it takes.
        """
        state_bytes = sum(group.state_bytes for group in self.groups)
        return -(-state_bytes // self.bytes_per_token) if state_bytes else None

    def plane_layers(self, group: GroupId) -> tuple[int, ...]:
        """Layers with planes of their own: of states only the first, whose plane is all layers'."""
        one = self.groups[group]
        return one.layers if one.state is None else one.layers[:1]

    def group_of_layer(self) -> tuple[GroupId, ...]:
        """Layer id -> group id, as a table built once."""
        table = [GroupId(0)] * self.num_layers
        for g, group in enumerate(self.groups):
            for layer in group.layers:
                table[layer] = GroupId(g)
        return tuple(table)


def layers_of(groups: Iterable[KVGroupSpec]) -> list[int]:
    """The layers of some groups, ascending."""
    return sorted(layer for group in groups for layer in group.layers)


@dataclass(frozen=True, slots=True)
class KVRanks:
    """This rank's number among the `size` ranks that share each request's KV.

    Raises ValueError when it is none of them.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"KV-parallel rank {self.rank} is none of {self.size}")


ONE_KV_RANK = KVRanks()


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """How one group's slot space is cut into segments.

    `max_segments` counts segment 0 (the dump segment) too; usable ids are 1..max_segments-1. Each
    of `kv_parallel` ranks holds one page of as many; bytes are those of one rank. `num_layers` are
    those with planes. `holds_states`: a page is a state, in one plane for all layers.
    """

    group: GroupId
    page_size: int
    pages_per_segment: int
    max_segments: int
    num_layers: int
    k_bytes_per_slot: int  # one layer
    v_bytes_per_slot: int  # one layer; 0: V has no plane
    granule_bytes: int
    kv_parallel: int = 1
    index_bytes_per_slot: int = 0  # one layer of those that keep index keys
    num_index_layers: int = 0
    holds_states: bool = False

    def __post_init__(self) -> None:
        if self.pages_per_segment % self.kv_parallel:
            raise ValueError(
                f"{self.pages_per_segment} pages cannot be dealt to {self.kv_parallel} ranks"
            )

    @property
    def slots_per_segment(self) -> int:
        return self.pages_per_segment * self.page_size

    @property
    def plane_bytes_per_slot(self) -> tuple[int, ...]:
        """Bytes of a token in each plane of a layer: K's, and V's where it has one.

        Planes of index keys, which some layers have beside, are not among them.
        """
        both = (self.k_bytes_per_slot, self.v_bytes_per_slot)
        return both if self.v_bytes_per_slot else both[:1]

    @property
    def plane_counts(self) -> tuple[tuple[int, int], ...]:
        """(planes, bytes of a token in each) of all layers, kind by kind."""
        kept = tuple((self.num_layers, per_slot) for per_slot in self.plane_bytes_per_slot)
        return (*kept, (self.num_index_layers, self.index_bytes_per_slot))

    @property
    def num_slots(self) -> int:
        """Slots of the whole logical space, the dump segment included."""
        return self.max_segments * self.slots_per_segment

    @property
    def segment_bytes(self) -> int:
        """Bytes of one rank's part of a segment over all planes."""
        per_slot = sum(planes * size for planes, size in self.plane_counts)
        return self.slots_per_segment // self.kv_parallel * per_slot

    @property
    def reserved_bytes(self) -> int:
        """Address space of all planes; costs nothing until mapped."""
        return self.max_segments * self.segment_bytes

    @property
    def fixed_bytes(self) -> int:
        """What permanently backs page 0: as many granules per plane as one page needs."""
        total = 0
        for planes, per_slot in self.plane_counts:
            page_bytes = self.page_size * per_slot
            total += planes * math.ceil(page_bytes / self.granule_bytes) * self.granule_bytes
        return total

    @property
    def on_rank(self) -> SegmentLayout:
        """The same segments as one rank's planes hold them: its own pages, close together."""
        own = self.pages_per_segment // self.kv_parallel
        return replace(self, pages_per_segment=own, kv_parallel=1)

    def page_of(self, slot: int) -> PageId:
        return PageId(slot // self.page_size)

    def segment_of(self, page: int) -> SegmentId:
        return SegmentId(page // self.pages_per_segment)

    def first_page(self, segment: int) -> PageId:
        return PageId(segment * self.pages_per_segment)


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)
