"""A projection to q, k and v as one call of a tape: the very numbers of the calls it is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import (  # noqa: E402
    Arena,
    KVPlanes,
    Op,
    QuantizedWeight,
    Tape,
    angles,
    has_byte_dots,
    linear,
    record,
    rms_norm,
    rotate,
    widen,
)

QUERIES, KEYS, DIM, WIDTH, SLOTS = 6, 2, 64, 128, 40
Q, K = QUERIES * DIM, KEYS * DIM
OUTS = Q + 2 * K
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def quantized(weight: torch.Tensor) -> QuantizedWeight:
    blocks = weight.float().view(len(weight), -1, 32)
    scales = (blocks.abs().amax(-1) / 127).half()
    codes = (blocks / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(codes.view(weight.shape), scales)


class Layer:
    """The part of an attention layer up to its store, as models write it."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        rows: int = 3,
        normed: bool = False,
        turned: bool = True,
        bits: int = 0,
        interleaved: bool = False,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(rows)
        self.x = torch.randn(rows, WIDTH).to(dtype)
        self.weight = (torch.randn(OUTS, WIDTH) / 8).to(dtype)
        self.bias = torch.randn(OUTS).to(dtype)
        self.codes = quantized(self.weight) if bits else None
        self.norms = torch.rand(2, DIM).to(dtype) + 0.5 if normed else None
        self.turned, self.interleaved = turned, interleaved
        self.frequencies = torch.logspace(0, -3, DIM // 2, dtype=torch.float64)
        self.positions = torch.arange(rows) * 1000
        self.slots = torch.arange(rows) * 2 + 5
        width = DIM + 4 if kv_dtype == torch.int8 else DIM  # with a scale
        self.planes = torch.zeros(2, SLOTS, KEYS, width).to(kv_dtype or dtype)
        self.store = KVPlanes(*self.planes)

    def product(self, threads: int) -> torch.Tensor:
        if self.codes is None:
            return linear(self.x, self.weight, self.bias, num_threads=threads)
        rounds = self.x.dtype is not torch.float32 and has_byte_dots()
        return self.codes.multiply(self.x, self.bias, num_threads=threads, round_inputs=rounds)

    def turn(self, x: torch.Tensor, threads: int) -> torch.Tensor:
        if not self.turned:
            return x
        return rotate(x, *self.angles, interleaved=self.interleaved, num_threads=threads)

    def norm(self, x: torch.Tensor, i: int, threads: int) -> torch.Tensor:
        assert self.norms is not None
        heads = x.view(len(x), -1, DIM)
        normed, _ = rms_norm(heads, self.norms[i], 1e-5, num_threads=threads)
        return normed.view(len(x), -1)

    def run(self, threads: int) -> torch.Tensor:
        """The queries; K and V are stored."""
        rows = len(self.x)
        qkv = self.product(threads)
        self.angles = angles(self.positions, self.frequencies, interleaved=self.interleaved)
        v = qkv[:, Q + K :]
        if self.norms is None:
            both = self.turn(qkv[:, : Q + K], threads)
            q, k = both[:, :Q], both[:, Q:]
        else:
            q = self.turn(self.norm(qkv[:, :Q], 0, threads), threads)
            k = self.turn(self.norm(qkv[:, Q : Q + K], 1, threads), threads)
        self.store.store(
            self.slots, k.view(rows, KEYS, DIM), v.view(rows, KEYS, DIM), num_threads=threads
        )
        return widen(q)


def recorded(layer: Layer, threads: int) -> tuple[Tape, torch.Tensor]:
    tape = Tape(Arena(1 << 20))
    with record(tape):
        out = layer.run(threads)
    return tape, out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def check(layer: Layer, threads: int) -> None:
    tape, out = recorded(layer, threads)
    tape.fuse()
    assert tape.ops == [Op.ANGLES, Op.QKV, Op.WIDEN]
    for seed in range(3):
        torch.manual_seed(seed)
        layer.x.copy_(torch.randn(layer.x.shape))
        layer.positions.copy_(torch.randint(0, 100_000, layer.positions.shape))
        layer.slots.copy_(torch.randperm(SLOTS)[: len(layer.slots)])
        bits(layer.planes).zero_()
        tape.play(threads)
        queries, planes = out.clone(), bits(layer.planes).clone()
        bits(layer.planes).zero_()
        assert torch.equal(queries, layer.run(threads))
        assert torch.equal(planes, bits(layer.planes))
        assert planes.any()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_call_gives_the_same_bits(dtype: torch.dtype, normed: bool, threads: int) -> None:
    for rows in (1, 2, 5, 17):
        check(Layer(dtype, normed=normed, rows=rows), threads)
        check(Layer(dtype, normed=normed, rows=rows, bits=8), threads)
    check(Layer(dtype, normed=normed, interleaved=True), threads)


@pytest.mark.parametrize("kv_dtype", BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_into_planes_of_a_byte(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    for normed in (False, True):
        check(Layer(dtype, normed=normed, kv_dtype=kv_dtype), 2)


def test_layers_that_do_not_turn() -> None:
    layer = Layer(torch.bfloat16, turned=False, rows=4)
    tape, out = recorded(layer, 2)
    tape.fuse()
    assert tape.ops == [Op.ANGLES, Op.QKV, Op.WIDEN]
    tape.play(2)
    assert torch.equal(out, layer.run(2))


def _reads_a_norm(layer: Layer) -> None:
    qkv = layer.product(1)
    layer.angles = angles(layer.positions, layer.frequencies)
    normed = layer.norm(qkv[:, :Q], 0, 1)
    q, k = layer.turn(normed, 1), layer.turn(qkv[:, Q : Q + K], 1)
    layer.store.store(layer.slots, k.view(-1, KEYS, DIM), qkv[:, Q + K :].view(-1, KEYS, DIM))
    widen(q)
    widen(normed)


def _stores_other_keys(layer: Layer) -> None:
    qkv = layer.product(1)
    other = widen(qkv[:, :K])
    layer.store.store(layer.slots, other.view(-1, KEYS, DIM), qkv[:, Q + K :].view(-1, KEYS, DIM))


def _stores_keys_unturned(layer: Layer) -> None:
    qkv = layer.product(1)
    layer.angles = angles(layer.positions, layer.frequencies)
    layer.turn(qkv[:, : Q + K], 1)
    k, v = qkv[:, Q : Q + K], qkv[:, Q + K :]
    layer.store.store(layer.slots, k.view(-1, KEYS, DIM), v.view(-1, KEYS, DIM))


def _gives_its_input_back(layer: Layer) -> None:
    """The rotation's result stands where the product reads."""
    x = widen(layer.x)
    qkv = linear(x, layer.weight, layer.bias)
    layer.angles = angles(layer.positions, layer.frequencies)
    del x
    k = layer.turn(qkv[:, Q : Q + K], 1)
    layer.store.store(layer.slots, k.view(-1, KEYS, DIM), qkv[:, Q + K :].view(-1, KEYS, DIM))


def _gives_its_input_to_the_angles(layer: Layer) -> None:
    x = widen(layer.x)
    qkv = linear(x, layer.weight, layer.bias)
    del x
    layer.angles = angles(layer.positions, layer.frequencies)
    k = layer.turn(qkv[:, Q : Q + K], 1)
    layer.store.store(layer.slots, k.view(-1, KEYS, DIM), qkv[:, Q + K :].view(-1, KEYS, DIM))


@pytest.mark.parametrize(
    "compute",
    [
        _reads_a_norm,
        _stores_other_keys,
        _stores_keys_unturned,
        _gives_its_input_back,
        _gives_its_input_to_the_angles,
    ],
)
def test_what_would_not_be_the_same_is_left(compute: Callable[[Layer], None]) -> None:
    layer = Layer(torch.float32, normed=True)
    tape = Tape(Arena(1 << 20))
    with record(tape):
        compute(layer)
    before = list(tape.ops)
    tape.fuse()
    assert tape.ops == before
