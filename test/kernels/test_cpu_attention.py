"""Native attention against float64, at every level of instructions that this processor has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import (  # noqa: E402
    AttentionTables,
    Isa,
    KernelError,
    QueryBlocks,
    cpu_isa,
    paged_attention,
    read_sum,
)
from srt.crossed import crossed, mostly_slow  # noqa: E402

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (*FP8, torch.int8)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def packed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [*, D] in the type of a plane; of int8 [*, D + 4], the scale behind each head's bytes."""
    if dtype != torch.int8:
        return x.to(dtype)
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / scale).round().nan_to_num(0.0).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def unpacked(plane: torch.Tensor) -> torch.Tensor:
    if plane.dtype != torch.int8:
        return plane.double()
    scale = plane[..., -4:].contiguous().view(torch.float32)
    return plane[..., :-4].double() * scale.double()


@dataclass
class Problem:
    """Requests of (prefix, new) tokens over shuffled pages; unwritten slots hold NaN."""

    lengths: list[tuple[int, int]]
    kv_heads: int = 2
    group: int = 3
    dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # None: that of q
    window: int | None = None
    chunk: int | None = None
    cap: float = 0.0
    sinks: bool = False
    shuffled: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        self.scale = self.scale or self.dim**-0.5
        torch.manual_seed(len(self.lengths) + self.dim)
        counts = [-(-(a + b) // self.page_size) for a, b in self.lengths]
        order = np.arange(1, sum(counts) + 1)
        if self.shuffled:
            order = np.random.default_rng(1).permutation(order)
        pages = np.split(order.astype(np.int32), np.cumsum(counts)[:-1])
        self.tables = AttentionTables(pages, [0] * len(pages), self.page_size)
        shape = ((sum(counts) + 1) * self.page_size, self.kv_heads, self.dim)
        kv_dtype = self.kv_dtype or self.dtype
        k, v = packed(torch.full((2, *shape), float("nan")), kv_dtype).unbind()
        self.k, self.v = k, v
        if kv_dtype.itemsize == 1:  # torch indexes bytes, but not all that a byte may mean
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        self.slots = []
        for ids, (prefix, new) in zip(pages, self.lengths, strict=True):
            at = np.arange(prefix + new)
            slots = torch.from_numpy(
                ids[at // self.page_size] * self.page_size + at % self.page_size
            )
            k[slots] = packed(torch.randn(len(at), *shape[1:]), kv_dtype).view(k.dtype)
            v[slots] = packed(torch.randn(len(at), *shape[1:]), kv_dtype).view(v.dtype)
            self.slots.append(slots)
        news = np.array([new for _, new in self.lengths])
        self.heads = self.kv_heads * self.group
        self.q = torch.randn(int(news.sum()), self.heads, self.dim).to(self.dtype)
        self.blocks = QueryBlocks(
            np.cumsum(news) - news,
            news,
            np.array([prefix for prefix, _ in self.lengths]),
            np.arange(len(news)),
        )
        self.sink_scores = torch.randn(self.heads) + 1.0 if self.sinks else None

    def run(self, isa: Isa, num_threads: int) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.empty(self.q.shape[:2])
        out = paged_attention(
            self.q, self.k, self.v, self.tables, self.blocks, scale=self.scale,
            window=self.window, chunk=self.chunk, logit_cap=self.cap, sinks=self.sink_scores,
            lse=lse, num_threads=num_threads, isa=isa,
        )  # fmt: skip
        return out.double(), lse.double()

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses, row = [], [], 0
        for (prefix, new), slots in zip(self.lengths, self.slots, strict=True):
            k = unpacked(self.k)[slots].transpose(0, 1).repeat_interleave(self.group, 0)
            v = unpacked(self.v)[slots].transpose(0, 1).repeat_interleave(self.group, 0)
            q = self.q[row : row + new].double().transpose(0, 1)
            scores = q @ k.transpose(1, 2) * self.scale
            if self.cap:
                scores = self.cap * torch.tanh(scores / self.cap)
            at = torch.arange(prefix, prefix + new).unsqueeze(1)
            key = torch.arange(prefix + new)
            seen = key <= at
            if self.window:
                seen &= key > at - self.window
            if self.chunk:
                seen &= key >= at - at % self.chunk
            scores = scores.masked_fill(~seen, float("-inf"))
            if self.sink_scores is not None:
                sink = self.sink_scores.double().view(-1, 1, 1).expand(-1, new, 1)
                scores = torch.cat([scores, sink], 2)
            outs.append((scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1))
            lses.append(scores.logsumexp(-1).transpose(0, 1))
            row += new
        return torch.cat(outs), torch.cat(lses)


def check(problem: Problem) -> None:
    expected, expected_lse = problem.reference()
    for isa in LEVELS:
        # How work is shared out is the same code at every level.
        for num_threads in (1, 2) if isa == LEVELS[-1] else (1,):
            out, lse = problem.run(isa, num_threads)
            tolerance = TOLERANCE[problem.dtype]
            name = f"{isa.name}, {num_threads} threads"
            torch.testing.assert_close(
                out, expected, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
            # multiples of a scale are rounded to the 16 bits of q
            rounds = problem.kv_dtype == torch.int8 and problem.dtype == torch.bfloat16
            atol = 1e-2 if rounds else 1e-3
            torch.testing.assert_close(lse, expected_lse, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [16, 128])
def test_rows_of_latent_attention(group: int, dtype: torch.dtype) -> None:
    """One kv head of many query heads, whose values are its keys."""
    problem = Problem([(100, 1), (30, 9), (5, 1)], kv_heads=1, group=group, dim=576, dtype=dtype)
    problem.v = problem.k
    check(problem)


MIXED = [(300, 1), (0, 130), (64, 20), (63, 33), (0, 1), (127, 1)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_decode_and_extend_at_every_page_size(dtype: torch.dtype, page_size: int) -> None:
    check(Problem(MIXED, dtype=dtype, page_size=page_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256, 576])
def test_head_widths(dtype: torch.dtype, dim: int) -> None:
    check(Problem([(200, 1), (70, 40)], dim=dim, dtype=dtype))


@pytest.mark.parametrize("group", [1, 4, 5, 8, 17])
def test_query_heads_per_kv_head(group: int) -> None:
    check(Problem([(200, 1), (70, 21)], group=group, dtype=torch.bfloat16, kv_heads=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("window", "chunk"), [(1, None), (5, None), (100, None), (None, 1), (None, 40), (None, 128)]
)
def test_windows_and_chunks(
    dtype: torch.dtype, shuffled: bool, window: int | None, chunk: int | None
) -> None:
    check(Problem(MIXED, dtype=dtype, window=window, chunk=chunk, shuffled=shuffled, page_size=64))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sinks_and_soft_caps(dtype: torch.dtype) -> None:
    check(Problem(MIXED, dtype=dtype, sinks=True))
    check(Problem(MIXED, dtype=dtype, cap=2.0, window=70))


@pytest.mark.parametrize("kv_dtype", BYTES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128])
def test_keys_and_values_of_a_byte(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int) -> None:
    check(Problem(MIXED, dtype=dtype, kv_dtype=kv_dtype, dim=dim, group=4))


@pytest.mark.parametrize(("dtype", "kv_dtype"), crossed(list(TOLERANCE), BYTES))
def test_all_kinds_of_layers_over_a_byte(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    types = {"dtype": dtype, "kv_dtype": kv_dtype}
    for page_size in (1, 64):
        for window, chunk in ((5, None), (100, None), (None, 40)):
            check(Problem(MIXED, **types, window=window, chunk=chunk, page_size=page_size))
    check(Problem(MIXED, **types, sinks=True, group=1))
    check(Problem(MIXED, **types, cap=2.0, window=70, group=5))
    check(Problem([(6000, 1), (5000, 20)], **types, kv_heads=1, group=2, page_size=64))


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_number_of_a_byte(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """One key whose value is every finite code: attention gives it back as it is."""
    numbers = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    finite = torch.where(numbers.isfinite(), numbers, 0.0)
    planes = finite.to(kv_dtype).view(1, 1, 256)
    tables = AttentionTables([np.zeros(1, np.int32)], [0], 1)
    blocks = QueryBlocks(np.zeros(1), np.ones(1), np.zeros(1), np.zeros(1))
    q = torch.zeros(1, 1, 256, dtype=dtype)
    for isa in LEVELS:
        out = paged_attention(q, planes, planes, tables, blocks, scale=1.0, isa=isa)
        assert torch.equal(out.float().flatten(), finite)


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_code_of_a_byte(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """A block of equal values, of every code: infinities keep their sign, NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
    v = codes.view(torch.uint8).expand(64, 1, 256).contiguous().view(kv_dtype)
    k = torch.zeros_like(v.view(torch.uint8)).view(kv_dtype)
    tables = AttentionTables([np.zeros(1, np.int32)], [0], 64)
    blocks = QueryBlocks(np.zeros(1), np.ones(1), np.full(1, 63), np.zeros(1))
    q = torch.zeros(1, 1, 256, dtype=dtype)
    for isa in LEVELS:
        out = paged_attention(q, k, v, tables, blocks, scale=1.0, isa=isa)
        torch.testing.assert_close(
            out.float().flatten(), codes.float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_requests_are_split_over_keys(dtype: torch.dtype) -> None:
    check(Problem([(6000, 1), (200, 1)], dtype=dtype, kv_heads=1, group=2, page_size=64))
    check(Problem([(5000, 20)], dtype=dtype, kv_heads=1, group=2, page_size=64, sinks=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [32, 48, 96, 160, 256])
def test_prompts_of_every_width(dtype: torch.dtype, dim: int) -> None:
    check(Problem([(77, 131)], dim=dim, dtype=dtype, kv_heads=2, page_size=64))


@pytest.mark.parametrize("group", mostly_slow([3, 8], [1, 4]))
def test_long_prompts(group: int) -> None:
    lengths = [(0, 517), (1001, 389), (40, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        check(Problem(lengths, group=group, kv_heads=1, dtype=dtype, page_size=64))
        check(Problem(lengths, group=group, kv_heads=1, dtype=dtype, window=130, cap=3.0))
        check(Problem(lengths, group=group, kv_heads=1, dtype=dtype, chunk=200, sinks=True))


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_prompts_of_a_few_tokens(dtype: torch.dtype, group: int) -> None:
    """States that don't fill the registers, in any number; few enough are decoded side by side."""
    lengths = [(prefix, new) for prefix in (0, 61, 130) for new in range(1, 12)]
    check(Problem(lengths, group=group, dtype=dtype))
    check(Problem(lengths, group=group, dtype=dtype, window=20, page_size=64))
    check(Problem(lengths, group=group, dtype=dtype, chunk=70, sinks=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_scales(dtype: torch.dtype) -> None:
    check(Problem(MIXED, dtype=dtype, scale=-0.1))


def test_large_scores_do_not_overflow() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem([(500, 1), (90, 30)], dtype=dtype, page_size=64)
        problem.q *= 300.0
        expected, _ = problem.reference()
        for isa in LEVELS:
            out, _ = problem.run(isa, 2)
            assert torch.isfinite(out).all()
            atol = 2e-2 if dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(out, expected, rtol=0, atol=atol)


def test_a_visible_nan_shows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem([(200, 1), (200, 1)], dtype=dtype)
        problem.k[problem.slots[0][100]] = float("nan")
        for isa in LEVELS:
            out, _ = problem.run(isa, 1)
            assert out[0].isnan().all()
            assert not out[1].isnan().any()


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_visible_nan_of_a_byte_shows(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    for news in (1, 30):
        problem = Problem([(200, news), (200, news)], dtype=dtype, kv_dtype=kv_dtype)
        problem.v.view(torch.uint8)[problem.slots[0][100]] = 0xFF
        for isa in LEVELS:
            out, _ = problem.run(isa, 1)
            assert out[:news].isnan().all()
            assert not out[news:].isnan().any()


def test_a_nan_in_a_prompt_shows_from_its_token_on() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem([(90, 100)], dtype=dtype)
        problem.k[problem.slots[0][120]] = float("nan")
        for isa in LEVELS:
            out, _ = problem.run(isa, 1)
            assert not out[:30].isnan().any()
            assert out[30:].isnan().all()


@pytest.mark.parametrize("kv_dtype", [None, *FP8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_value_shows_only_to_those_who_see_it(
    dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    """A NaN or an infinity in V, within a block of which some queries see other keys."""
    for bad in (float("nan"), float("inf")):
        if kv_dtype is FP8[0] and bad == float("inf"):
            continue  # it has none
        for window, last in ((None, 190), (50, 170)):
            problem = Problem([(90, 100), (0, 7)], dtype=dtype, kv_dtype=kv_dtype, window=window)
            planes = problem.v.view(torch.uint8) if kv_dtype else problem.v
            at = problem.slots[0][120]
            want, _ = problem.reference()
            planes[at] = torch.full((64,), bad).to(kv_dtype or dtype).view(planes.dtype)
            for isa in LEVELS:
                out, _ = problem.run(isa, 1)
                assert not out[30 : last - 90].isfinite().any()
                hidden = [*range(30), *range(last - 90, 107)]
                torch.testing.assert_close(out[hidden], want[hidden], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("group", [1, 7, 17])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_value_before_the_window_stays_hidden(dtype: torch.dtype, group: int) -> None:
    """From single queries, in the block in which their window begins."""
    problem = Problem([(200, 1), (70, 1)], dtype=dtype, group=group, window=50)
    want, _ = problem.reference()
    problem.v[problem.slots[0][150]] = float("nan")  # the query at 200 sees 151 and what follows
    for isa in LEVELS:
        out, _ = problem.run(isa, 1)
        torch.testing.assert_close(out, want, rtol=0, atol=TOLERANCE[dtype])
    problem.v[problem.slots[0][151]] = float("nan")
    for isa in LEVELS:
        out, _ = problem.run(isa, 1)
        assert out[0].isnan().all()
        assert not out[1].isnan().any()


def test_slots_beyond_four_gib() -> None:
    """Offsets of 64 bits, on memory that is reserved and hardly touched."""
    dim, page = 64, 64
    num_slots = (5 << 30) // (dim * 2)
    memory = np.zeros(num_slots * dim, np.int16)
    k = torch.from_numpy(memory).view(torch.bfloat16).view(num_slots, 1, dim)
    last = num_slots // page - 1
    k[last * page :] = 1.0
    tables = AttentionTables([np.array([last], np.int32)], [0], page)
    blocks = QueryBlocks(np.zeros(1), np.ones(1), np.array([page - 1]), np.zeros(1))
    q = torch.ones(1, 2, dim, dtype=torch.bfloat16)
    for isa in LEVELS:
        out = paged_attention(q, k, k, tables, blocks, scale=1.0, isa=isa)
        assert out.eq(1.0).all()


def test_a_wrong_call_is_refused() -> None:
    problem = Problem([(10, 1)])
    q, k, v, tables, blocks = problem.q, problem.k, problem.v, problem.tables, problem.blocks
    with pytest.raises(KernelError, match="one dtype"):
        paged_attention(q, k.half(), v, tables, blocks, scale=1.0)
    with pytest.raises(KernelError, match="one of a byte"):
        paged_attention(q, k.to(FP8[0]), v.to(FP8[1]), tables, blocks, scale=1.0)
    with pytest.raises(KernelError, match="does not serve"):
        paged_attention(q.to(FP8[0]), k.to(FP8[0]), v.to(FP8[0]), tables, blocks, scale=1.0)
    with pytest.raises(KernelError, match="does not serve"):
        paged_attention(q[..., :24], k[..., :24], v[..., :24], tables, blocks, scale=1.0)
    with pytest.raises(KernelError, match="not both"):
        paged_attention(q, k, v, tables, blocks, scale=1.0, window=2, chunk=2)
    far = QueryBlocks(blocks.rows, blocks.counts, np.array([16]), blocks.requests)
    with pytest.raises(KernelError, match="outside its block table"):
        paged_attention(q, k, v, tables, far, scale=1.0)
    more = QueryBlocks(blocks.rows + 1, blocks.counts, blocks.positions, blocks.requests)
    with pytest.raises(KernelError, match="does not have"):
        paged_attention(q, k, v, tables, more, scale=1.0)
    with pytest.raises(KernelError, match="contiguous int32"):
        AttentionTables([np.arange(4)], [0], 16)
    with pytest.raises(KernelError, match="sinks must be"):
        paged_attention(q, k, v, tables, blocks, scale=1.0, sinks=torch.zeros(2))


def test_read_sum() -> None:
    data = torch.arange(1 << 20, dtype=torch.int32)
    assert read_sum(data, 3) == int(data.sum()) % (1 << 32)
    with pytest.raises(KernelError, match="64 bytes"):
        read_sum(data[:3], 1)
