from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention import merge
from sglang.srt.layers.attention.merge import (
    PartialSum,
    apply_sinks,
    band_mask,
    merge_partials,
    partial_attention,
)

G, J, D = 2, 3, 16


def tensors(m: int, n: int, e: int = D, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    shapes = ((m, G, J, D), (n, G, D), (n, G, e))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, M, J, E] and [G, M, J] in float64."""
    scores = torch.einsum("mgjd,ngd->gmjn", q.double(), k.double()) * 0.25
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores + mask.double().unsqueeze(1)
    return torch.einsum("gmjn,nge->gmje", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("n", [1, 7, 600])
def test_unmasked_part(m: int, n: int) -> None:
    q, k, v = tensors(m, n)
    out, lse = partial_attention(q, k, v, 0.25)
    want, want_lse = reference(q, k, v)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("m", [2, 33, 600])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_causal_part(m: int, cap: float) -> None:
    q, k, v = tensors(m, m)
    out, lse = partial_attention(q, k, v, 0.25, causal=True, logit_cap=cap)
    want, want_lse = reference(q, k, v, band_mask(m, m, 0, None, q.device), cap)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("m", "n", "offset", "window"), [(40, 39, 63, 64), (700, 1400, 699, 700)])
def test_band_part_says_minus_infinity_where_nothing_is_seen(
    m: int, n: int, offset: int, window: int
) -> None:
    q, k, v = tensors(m, n)
    mask = band_mask(m, n, offset, window, q.device)
    blind = torch.isneginf(mask).all(-1)
    out, lse = partial_attention(q, k, v, 0.25, mask=mask)
    want, want_lse = reference(q, k, v, mask)
    assert torch.isneginf(lse[:, blind]).all()
    assert not torch.isnan(out).any()
    torch.testing.assert_close(out[:, ~blind].double(), want[:, ~blind], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[:, ~blind].double(), want_lse[:, ~blind], rtol=0, atol=2e-6)
    if m == 40:
        assert blind.nonzero().flatten().tolist() == [39]


def test_value_width_may_differ_and_dense_band_matches() -> None:
    q, k, v = tensors(9, 8, e=24)
    mask = band_mask(9, 8, 9, 10, q.device)
    out, lse = partial_attention(q, k, v, 0.25, mask=mask)
    want, _ = reference(q, k, v, mask)
    blind = torch.isneginf(mask).all(-1)
    assert blind.any()
    assert out.shape == (G, 9, J, 24)
    torch.testing.assert_close(out[:, ~blind].double(), want[:, ~blind], rtol=0, atol=2e-6)
    assert torch.isneginf(lse[:, blind]).all()
    assert (out[:, blind] == 0).all()


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 59), max_size=8), data=st.randoms(use_true_random=False))
def test_any_cut_in_any_order_merges_to_the_whole(cuts: list[int], data: object) -> None:
    q, k, v = tensors(3, 60)
    edges = sorted({0, 60, *cuts})
    parts = [partial_attention(q, k[a:b], v[a:b], 0.25) for a, b in itertools.pairwise(edges)]
    data.shuffle(parts)  # type: ignore[attr-defined]
    out, lse = merge_partials(parts)
    want, want_lse = reference(q, k, v)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-6)


def test_parts_that_see_nothing_count_nothing() -> None:
    q, k, v = tensors(2, 5)
    part = partial_attention(q, k, v, 0.25)
    nothing = (torch.full_like(part[0], 7.0), torch.full_like(part[1], float("-inf")))
    out, lse = merge_partials([nothing, part, nothing])
    assert torch.equal(out, part[0])
    assert torch.equal(lse, part[1])
    out, lse = merge_partials([nothing, nothing])
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


def test_many_bf16_parts_stay_as_exact_as_one_rounding() -> None:
    # 1,280 parts of two keys; merged one after another in bf16 this loses a third of the value.
    q, k, v = tensors(1, 2560, dtype=torch.bfloat16)
    want, _ = reference(q, k, v)
    total = PartialSum(pending_bytes=1000)
    for start in range(0, 2560, 2):
        total.add(partial_attention(q, k[start : start + 2], v[start : start + 2], 0.25))
    out, _ = total.result()
    assert out.dtype is torch.float32
    assert (out.double() - want).abs().max() < 1e-2 * want.abs().mean()


def by_head(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, M, J, E] and [G, M, J] as layers have them: copies [M, G * J, E] and [M, G * J]."""
    rows = out.transpose(0, 1).reshape(out.shape[1], G * J, -1)
    return rows.float().clone(), lse.transpose(0, 1).reshape(lse.shape[1], G * J).float().clone()


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 59), max_size=20), pending=st.sampled_from([1, 1 << 20]))
def test_a_sink_counts_once_however_many_parts_there_are(cuts: list[int], pending: int) -> None:
    """The reference has one more key, whose value is zero, at the end of a float64 softmax."""
    q, k, v = tensors(3, 60)
    sinks = torch.tensor([float("-inf"), -2.0, 1.0, 4.0, 6.0, 80.0])  # no share to all of it
    scores = torch.einsum("mgjd,ngd->mgjn", q.double(), k.double()).flatten(1, 2) * 0.25
    joined = torch.cat((scores, sinks.double().view(1, -1, 1).expand(3, -1, 1)), -1)
    weights = joined.softmax(-1)[..., :-1].view(3, G, J, -1)
    want = torch.einsum("mgjn,nge->mgje", weights, v.double()).flatten(1, 2)
    total = PartialSum(pending)
    for a, b in itertools.pairwise(sorted({0, 60, *cuts})):
        total.add(partial_attention(q, k[a:b], v[a:b], 0.25))
    out, lse = by_head(*total.result())
    apply_sinks(out, lse, sinks)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    apply_sinks(out, lse, sinks)  # twice is far off wherever the sink has a share
    assert (out.double() - want)[:, 1:5].abs().amax((0, 2)).gt(1e-4).all()


def test_a_sink_alone_takes_everything() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), float("-inf"))
    apply_sinks(out, lse, torch.tensor([-5.0, 0.0, 5.0]))
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("pending", "dtype", "atol"),
    [
        (16 << 20, torch.float32, 2e-5),
        (1, torch.float32, 2e-4),  # merged one by one: the output is rounded with every part
        (16 << 20, torch.bfloat16, 1e-2),
        (1, torch.bfloat16, 1e-2),
    ],
)
@pytest.mark.parametrize("length", [1_000_000, 4_000_000, 10_000_000])
def test_millions_of_positions(length: int, pending: int, dtype: torch.dtype, atol: float) -> None:
    """Parts over slices of the same few keys, again and again, and one needle among them.

    The exact answer is a sum over the few keys, each weighted by how often it was seen.
    """
    few, generator = 4096, torch.Generator().manual_seed(length)
    q, k, v = tensors(1, few + 1, dtype=dtype)
    v += 1.0  # what averages to nothing would show no error
    k[-1] = q[0].float().mean(1) * 4.0
    score = torch.einsum("mgjd,gd->mgj", q.double(), k[-1].double()).min() * 0.25
    # the needle weighs about as much as all the rest together
    k[-1] = k[-1].float() * float(torch.tensor(length).log() / score)
    counts = torch.zeros(few + 1, dtype=torch.float64)
    counts[-1] = 1
    slices = torch.randint(few, (40, 2), generator=generator).sort(1).values.tolist()
    parts = [(a, b, partial_attention(q, k[a:b], v[a:b], 0.25)) for a, b in slices if a < b]
    total, left, number = PartialSum(pending), length - 1, 0
    while left:
        a, b, part = parts[number % len(parts)]
        if b - a > left:
            a, b = 0, left if left <= few else few
            part = partial_attention(q, k[a:b], v[a:b], 0.25)
        total.add(part)
        counts[a:b] += 1
        left, number = left - (b - a), number + 1
        if number == 100:
            total.add(partial_attention(q, k[-1:], v[-1:], 0.25))
    assert number > length // few
    assert counts.sum() == length
    scores = torch.einsum("mgjd,ngd->gmjn", q.double(), k.double()) * 0.25 + counts.log()
    want = torch.einsum("gmjn,nge->gmje", scores.softmax(-1), v.double())
    share = scores.softmax(-1)[..., -1]
    assert share.max() > 0.2
    out, lse = total.result()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=4e-6)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    rows, sums = by_head(out, lse)
    sinks = torch.linspace(-4.0, 4.0, G * J) + scores.logsumexp(-1).mean().float()
    exact, exact_lse = want.transpose(0, 1).flatten(1, 2), scores.logsumexp(-1).transpose(0, 1)
    apply_sinks(rows, sums, sinks)
    kept = torch.sigmoid(exact_lse.flatten(1) - sinks.double()).unsqueeze(-1)
    torch.testing.assert_close(rows.double(), exact * kept, rtol=0, atol=atol)


def test_partial_sum_holds_a_bounded_number_of_parts() -> None:
    q, k, v = tensors(4, 64)
    total = PartialSum(pending_bytes=5 * 4 * G * J * D * 4)
    held = []
    for start in range(0, 64, 4):
        total.add(partial_attention(q, k[start : start + 4], v[start : start + 4], 0.25))
        held.append(len(total._parts))
    assert max(held) <= 6
    want, _ = reference(q, k, v)
    torch.testing.assert_close(total.result()[0].double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shown", ["all", "causal", "band"])
def test_parts_of_types_that_the_processor_lacks(
    dtype: torch.dtype, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "cpu_multiplies", lambda kind: kind is torch.float32)
    monkeypatch.setattr(merge, "_WIDENED_KEYS", 64)
    m, n = (90, 90) if shown == "causal" else (40, 200)
    q, k, v = tensors(m, n, dtype=dtype)
    visible = band_mask(m, n, n - m, 50, q.device)
    if shown == "all":
        out, lse = partial_attention(q, k, v, 0.25)
        want, want_lse = reference(q, k, v)
    elif shown == "causal":
        out, lse = partial_attention(q, k, v, 0.25, causal=True)
        want, want_lse = reference(q, k, v, band_mask(m, m, 0, None, q.device))
    else:
        out, lse = partial_attention(q, k, v, 0.25, mask=visible)
        want, want_lse = reference(q, k, v, visible)
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), want, rtol=1.01 * unit, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-6)
