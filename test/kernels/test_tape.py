"""Tapes: played again they compute what the wrappers would, from what stands in memory then."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import (  # noqa: E402
    Arena,
    AttentionTables,
    KernelError,
    KVPlanes,
    NotRecorded,
    Op,
    QueryBlocks,
    Tape,
    angles,
    gather,
    is_recording,
    linear,
    paged_attention,
    record,
    rms_norm,
    rotate,
    silu_and_mul,
    widen,
)

ROWS, HEADS, DIM, PAGE = 3, 4, 32, 16
WIDTH = HEADS * DIM


class Layer:
    """A small decoder layer of native calls alone, and what a step writes and reads."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(50, WIDTH, generator=generator)
        self.norm = torch.rand(WIDTH, generator=generator)
        self.qkv = torch.randn(3 * WIDTH, WIDTH, generator=generator) / 10
        self.up = torch.randn(2 * WIDTH, WIDTH, generator=generator) / 10
        self.frequencies = torch.logspace(0, -4, DIM // 2, dtype=torch.float64)
        self.k, self.v = torch.randn(2, 20 * PAGE, HEADS, DIM, generator=generator)
        self.planes = KVPlanes(self.k, self.v)
        self.ids, self.positions, self.slots = torch.zeros(3, ROWS, dtype=torch.int64)
        pages = [np.array([1 + 5 * i, 3 + 5 * i], np.int32) for i in range(ROWS)]
        self.tables = AttentionTables(pages, [0] * ROWS, PAGE)
        ones = np.ones(ROWS, np.int64)
        self.blocks = QueryBlocks(np.arange(ROWS), ones, 0 * ones, np.arange(ROWS))

    def set_step(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.ids[:] = torch.from_numpy(rng.integers(0, 50, ROWS))
        positions = rng.integers(0, 2 * PAGE, ROWS)
        self.positions[:] = torch.from_numpy(positions)
        self.blocks.positions[:] = positions
        pages = np.array_split(rng.permutation(20).astype(np.int32)[: 2 * ROWS], ROWS)
        self.tables.renew(pages, [0] * ROWS)
        slots = [ids[p // PAGE] * PAGE + p % PAGE for ids, p in zip(pages, positions, strict=True)]
        self.slots[:] = torch.tensor(slots)

    def run(self, num_threads: int = 2) -> torch.Tensor:
        x = gather(self.table, self.ids)
        x, residual = rms_norm(x, self.norm, 1e-5, keep=True)
        qkv = linear(x, self.qkv, num_threads=num_threads)
        cos, sin = angles(self.positions, self.frequencies)
        turned = rotate(qkv[:, : 2 * WIDTH], cos, sin, num_threads=num_threads)
        q, k, v = (
            part.view(ROWS, HEADS, DIM)
            for part in (turned[:, :WIDTH], turned[:, WIDTH:], qkv[:, 2 * WIDTH :])
        )
        self.planes.store(self.slots, k, v, num_threads=num_threads)
        out = paged_attention(
            q, self.k, self.v, self.tables, self.blocks, scale=0.2, num_threads=num_threads
        )
        x, _ = rms_norm(out.flatten(1), self.norm, 1e-5, residual, num_threads=num_threads)
        return widen(silu_and_mul(linear(x, self.up, num_threads=num_threads)))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_tape_follows_what_its_inputs_become(num_threads: int) -> None:
    layer, tape = Layer(), Tape(Arena(1 << 20))
    layer.set_step(0)
    with record(tape):
        assert is_recording()
        out = layer.run(num_threads)
    assert not is_recording()
    assert torch.equal(out, layer.run(num_threads))
    for seed in range(1, 20):
        layer.set_step(seed)
        tape.play(num_threads)
        played, keys = out.clone(), layer.k.clone()
        torch.testing.assert_close(played, layer.run(num_threads), rtol=0, atol=0)
        assert torch.equal(keys, layer.k)


def test_what_each_call_took() -> None:
    layer, tape = Layer(), Tape(Arena(1 << 20))
    layer.set_step(1)
    with record(tape):
        layer.run()
    times = tape.times(2)
    assert [op for op, _ in times] == tape.ops
    assert tape.ops[0] is Op.GATHER
    assert tape.ops.count(Op.LINEAR) == 2
    assert len(tape) == 11
    assert all(seconds > 0 for _, seconds in times)


def test_memory_is_used_again_once_nobody_reads_it() -> None:
    arena = Arena(1 << 16)
    weight = torch.rand(64)
    x = torch.randn(4, 64)
    places = set()
    with record(Tape(arena)):
        for _ in range(100):  # 100 results of 1 KiB in room for 64
            x, _ = rms_norm(x, weight, 1e-5)
            places.add(x.data_ptr())
    assert len(places) <= 3
    assert arena.holds(x)
    kept = x.view(2, 128)
    del x
    gc.collect()
    assert not any(arena.empty((64,), torch.float32).data_ptr() == kept.data_ptr() for _ in "ab")


def test_an_arena_says_when_it_is_full() -> None:
    arena = Arena(4096)
    held = [arena.empty((3,), torch.float32) for _ in range(64)]
    assert len({one.data_ptr() for one in held}) == 64
    assert all(one.data_ptr() % 64 == 0 for one in held)
    with pytest.raises(NotRecorded, match="no room for 64 bytes"):
        arena.empty((1,), torch.uint8)
    del held[10:20]
    assert arena.empty((160,), torch.float32).shape == (160,)  # the ten joined


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: x.double(),
        lambda x: x[:, :5].reshape(-1),  # a copy
        lambda x: x[:, ::2].contiguous(),
        lambda x: x.add_(1),
        lambda x: int(x.sum()),
        lambda x: x[0, 0].item(),
        lambda x: torch.cat([x, x]),
        lambda x: torch.zeros(3),
        lambda x: x[torch.tensor([1, 0])],
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_other_computations_are_refused(compute: object, inference: bool) -> None:
    x = torch.randn(4, 8)
    with torch.inference_mode(inference):
        with pytest.raises(NotRecorded, match="is no native call"), record(Tape(Arena(4096))):
            compute(x)  # type: ignore[operator]
        assert not is_recording()


def test_views_are_no_computation() -> None:
    x = torch.randn(4, 8)
    with torch.inference_mode(), record(Tape(Arena(4096))):
        q, k = torch.split(x, [6, 2], dim=1)
        assert q.view(4, 2, 3).flatten(1).shape == (4, 6)
        assert x.to(torch.float32).contiguous() is x
        assert k.unsqueeze(1)[1:3].shape == (2, 1, 2)


def test_one_tape_is_recorded_at_a_time_by_a_thread() -> None:
    arena = Arena(4096)
    with record(Tape(arena)), pytest.raises(NotRecorded, match="already"), record(Tape(arena)):
        pass
    assert not is_recording()


def test_a_call_that_is_not_served_is_named() -> None:
    layer, tape = Layer(), Tape(Arena(1 << 20))
    layer.set_step(1)
    with record(tape):
        layer.run()
    tape._calls[2].dtype = 77  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match="call 2 of a tape, LINEAR"):
        tape.play(2)


def test_tables_renewed_are_checked_again() -> None:
    layer = Layer()
    layer.set_step(1)
    layer.run()
    pages = [np.array([1, 2], np.int32)] * ROWS
    layer.blocks.positions[1] = 2 * PAGE
    with pytest.raises(KernelError, match="outside its block table"):
        layer.tables.renew(pages, [0] * ROWS)
    with pytest.raises(KernelError, match="outside its block table"):
        layer.tables.check_again()
    layer.blocks.positions[1] = PAGE
    layer.tables.check_again()
    with pytest.raises(KernelError, match="2 tables instead of 3"):
        layer.tables.renew(pages[:2], [0, 0])


def test_two_threads_play_their_own_tapes() -> None:
    """One of them leads the team, the other does without: both get their results."""
    layers = [Layer() for _ in range(2)]
    tapes, outs, wants = [], [], []
    for i, layer in enumerate(layers):
        layer.set_step(40 + i)
        tape = Tape(Arena(1 << 20))
        with record(tape):
            outs.append(layer.run(3))
        tapes.append(tape)
        wants.append(outs[-1].clone())
        outs[-1].zero_()
    wrong = []

    def work(i: int) -> None:
        for _ in range(300):
            tapes[i].play(3)
            if not torch.equal(outs[i], wants[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch, sgl_kernel\n"
        "x = torch.ones(2, 64, dtype=torch.bfloat16)\n"
        "tape = sgl_kernel.Tape(sgl_kernel.Arena(1 << 20))\n"
        "with sgl_kernel.record(tape):\n"
        "    sgl_kernel.widen(x.view(1, 128), num_threads=1)\n"
        "assert len(tape) == 1\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
