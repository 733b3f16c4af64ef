"""A GPU's memory, summed up: SGLang's fraction, its heuristic, and what we take beside."""

from __future__ import annotations

import pytest

from sglang.srt.mem_cache.device_budget import (
    GIB,
    MIB,
    DeviceNeeds,
    plan_device_memory,
    rest_bytes,
    step_allocations,
)

NEEDS = DeviceNeeds(activation_tokens=8192, graph_rows=256)


def test_the_heuristic_on_devices_of_all_sizes() -> None:
    # 512 MiB + 1.5 MiB x 8192 + 2 MiB x 256 + 1/8 GiB = 13.125 GiB
    assert rest_bytes(80 * GIB, NEEDS) == 512 * MIB + 12 * GIB + 512 * MIB + GIB // 8
    small = DeviceNeeds(activation_tokens=2048, graph_rows=8)
    assert rest_bytes(24 * GIB, small) == 512 * MIB + 3 * GIB + 16 * MIB + GIB // 8
    assert rest_bytes(80 * GIB, small) == 10 * GIB  # at least, on a large device
    assert rest_bytes(60 * GIB, small) < 10 * GIB
    assert rest_bytes(2 * GIB, NEEDS) == 2 * GIB
    eight = DeviceNeeds(activation_tokens=8192, graph_rows=256, ranks=8)
    assert rest_bytes(80 * GIB, eight) - rest_bytes(80 * GIB, NEEDS) == 7 * GIB // 8


def test_all_parts_add_up() -> None:
    needs = DeviceNeeds(8192, 256, 1, (("block tables", 3 * MIB), ("relay of tokens", 4096)))
    for fraction in (None, 0.9, 0.5):
        plan = plan_device_memory(80 * GIB, 79 * GIB, 63 * GIB, fraction, needs)
        beside = sum(size for _, size in plan.allocations)
        parts = plan.taken_bytes + plan.weights_bytes + plan.rest_bytes + beside
        assert parts + plan.budget_bytes == 80 * GIB
        assert plan.weights_bytes == 16 * GIB
        assert plan.taken_bytes == GIB


def test_the_fraction_is_weights_and_kv_of_what_was_free() -> None:
    plan = plan_device_memory(80 * GIB, 70 * GIB, 54 * GIB, 0.9, DeviceNeeds(2048, 0))
    assert plan.weights_bytes + plan.budget_bytes == pytest.approx(0.9 * 70 * GIB, abs=1)


def test_weights_that_leave_nothing_give_no_budget() -> None:
    plan = plan_device_memory(80 * GIB, 79 * GIB, 5 * GIB, None, NEEDS)
    assert plan.budget_bytes == 0


def test_the_line_names_every_part() -> None:
    needs = DeviceNeeds(8192, 256, 1, (("block tables", 3 * MIB),))
    line = plan_device_memory(80 * GIB, 79 * GIB, 63 * GIB, None, needs).line()
    assert line.startswith("device memory 80")
    for what in ("others", "weights", "activations and graphs", "block tables", "KV budget"):
        assert what in line


@pytest.mark.parametrize(
    ("free", "fraction"), [((81, 60), 0.9), ((60, 61), 0.9), ((79, 63), 1.0), ((79, 63), 0.0)]
)
def test_nonsense_is_refused(free: tuple[int, int], fraction: float) -> None:
    with pytest.raises(ValueError):
        plan_device_memory(80, *free, fraction, NEEDS)


def test_what_a_step_takes_beside() -> None:
    found = dict(
        step_allocations(
            num_rows=100,
            graph_rows=8,
            num_groups=2,
            max_pages=(10_000_000, 50),
            vocab_size=1000,
            counted_rows=5,
        )
    )
    assert found["block tables"] == 2 * 8 * 10_000_000 + 64 * MIB
    assert found["inputs of graphs"] == 8 * 8 * 4
    assert found["relay of tokens"] == 800
    assert found["counts for penalties"] == 4 * 1000 * 5
    assert found["logits and sampling"] == 1000 * 8 * (4 + 32)
