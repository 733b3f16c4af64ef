"""What adapters add to linear layers: by row, by part, by rank, beside any weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    ShardedLinear,
)
from sglang.srt.layers.lora import AdapterMask, AdapterRows, AdapterStep, LinearAdapters
from srt.layers.test_linear import close, rand, ranks

RANK = 3


def rows_of(places: Sequence[int], lens: Sequence[int], wanted: Sequence[int]) -> AdapterRows:
    return AdapterRows.of_step(np.array(places), np.array(lens), np.array(wanted), list)


def test_rows_are_grouped_by_place() -> None:
    rows = rows_of([2, -1, 0, 2], [2, 1, 3, 1], [1, 2, 6])
    found = [(group.place, group.rows) for group in rows.groups_of(7)]
    assert [place for place, _ in found] == [0, 2]
    assert found[0][1] == slice(3, 6)
    assert isinstance(found[1][1], torch.Tensor)
    assert found[1][1].tolist() == [0, 1, 6]
    (wanted,) = rows.groups_of(3)
    assert isinstance(wanted.rows, torch.Tensor)
    assert (wanted.place, wanted.rows.tolist()) == (2, [0, 2])


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_gets_it_as_a_bias(bias: bool) -> None:
    """The whole layer and parts of it, of which adapters change two."""
    layer = QKVParallelLinear(6, 4, 4, 2, bias=bias, parallel=ParallelState(), dtype=torch.float32)
    sizes = {"q": 16, "k": 8, "v": 8}
    for name, size in sizes.items():
        layer.weight_loader("weight", rand(size, 6, seed=size), name)
        if bias:
            layer.weight_loader("bias", rand(size, seed=1), name)
    x = rand(1, 6, seed=3)
    plain = layer(x)
    step = AdapterStep()
    whole: Shards = {"q": pair(6, 16, RANK, 10), "v": pair(6, 8, 2, 20)}
    adapt(layer, step, [{}, whole])
    want = plain.clone()
    want[:, :16] += added(x, whole["q"])
    want[:, 24:] += added(x, whole["v"])
    step.rows = rows_of([1], [1], [0])
    close(layer(x), want)
    close(torch.cat([layer.queries(x), *layer.keys_values(x)], -1), want)
    step.rows = rows_of([-1, 1], [1, 3], [0])
    close(layer(x), plain)  # the one wanted row of a step in which another has an adapter


def test_one_adapter_everywhere_is_one_group_of_all_rows() -> None:
    assert rows_of([1, 1], [1, 1], [0, 1]).groups_of(2) == ((1, None),)


def test_a_layer_of_other_rows_is_a_bug() -> None:
    with pytest.raises(InvariantError, match="5 rows are neither a step's 7 nor its 1"):
        rows_of([0], [7], [6]).groups_of(5)


Shards = dict[int | str | None, tuple[torch.Tensor, torch.Tensor]]


def adapt(layer: ShardedLinear, step: AdapterStep, adapters: Sequence[Shards]) -> None:
    """Put whole adapters, cut as the layer says, into the places 0, 1, ..."""
    shards = sorted({shard for one in adapters for shard in one}, key=str)
    parts = {shard: layer.adapter_part(shard) for shard in shards}
    layer.adapters = LinearAdapters(
        parts, layer.num_outputs, len(adapters), RANK, layer.weight, step
    )
    for place, whole in enumerate(adapters):
        cut = {}
        for shard, (a, b) in whole.items():
            part = parts[shard]
            columns = a[:, part.column_first : part.column_first + part.columns]
            assert a.shape[1] == part.source_columns
            assert len(b) == part.source_rows
            cut[shard] = (columns, b[part.source_first : part.source_first + part.rows])
        layer.adapters.put(place, cut)


def pair(inputs: int, outputs: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(rank, inputs, seed=seed), rand(outputs, rank, seed=seed + 50)


def added(x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    a, b = factors
    return x @ a.T @ b.T


# Five rows: adapter 1, none, adapter 0, adapter 0, adapter 1.
PLACES = [1, -1, 0, 0, 1]


def expected(x: torch.Tensor, weight: torch.Tensor, adapters: list[torch.Tensor]) -> torch.Tensor:
    out = x @ weight.T
    for row, place in enumerate(PLACES):
        if place >= 0:
            out[row] += adapters[place][row]
    return out


@pytest.mark.parametrize("tp", [1, 2])
def test_merged_columns(tp: int) -> None:
    weights = [rand(8, 6, seed=1), rand(4, 6, seed=2)]
    x = rand(5, 6, seed=3)
    # The first changes both parts, the second, of a smaller rank, one of them.
    both: Shards = {0: pair(6, 8, RANK, 10), 1: pair(6, 4, RANK, 20)}
    one: Shards = {1: pair(6, 4, 2, 30)}
    outs = []
    for state in ranks(tp):
        layer = MergedColumnParallelLinear(6, (8, 4), parallel=state, dtype=torch.float32)
        for shard, weight in enumerate(weights):
            layer.weight_loader("weight", weight, shard)
        step = AdapterStep()
        adapt(layer, step, [both, one])
        before = layer(x)
        step.rows = rows_of(PLACES, [1] * 5, range(5))
        outs.append(torch.split(layer(x), layer.shard_sizes, dim=-1))
        step.rows = None
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    first = [added(x, both[0]), torch.zeros(5, 8)]
    second = [added(x, both[1]), added(x, one[1])]
    close(torch.cat([out[0] for out in outs], -1), expected(x, weights[0], first))
    close(torch.cat([out[1] for out in outs], -1), expected(x, weights[1], second))


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_sum_over_the_ranks(tp: int) -> None:
    weight, bias, x = rand(5, 8), rand(5, seed=1), rand(5, 8, seed=2)
    adapters: list[Shards] = [{None: pair(8, 5, RANK, 10)}, {None: pair(8, 5, 1, 20)}]
    parts = []
    for state in ranks(tp):
        layer = RowParallelLinear(8, 5, bias=True, parallel=state, dtype=torch.float32)
        layer.weight_loader("weight", weight)
        layer.weight_loader("bias", bias)
        step = AdapterStep()
        adapt(layer, step, adapters)
        step.rows = rows_of(PLACES, [1] * 5, range(5))
        width = 8 // tp
        out = layer(x[:, state.tp_rank * width : (state.tp_rank + 1) * width])
        parts.append(out - bias)
    want = expected(x, weight, [added(x, one[None]) for one in adapters])
    close(torch.stack(parts).sum(0), want)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 2), (2, 2), (2, 1)])
def test_queries_keys_and_values(tp: int, kv_heads: int) -> None:
    """Whole, and as queries of some rows beside keys and values of all."""
    head, heads, x = 4, 4, rand(5, 6, seed=3)
    sizes = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    weights = {name: rand(size, 6, seed=i) for i, (name, size) in enumerate(sizes.items())}
    whole: Shards = {
        name: pair(6, size, RANK, 10 * i) for i, (name, size) in enumerate(sizes.items())
    }
    values: Shards = {"v": pair(6, sizes["v"], 2, 99)}
    wanted = [2, 4]
    for state in ranks(tp):
        layer = QKVParallelLinear(6, head, heads, kv_heads, parallel=state, dtype=torch.float32)
        for name, weight in weights.items():
            layer.weight_loader("weight", weight, name)
        step = AdapterStep()
        adapt(layer, step, [whole, values])
        step.rows = rows_of(PLACES, [1] * 5, wanted)
        found = dict(zip("qkv", layer.split(layer(x)), strict=True))
        pruned = dict(zip("kv", layer.keys_values(x), strict=True))
        pruned["q"] = layer.queries(x[wanted])
        for name, size in sizes.items():
            nothing = torch.zeros(5, size)
            second = added(x, values["v"]) if name == "v" else nothing
            want = expected(x, weights[name], [added(x, whole[name]), second])
            part = layer.adapter_part(name)
            want = want[:, part.source_first : part.source_first + part.rows]
            close(found[name], want)
            close(pruned[name], want[wanted] if name == "q" else want)


def test_a_place_forgets_what_it_held() -> None:
    layer = RowParallelLinear(8, 5, parallel=ParallelState(), dtype=torch.float32)
    layer.weight_loader("weight", rand(5, 8))
    step = AdapterStep()
    adapt(layer, step, [{None: pair(8, 5, RANK, 10)}])
    small = pair(8, 5, 1, 20)
    assert layer.adapters is not None
    layer.adapters.put(0, {None: small})
    step.rows = rows_of([0], [1], [0])
    x = rand(1, 8, seed=9)
    close(layer(x), x @ rand(5, 8).T + added(x, small))
    layer.adapters.put(0, {})
    close(layer(x), x @ rand(5, 8).T)
    assert layer.adapters.nbytes == 4 * (RANK * 8 + 5 * RANK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    layer = RowParallelLinear(64, 32, parallel=ParallelState(), dtype=dtype)
    weight, x = rand(32, 64), rand(40, 64, seed=1) / 8
    layer.weight_loader("weight", weight.to(dtype))
    step = AdapterStep()
    factors = pair(64, 32, RANK, 10)
    adapt(layer, step, [{None: factors}])
    step.rows = rows_of([0, -1], [39, 1], [38])
    want = x @ weight.T
    want[:39] += added(x, factors)[:39]
    got = layer(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from sglang.srt.layers import lora

    calls: list[int] = []
    inner: Callable[..., torch.Tensor] = lora.linear

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return inner(x, weight)

    monkeypatch.setattr(lora, "linear", counted)
    return calls


def test_products_are_as_many_as_adapters_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RowParallelLinear(8, 5, parallel=ParallelState(), dtype=torch.float32)
    layer.weight_loader("weight", rand(5, 8))
    step = AdapterStep()
    adapt(layer, step, [{None: pair(8, 5, RANK, seed)} for seed in (10, 20)])
    calls = count_products(monkeypatch)
    step.rows = rows_of([1] * 64, [1] * 64, range(64))
    layer(rand(64, 8))
    assert calls == [64, 64]
    calls.clear()
    step.rows = rows_of([1, 0] * 32, [1] * 64, range(64))
    layer(rand(64, 8))
    assert calls == [32] * 4


def test_all_places_at_once_give_the_same() -> None:
    """What a recorded step computes, with rows that have none among the others."""
    layer = MergedColumnParallelLinear(6, (8, 4), parallel=ParallelState(), dtype=torch.float32)
    for shard, rows in enumerate((8, 4)):
        layer.weight_loader("weight", rand(rows, 6, seed=shard), shard)
    step = AdapterStep()
    whole: Shards = {0: pair(6, 8, RANK, 10), 1: pair(6, 4, RANK, 20)}
    adapt(layer, step, [whole, {1: pair(6, 4, 2, 30)}])
    x = rand(5, 6, seed=3)
    step.rows = rows_of(PLACES, [1] * 5, range(5))
    want = layer(x)
    own = torch.zeros(5, 2)
    for row, place in enumerate(PLACES):
        if place >= 0:
            own[row, place] = 1
    step.rows = AdapterMask(own)
    close(layer(x), want)


def test_all_places_at_once_for_parts_of_a_layer() -> None:
    layer = QKVParallelLinear(6, 4, 4, 2, parallel=ParallelState(), dtype=torch.float32)
    sizes = {"q": 16, "k": 8, "v": 8}
    for name, size in sizes.items():
        layer.weight_loader("weight", rand(size, 6), name)
    step = AdapterStep()
    adapt(layer, step, [{name: pair(6, size, RANK, size) for name, size in sizes.items()}])
    x = rand(3, 6, seed=3)
    step.rows = AdapterMask(torch.ones(3, 1))
    close(torch.cat([layer.queries(x), *layer.keys_values(x)], -1), layer(x))
