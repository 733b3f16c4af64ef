from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

F32 = torch.float32


@dataclass(frozen=True)
class RecordingState(ParallelState):
    """One rank of a simulated group: keeps what it would send and returns it unreduced."""

    sent: list[torch.Tensor] = field(default_factory=list)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        self.sent.append(tensor)
        return tensor


def ranks(n: int) -> list[RecordingState]:
    return [RecordingState(rank, n) for rank in range(n)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_column_shards_concatenate_to_the_whole(tp: int, bias: bool) -> None:
    w, b, x = rand(12, 6), rand(12, seed=1), rand(5, 6, seed=2)
    outs = []
    for state in ranks(tp):
        layer = ColumnParallelLinear(6, 12, bias=bias, parallel=state, dtype=F32)
        layer.weight_loader("weight", w)
        if bias:
            layer.weight_loader("bias", b)
        assert layer.weight.shape == (12 // tp, 6)
        assert not layer.weight.requires_grad
        outs.append(layer(x))
        assert state.sent == []
    close(torch.cat(outs, -1), F.linear(x, w, b if bias else None))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("merged_in_checkpoint", [False, True])
def test_merged_column_keeps_projections_apart(tp: int, merged_in_checkpoint: bool) -> None:
    gate, up, x = rand(8, 6), rand(4, 6, seed=1), rand(5, 6, seed=2)
    outs = []
    for state in ranks(tp):
        layer = MergedColumnParallelLinear(6, (8, 4), parallel=state, dtype=F32)
        if merged_in_checkpoint:
            layer.weight_loader("weight", torch.cat((gate, up)))
        else:
            layer.weight_loader("weight", up, 1)
            layer.weight_loader("weight", gate, 0)
        outs.append(layer(x).split(layer.shard_sizes, -1))
    close(torch.cat([out[0] for out in outs], -1), x @ gate.T)
    close(torch.cat([out[1] for out in outs], -1), x @ up.T)


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(1, 4, 2), (2, 4, 2), (4, 8, 2), (2, 2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_qkv_shards_hold_whole_heads(tp: int, heads: int, kv_heads: int, bias: bool) -> None:
    dim, v_dim, hidden = 4, 6, 10
    whole = {
        "q": rand(heads * dim, hidden),
        "k": rand(kv_heads * dim, hidden, seed=1),
        "v": rand(kv_heads * v_dim, hidden, seed=2),
    }
    biases = {name: rand(w.shape[0], seed=7) for name, w in whole.items()}
    x = rand(3, hidden, seed=3)
    full = {n: F.linear(x, w, biases[n] if bias else None) for n, w in whole.items()}
    q_parts = []
    for rank, state in enumerate(ranks(tp)):
        layer = QKVParallelLinear(
            hidden, dim, heads, kv_heads, v_head_dim=v_dim, bias=bias, parallel=state, dtype=F32
        )
        for name, w in whole.items():
            layer.weight_loader("weight", w, name)
            if bias:
                layer.weight_loader("bias", biases[name], name)
        q, k, v = layer.split(layer(x))
        q_parts.append(q)
        per_rank = max(1, kv_heads // tp)
        first = rank * kv_heads // tp
        close(k, full["k"][:, first * dim : (first + per_rank) * dim])
        close(v, full["v"][:, first * v_dim : (first + per_rank) * v_dim])
        assert (layer.num_heads, layer.num_kv_heads) == (heads // tp, per_rank)
    close(torch.cat(q_parts, -1), full["q"])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_row_shards_sum_to_the_whole(tp: int, bias: bool) -> None:
    w, b, x = rand(5, 8), rand(5, seed=1), rand(3, 8, seed=2)
    sent, outs = [], []
    for rank, state in enumerate(ranks(tp)):
        layer = RowParallelLinear(8, 5, bias=bias, parallel=state, dtype=F32)
        layer.weight_loader("weight", w)
        if bias:
            layer.weight_loader("bias", b)
        outs.append(layer(x[:, rank * 8 // tp : (rank + 1) * 8 // tp]))
        sent += state.sent
    want = F.linear(x, w)
    if tp == 1:
        assert sent == []
        close(outs[0], want + b if bias else want)
    else:
        close(sum(sent[1:], sent[0]), want)
        # The bias comes after the sum, once.
        close(outs[0] - sent[0], b.expand(3, 5) if bias else torch.zeros(3, 5))


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_vocabulary_shards(tp: int) -> None:
    table, ids = rand(10, 4), torch.tensor([0, 9, 3, 4, 5, 9])
    hidden = rand(3, 4, seed=1)
    parts, logits = [], []
    for state in ranks(tp):
        embedding = VocabParallelEmbedding(10, 4, parallel=state, dtype=F32)
        embedding.weight_loader("weight", table)
        out = embedding(ids)
        parts.append(state.sent[-1] if tp > 1 else out)
        head = ParallelLMHead(10, 4, parallel=state, dtype=F32)
        head.weight_loader("weight", table)
        out = head(hidden)
        logits.append(state.sent[-1] if tp > 1 else out)
    close(sum(parts[1:], parts[0]), table[ids])
    close(torch.cat(logits, -1)[:, :10], hidden @ table.T)
    if tp == 3:
        assert (logits[2][:, 2:] == 0).all()  # 10 = 4 + 4 + 2: two padded rows


def test_tied_head_shares_the_rows() -> None:
    state = ParallelState()
    embedding = VocabParallelEmbedding(6, 4, parallel=state, dtype=F32)
    head = ParallelLMHead(6, 4, parallel=state, dtype=F32, tied_to=embedding)
    embedding.weight_loader("weight", rand(6, 4))
    assert head.weight is embedding.weight
    close(head(rand(2, 4, seed=1)), rand(2, 4, seed=1) @ rand(6, 4).T)


def test_loading_converts_the_dtype() -> None:
    layer = RowParallelLinear(4, 3, parallel=ParallelState(), dtype=torch.bfloat16)
    w = rand(3, 4)
    layer.weight_loader("weight", w)
    assert torch.equal(layer.weight, w.bfloat16())
    assert layer(rand(2, 4).bfloat16()).dtype is torch.bfloat16


def test_layers_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = QKVParallelLinear(8, 4, 2, 1, parallel=ParallelState(), dtype=F32)
    assert layer.weight.is_meta


single = ParallelState()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda: ColumnParallelLinear(6, 12, parallel=single, dtype=F32).weight_loader(
                "weight", rand(11, 6)
            ),
            "11 rows instead of 12",
        ),
        (
            lambda: ColumnParallelLinear(6, 12, parallel=single, dtype=F32).weight_loader(
                "weight", rand(12, 7)
            ),
            r"checkpoint has shape \(12, 7\), the model needs \(12, 6\)",
        ),
        (
            lambda: ColumnParallelLinear(6, 12, parallel=single, dtype=F32).weight_loader(
                "bias", rand(12)
            ),
            "has no parameter 'bias'",
        ),
        (
            lambda: MergedColumnParallelLinear(6, (4, 4), parallel=single, dtype=F32).weight_loader(
                "weight", rand(4, 6), 2
            ),
            "has no shard 2",
        ),
        (
            lambda: MergedColumnParallelLinear(6, (4, 4), parallel=single, dtype=F32).weight_loader(
                "weight", rand(5, 6), 0
            ),
            "has 5 rows, the model needs 4",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 2, 1, parallel=single, dtype=F32).weight_loader(
                "weight", rand(8, 8), "k"
            ),
            "weight of k: the checkpoint has 8 rows, the model needs 4",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 2, 1, parallel=single, dtype=F32).weight_loader(
                "weight", rand(8, 8), "o"
            ),
            "has no shard 'o'",
        ),
        (
            lambda: RowParallelLinear(8, 5, parallel=single, dtype=F32).weight_loader(
                "weight", rand(5, 9)
            ),
            "has 9 columns, the model needs 8",
        ),
        (
            lambda: VocabParallelEmbedding(8, 5, parallel=single, dtype=F32).weight_loader(
                "weight", rand(9, 5)
            ),
            r"shape \(9, 5\), the model needs \(8, 5\)",
        ),
    ],
)
def test_wrong_tensors_are_named(load: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ColumnParallelLinear(6, 9, parallel=ParallelState(0, 2), dtype=F32),
            r"output width \(9\)",
        ),
        (
            lambda: RowParallelLinear(9, 6, parallel=ParallelState(0, 2), dtype=F32),
            r"input width \(9\)",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 3, 1, parallel=ParallelState(0, 2), dtype=F32),
            r"attention heads \(3\)",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 6, 3, parallel=ParallelState(0, 2), dtype=F32),
            r"kv heads \(3\)",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 6, 2, parallel=ParallelState(0, 3), dtype=F32),
            "2 kv heads over 3 ranks",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
