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
from fractions import Fraction
from typing import NamedTuple, NewType

GroupId = NewType("GroupId", int)
SegmentId = NewType("SegmentId", int)
PageId = NewType("PageId", int)
SlotId = NewType("SlotId", int)
ReqPoolIdx = NewType("ReqPoolIdx", int)

MAX_SLOTS = 1 << 31  # slot ids are int32
_MOST_PADDING = Fraction(1, 8)  # of a state, so that it fills whole granules

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
STATE_SHARE = Fraction(9, 10)  # as SGLang's --mamba-full-memory-ratio divides by default


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


def round_slots_per_segment(
    page_size: int, plane_bytes: tuple[int, ...], requested_slots: int, granule_bytes: int
) -> int:
    """Smallest multiple of the page size at which every plane's part is whole granules.

    At least `requested_slots` tokens and at least 1. `plane_bytes` are those of a slot in each
    plane of a layer. With a granule of 1 byte only the page size rounds.
    """
    step = page_size
    for per_slot in plane_bytes:
        step = math.lcm(step, granule_bytes // math.gcd(granule_bytes, per_slot))
    return max(1, -(-requested_slots // step)) * step


def state_bytes_per_slot(spec: KVCacheSpec, group: GroupId, granule_bytes: int) -> int:
    """A slot's share of a state in a layout, rounded up as far as that costs little.

    The rounder a page, the fewer states fill whole granules and make a segment.
    """
    least = spec.bytes_per_slot(group)
    align = granule_bytes
    while align > 1:
        step = math.lcm(align, spec.page_size * STATE_NUMBER_BYTES)
        per_slot = -(-least * spec.page_size // step) * step // spec.page_size
        if per_slot - least <= least * _MOST_PADDING:
            return per_slot
        align //= 2
    return least


def make_segment_layouts(
    spec: KVCacheSpec,
    *,
    slots_per_segment: int | None,
    auto_segment_bytes: int,
    auto_min_slots: int,
    granule_bytes: int,
    machine_bytes: int,
    budget_bytes: int,
    kv_parallel: int = 1,
) -> tuple[SegmentLayout, ...]:
    """Cut every group's slot space, generously: address space is free, slots are permanent.

    `slots_per_segment` None is `auto`: the power of two nearest to `auto_segment_bytes` over all
    planes of a rank, at least `auto_min_slots`. Segments of states are always cut so, or smaller
    where pages of that many tokens are fewer. The space holds what `machine_bytes` (all memory and
    lower tiers of a rank) could ever hold and at least twice `budget_bytes`. Segments of the group
    that keeps all tokens are dealt to `kv_parallel` ranks; the others are whole on each. Raises
    ValueError when even one segment passes 2^31 slots.
    """
    layouts = []
    for g in range(spec.num_groups):
        group = GroupId(g)
        per_slot = spec.bytes_per_slot(group)
        ranks = kv_parallel if spec.groups[g].kind is GroupKind.FULL else 1
        own = spec.of_group(group)
        planes = (own.k_bytes_per_slot_layer, own.v_bytes_per_slot_layer)
        if spec.groups[g].state is not None:
            per_slot = state_bytes_per_slot(spec, group, granule_bytes)
            planes = (per_slot, 0)
            states = nearest_power_of_two(auto_segment_bytes / (per_slot * spec.page_size))
            if slots_per_segment is not None:
                states = min(states, max(1, slots_per_segment // spec.page_size))
            wanted = states * spec.page_size
        elif slots_per_segment is None:
            wanted = max(auto_min_slots, nearest_power_of_two(auto_segment_bytes / per_slot))
        else:
            wanted = -(-slots_per_segment // ranks)
        own_slots = round_slots_per_segment(
            spec.page_size, (*planes, spec.index_bytes_per_slot_layer), wanted, granule_bytes
        )
        slots = own_slots * ranks
        limit = MAX_SLOTS // slots
        if limit < 2:
            raise ValueError(f"segments of {slots} tokens leave no room below 2^31 slots")
        held = max(machine_bytes, 2 * budget_bytes) // per_slot
        max_segments = min(limit, 1 + max(1, -(-held // own_slots)))
        layouts.append(
            SegmentLayout(
                group=group,
                page_size=spec.page_size,
                pages_per_segment=slots // spec.page_size,
                kv_parallel=ranks,
                max_segments=max_segments,
                num_layers=len(spec.plane_layers(group)),
                k_bytes_per_slot=planes[0],
                v_bytes_per_slot=planes[1],
                granule_bytes=granule_bytes,
                index_bytes_per_slot=spec.index_bytes_per_slot_layer,
                num_index_layers=spec.num_index_layers(group),
                holds_states=spec.groups[g].state is not None,
            )
        )
    return tuple(layouts)


def trim_layouts_to_budget(
    layouts: tuple[SegmentLayout, ...], budget_bytes: int
) -> tuple[SegmentLayout, ...]:
    """The same cuts with only as many segments as `budget_bytes` holds: for memory that stays.

    A backing that is not elastic can't move memory between groups, so the budget is divided once,
    such that every group holds about as many tokens. States get `STATE_SHARE` times as much as the
    tokens. Raises ValueError when a group gets none.
    """
    state_bytes = 0
    if any(layout.holds_states for layout in layouts):
        state_bytes = int(budget_bytes * STATE_SHARE / (1 + STATE_SHARE))
    tokens = (budget_bytes - state_bytes) / sum(
        Fraction(layout.segment_bytes, layout.slots_per_segment)
        for layout in layouts
        if not layout.holds_states
    )
    trimmed = []
    for layout in layouts:
        segments = int(tokens / layout.slots_per_segment)
        if layout.holds_states:
            segments = state_bytes // layout.segment_bytes
        segments = min(segments, layout.max_segments - 1)
        if segments < 1:
            raise ValueError(
                f"a KV budget of {budget_bytes:,} bytes does not hold one segment of "
                f"{layout.segment_bytes:,} bytes of every layer group"
            )
        trimmed.append(replace(layout, max_segments=1 + segments))
    return tuple(trimmed)


def tiers_bytes(layouts: Sequence[SegmentLayout], upper: int, lower: int) -> int:
    """Bytes of segments that two tiers of `upper` and `lower` bytes hold, however these are filled.

    A segment lies on one tier as a whole: what each has beyond whole ones holds nothing. Of groups
    whose segments differ in size, the upper tier may have no room for the larger ones first.
    """
    if not lower:
        return upper
    sizes = [layout.segment_bytes for layout in layouts]
    unit = math.gcd(*sizes)
    upper, lower = upper - upper % unit, lower - lower % unit
    return max(upper, lower, upper + lower - (max(sizes) - unit))


def nearest_power_of_two(value: float) -> int:
    """Power of two nearest to `value` by difference; at least 1."""
    low = 1 << max(0, math.floor(math.log2(max(value, 1.0))))
    return low if value - low <= 2 * low - value else 2 * low
