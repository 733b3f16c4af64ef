"""Which adapters may run at once, and whose place one takes: decisions on numbers alone.

Adapters in use keep their places; pinned ones keep theirs for good. So a request whose adapter has
none waits until a running one ends, and meanwhile nobody behind it may take or keep a place that
it waits for: of those only requests without an adapter, or with a pinned one, are admitted. What
runs ends, so places become free and nobody is starved. Every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

# Of a queue behind a request that waits for a place, so many are looked at in a step.
MAX_LOOKED_AT = 64


def held_places(
    running: Collection[int | None], pinned: Set[int], places: Mapping[int, int]
) -> set[int]:
    """Adapters that keep their places: those of running requests, and pinned ones that have one.

    `places` are all adapters that lie somewhere, by id.
    """
    return {one for one in running if one is not None} | {one for one in pinned if one in places}


def has_place(adapter: int, held: Set[int], pinned: Set[int], num_places: int) -> bool:
    """Whether an adapter can run beside those that keep their places; one stays for each pinned."""
    if adapter in held:
        return True
    reserved = 0 if adapter in pinned else len(pinned - held)
    return len(held) + reserved < num_places


def may_overtake(adapter: int | None, held: Set[int], pinned: Set[int], num_places: int) -> bool:
    """Whether a request may go before an earlier one that waits for a place."""
    return adapter is None or (adapter in pinned and has_place(adapter, held, pinned, num_places))


def choose_place(
    places: Mapping[int, int], held: Set[int], num_places: int
) -> tuple[int, int | None]:
    """(place, whose it was) for an adapter that has none; None: it was free.

    `places` are in the order in which they are given up. There must be one, see `has_place`.
    """
    taken = set(places.values())
    free = next((place for place in range(num_places) if place not in taken), None)
    if free is not None:
        return free, None
    victim = next(adapter for adapter in places if adapter not in held)
    return places[victim], victim
