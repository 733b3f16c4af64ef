"""How much of a GPU's memory the KV pool may have: everything else is counted first. Pure.

The meaning is that of SGLang's --mem-fraction-static: the share of the device for weights and KV
together, where the rest is for activations, graphs and what libraries take. Without the flag the
rest is worked out from what the server will do. What this server allocates beside (tables, inputs
of graphs, the relay) comes off the budget by name. See docs/gpu.md, Memory clamp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.utils.sizes import format_bytes

GIB = 1 << 30
MIB = 1 << 20

# SGLang's figures for what stays free of weights and KV.
_CONTEXT_BYTES = 512 * MIB
_ACTIVATION_BYTES_PER_TOKEN = 3 * MIB // 2
_BYTES_PER_RANK = GIB // 8
_LARGE_DEVICE_BYTES = 60 * GIB
_LEAST_ON_LARGE_BYTES = 10 * GIB
# Ours: what a captured step keeps of its intermediate results, by row of the largest one.
_GRAPH_BYTES_PER_ROW = 2 * MIB
_LEAST_TABLE_BYTES = 64 * MIB  # of a group, taken at once so that tables need not move


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """What a server will do with a device, as far as memory depends on it.

    `activation_tokens`: most tokens of a step. `graph_rows`: rows of the largest recorded step, 0
    for none. `ranks`: tensor- times pipeline-parallel. `allocations`: (what, bytes) that the
    server takes beside weights, KV, activations and graphs.
    """

    activation_tokens: int
    graph_rows: int
    ranks: int = 1
    allocations: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceMemoryPlan:
    """Where a device's memory goes, in bytes.

    `taken_bytes` were gone before this server began, `weights_bytes` went while it loaded,
    `rest_bytes` stay free for activations, graphs and libraries. What is left is `budget_bytes`,
    at least 0; all add up to `total_bytes` unless it is 0.
    """

    total_bytes: int
    taken_bytes: int
    weights_bytes: int
    rest_bytes: int
    fraction: float
    allocations: tuple[tuple[str, int], ...]
    budget_bytes: int

    def line(self) -> str:
        """The sum in one line, for the log."""
        terms = [
            ("others", self.taken_bytes),
            ("weights", self.weights_bytes),
            (
                f"activations and graphs (--mem-fraction-static {self.fraction:.3f})",
                self.rest_bytes,
            ),
            *self.allocations,
            ("KV budget", self.budget_bytes),
        ]
        parts = " + ".join(f"{what} {format_bytes(size)}" for what, size in terms)
        return f"device memory {format_bytes(self.total_bytes)} = {parts}"


def rest_bytes(total_bytes: int, needs: DeviceNeeds) -> int:
    """What weights and KV leave free where the user names no fraction (SGLang's heuristic)."""
    wanted = (
        _CONTEXT_BYTES
        + _ACTIVATION_BYTES_PER_TOKEN * needs.activation_tokens
        + _GRAPH_BYTES_PER_ROW * needs.graph_rows
        + _BYTES_PER_RANK * needs.ranks
    )
    if total_bytes > _LARGE_DEVICE_BYTES:
        wanted = max(wanted, _LEAST_ON_LARGE_BYTES)
    return min(wanted, total_bytes)


def plan_device_memory(
    total_bytes: int,
    free_before: int,
    free_after: int,
    fraction: float | None,
    needs: DeviceNeeds,
) -> DeviceMemoryPlan:
    """The KV budget of a device and how it comes about.

    `free_before` and `free_after` loading the weights are what the driver says. `fraction` of
    what was free before is for weights and KV; None: the heuristic. Raises ValueError unless
    0 < `fraction` < 1 and the figures are in order.
    """
    if not 0 <= free_after <= free_before <= total_bytes:
        raise ValueError(
            f"device memory that makes no sense: {total_bytes} bytes, {free_before} free before "
            f"and {free_after} after loading"
        )
    if fraction is None:
        rest = rest_bytes(total_bytes, needs)
    elif 0 < fraction < 1:
        rest = free_before - int(free_before * fraction)
    else:
        raise ValueError(f"--mem-fraction-static must be in (0, 1), not {fraction}")
    taken = sum(size for _, size in needs.allocations)
    return DeviceMemoryPlan(
        total_bytes=total_bytes,
        taken_bytes=total_bytes - free_before,
        weights_bytes=free_before - free_after,
        rest_bytes=rest,
        fraction=1 - rest / max(1, free_before) if fraction is None else fraction,
        allocations=needs.allocations,
        budget_bytes=max(0, free_after - rest - taken),
    )


def step_allocations(
    *,
    num_rows: int,
    graph_rows: int,
    num_groups: int,
    max_pages: Sequence[int],
    vocab_size: int,
    counted_rows: int,
) -> tuple[tuple[str, int], ...]:
    """What a server takes on a device beside weights, KV and activations, by name, in bytes.

    `num_rows` requests at most; graphs of up to `graph_rows` rows; `max_pages` per group of all
    requests' tables together. The tokens of `counted_rows` requests are counted for penalties.
    """
    inputs = graph_rows * 8 * (2 + num_groups)
    # A row's table is int64 on the device at most, and a range may be twice as large as its pages.
    tables = sum(max(_LEAST_TABLE_BYTES, 2 * 8 * pages) for pages in max_pages)
    # Logits of all graphs in float32, and what sorting them takes beside: probabilities, sums in
    # float64, ids and the keys' copies. Penalties and the keys of log probabilities take less, and
    # are gone before, or made after.
    logits = 4 * vocab_size * graph_rows
    sampling = vocab_size * max(graph_rows, 1) * (4 + 4 + 8 + 8 + 8)
    return (
        ("block tables", tables),
        ("inputs of graphs", inputs),
        ("relay of tokens", 8 * num_rows),
        ("counts for penalties", 4 * vocab_size * counted_rows),
        ("logits and sampling", logits + sampling),
    )
