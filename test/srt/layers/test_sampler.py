from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.layers.sampler import (
    Draw,
    Sampler,
    _choose,
    _choose_by_torch,
    _mix64,
    choose_token,
    uniform,
)
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.native import native_kernels
from srt.layers.sampler_cases import NO_IDS, V, logits_of, sample_one, spec_of


def naive_probs(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution as the module's text defines it, by a full stable sort in float64."""
    scaled = logits.double() / params.temperature
    p = scaled.softmax(-1).float().double().numpy()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    rank = np.arange(len(p))
    keep = before < params.top_p if params.top_p < 1 else np.ones(len(p), bool)
    if params.top_k > 0:
        keep &= rank < params.top_k
    keep &= p[order] >= params.min_p * p.max()
    out = np.zeros_like(p)
    out[order[keep]] = p[order[keep]]
    return out / out.sum()


# ---- greedy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_k=1)]
)
def test_greedy_takes_the_largest_and_the_lowest_id_of_equals(params: SamplingParams) -> None:
    logits = logits_of(0)
    assert sample_one(logits, params)[0] == int(logits.argmax())
    for ids in ([7, 30], [0, 49], [12, 13, 14]):
        tied = logits.clone()
        tied[ids] = 100.0
        assert sample_one(tied, params)[0] == ids[0]


def test_greedy_tie_in_a_large_vocabulary_and_batch() -> None:
    logits = torch.zeros(5, 49152)
    sampler = Sampler()
    for row in range(5):
        sampler.admit(row, SamplingParams(temperature=0.0), 0, NO_IDS, NO_IDS)
        logits[row, [1000 * row + 17, 40000]] = 3.0
    out = sampler.sample(logits, range(5), [0] * 5, [False] * 5, [None] * 5)
    assert out.token_ids.tolist() == [17, 1017, 2017, 3017, 4017]


def test_the_highest_that_a_step_found_counts_until_a_row_edits_its_logits() -> None:
    """It says token 3 here although token 7 is the highest: so it shows who looked."""
    plain = SamplingParams(temperature=0.0, stop_token_ids=(5,))
    biased = SamplingParams(temperature=0.0, logit_bias={11: 200.0})
    cases = (
        (plain, [False] * 2, [3, 3]),
        (plain, [False, True], [7, 7]),
        (biased, [False] * 2, [11, 11]),
        (SamplingParams(temperature=0.0, frequency_penalty=0.1), [False] * 2, [7, 7]),
    )
    for params, hides, expected in cases:
        sampler = Sampler()
        logits = torch.zeros(2, V)
        logits[:, 7] = 100.0
        found = (torch.full((2,), 100.0), torch.full((2,), 3))
        for row in range(2):
            sampler.admit(row, params, 0, NO_IDS, NO_IDS)
        out = sampler.sample(logits, [0, 1], [0] * 2, hides, [None] * 2, found)
        assert out.token_ids.tolist() == expected
        assert out.invalid_rows == ()
        found[1].zero_()  # as the next step does
        assert out.token_ids.tolist() == expected


def test_a_highest_that_is_no_number_is_looked_into() -> None:
    sampler = Sampler()
    sampler.admit(0, SamplingParams(temperature=0.0), 0, NO_IDS, NO_IDS)
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 2] = 100.0, float("nan")
    found = (torch.tensor([float("nan")]), torch.tensor([0]))
    out = sampler.sample(logits, [0], [0], [False], [None], found)
    assert out.token_ids.tolist() == [7]
    assert out.invalid_rows == (0,)


def test_log_probabilities_are_told_of_a_highest_that_is_known() -> None:
    sampler = Sampler()
    sampler.admit(0, SamplingParams(temperature=0.0), 0, NO_IDS, NO_IDS)
    logits = torch.zeros(1, V)
    logits[0, 7] = 100.0
    found = (torch.tensor([100.0]), torch.tensor([7]))
    out = sampler.sample(logits, [0], [0], [False], [spec_of(1)], found)
    assert out.token_ids.tolist() == [7]
    assert out.logprobs[0] is not None


# ---- random numbers ---------------------------------------------------------------------------


def test_splitmix64_sequence_is_the_published_one() -> None:
    # The first numbers of SplitMix64 from the state 1234567: a widely published test vector.
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    outs = [_mix64((1234567 + (i + 1) * golden) & mask) for i in range(3)]
    assert outs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_a_pure_function_of_seed_and_position() -> None:
    assert uniform(5, 10) == uniform(5, 10)
    values = {uniform(s, p) for s in (-3, 0, 1, 2, 1 << 62) for p in range(100)}
    assert len(values) == 500
    assert all(0.0 <= value < 1.0 for value in values)


@pytest.mark.parametrize("along", ["seed", "position", "diagonal"])
def test_uniform_numbers_are_spread_evenly(along: str) -> None:
    n, bins = 20_000, 64
    draws = np.array(
        [
            uniform(0, i) if along == "position" else uniform(i, 5 if along == "seed" else -i)
            for i in range(n)
        ]
    )
    counts = np.bincount((draws * bins).astype(int), minlength=bins)
    chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()
    assert chi2 < 120  # 63 degrees of freedom: mean 63, deviation 11
    pairs = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(pairs) < 4 / np.sqrt(n)


# ---- filters ----------------------------------------------------------------------------------

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 2, 5, 49, 50, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


@settings(deadline=None, max_examples=200)
@given(params=PARAMS, seed=st.integers(0, 1000), ties=st.booleans())
def test_every_number_picks_a_token_inside_the_filter(
    params: SamplingParams, seed: int, ties: bool
) -> None:
    logits = logits_of(seed)
    if ties:
        logits = logits.round()
    allowed = naive_probs(logits, params)
    probs = (logits / params.temperature).softmax(-1)
    numbers = [0.0, 1 - 2.0**-53, *np.linspace(0, 1, 50, endpoint=False).tolist()]
    chosen = {choose_token(probs, params, u) for u in numbers}
    if not params.greedy:
        assert all(allowed[token] > 0 for token in chosen)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=8),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    n, logits = 4000, logits_of(4)
    want = naive_probs(logits, params)
    sampler = Sampler()
    sampler.admit(0, params, 1234, NO_IDS, NO_IDS)
    counts = np.zeros(V)
    for position in range(n):
        out = sampler.sample(logits.clone().unsqueeze(0), [0], [position], [False], [None])
        counts[int(out.token_ids[0])] += 1
    assert counts[want == 0].sum() == 0
    likely = want * n >= 5
    rest = ~likely & (want > 0)
    observed = np.append(counts[likely], counts[rest].sum())
    expected = np.append(want[likely], want[rest].sum()) * n
    keep = expected > 0
    chi2 = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * max(degrees, 1))


def test_top_p_beyond_the_first_candidates_in_a_flat_distribution() -> None:
    # 20,000 equal tokens: the mass of 0.9 needs 18,000 of them, the lowest ids.
    probs = torch.full((20_000,), 1 / 20_000)
    params = SamplingParams(top_p=0.9)
    last = choose_token(probs, params, 1 - 2.0**-53)
    assert 17_990 <= last <= 18_010
    assert choose_token(probs, params, 0.0) == 0


def test_top_p_is_reached_exactly() -> None:
    probs = torch.tensor([0.25, 0.5, 0.25])
    numbers = [i / 16 for i in range(16)]
    for top_p, allowed in (
        (0.25, {1}),
        (0.5, {1}),
        (0.51, {0, 1}),
        (0.75, {0, 1}),
        (0.76, {0, 1, 2}),
    ):
        params = SamplingParams(top_p=top_p)
        assert {choose_token(probs, params, u) for u in numbers} == allowed


@pytest.mark.parametrize("v", [3, 1000, 49_152])
def test_the_last_number_picks_the_last_possible_token(v: int) -> None:
    for seed in range(20):
        probs = logits_of(seed, v).softmax(-1)
        probs[-2:] = 0.0
        assert choose_token(probs, SamplingParams(), 1 - 2.0**-53) == v - 3
        assert choose_token(probs, SamplingParams(), 0.0) == 0


def test_top_k_among_equals_takes_the_lowest_ids() -> None:
    probs = torch.full((1000,), 1 / 1000)
    params = SamplingParams(top_k=3)
    assert {choose_token(probs, params, u) for u in (0.0, 0.2, 0.4, 0.6, 0.99)} == {0, 1, 2}


def test_without_top_p_rounding_cuts_no_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(49_152, generator=generator).softmax(-1)
    assert float(probs.double().sum()) != 1.0
    assert choose_token(torch.tensor([1e-8, 1.0, 1e-8]), SamplingParams(top_k=2), 1 - 2.0**-53) == 0
    params = SamplingParams(top_k=49_000)
    seen = choose_token(probs, params, 1 - 2.0**-53)
    order = np.argsort(-probs.numpy(), kind="stable")
    assert seen == order[48_999]


# ---- independence of the batch ----------------------------------------------------------------


def test_a_row_gets_the_same_token_in_any_batch() -> None:
    choices = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9),
        SamplingParams(top_p=0.7, repetition_penalty=1.3),
        SamplingParams(top_k=20, frequency_penalty=0.4),
        SamplingParams(min_p=0.05, logit_bias={3: 4.0}),
    ]
    alone = []
    for i, params in enumerate(choices):
        tokens = []
        sampler = Sampler()
        sampler.admit(i, params, i, np.array([1, 2, 2], np.int32), NO_IDS)
        for position in range(20):
            logits = logits_of(100 * i + position, 3000).unsqueeze(0)
            out = sampler.sample(logits, [i], [position], [False], [spec_of(2)])
            tokens.append((int(out.token_ids[0]), out.logprobs[0]))
        alone.append(tokens)
    together = Sampler()
    for i, params in enumerate(choices):
        together.admit(i, params, i, np.array([1, 2, 2], np.int32), NO_IDS)
    rng = np.random.default_rng(0)
    for position in range(20):
        order = rng.permutation(len(choices)).tolist()
        logits = torch.stack([logits_of(100 * i + position, 3000) for i in order])
        out = together.sample(logits, order, [position] * 5, [False] * 5, [spec_of(2)] * 5)
        for at, i in enumerate(order):
            assert (int(out.token_ids[at]), out.logprobs[at]) == alone[i][position]


def test_readmission_with_the_output_so_far_continues_as_if_nothing_happened() -> None:
    params = SamplingParams(temperature=0.8, frequency_penalty=0.7, repetition_penalty=1.2)
    prompt = np.array([4, 5, 5, 9], np.int32)

    def run(retract_at: int | None) -> list[int]:
        sampler, output = Sampler(), []
        sampler.admit(0, params, 7, prompt, NO_IDS)
        for step in range(15):
            if step == retract_at:
                sampler.drop(0)
                sampler.admit(2, params, 7, prompt, np.array(output, np.int32))
            row = 2 if retract_at is not None and step >= retract_at else 0
            logits = logits_of(step).unsqueeze(0)
            out = sampler.sample(logits, [row], [4 + step], [False], [None])
            output.append(int(out.token_ids[0]))
        return output

    assert run(6) == run(None)


# ---- log probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_of_the_sampled_token(temperature: float) -> None:
    logits = logits_of(2)
    params = SamplingParams(temperature=temperature, top_k=5)
    token, arrays = sample_one(logits, params, spec=spec_of(4, (11, 0)))
    want = (logits.double() / (temperature or 1.0)).log_softmax(-1)
    assert arrays is not None
    assert arrays.num_rows == 1
    assert np.frombuffer(arrays.token_ids, "<i4").tolist() == [token]
    own = np.frombuffer(arrays.logprobs, "<f4")
    np.testing.assert_allclose(own, [want[token]], atol=1e-5)
    order = want.argsort(descending=True)[:4]
    assert np.frombuffer(arrays.top_ids, "<i4").tolist() == order.tolist()
    np.testing.assert_allclose(np.frombuffer(arrays.top_logprobs, "<f4"), want[order], atol=1e-5)
    assert np.frombuffer(arrays.picked_ids, "<i4").tolist() == [11, 0]
    np.testing.assert_allclose(
        np.frombuffer(arrays.picked_logprobs, "<f4"), want[[11, 0]], atol=1e-5
    )


def test_no_logprobs_unless_asked() -> None:
    quiet = LogprobSpec(0, NO_IDS, False, 0, NO_IDS)
    assert sample_one(logits_of(0), SamplingParams(), spec=quiet)[1] is None


# ---- broken logits ----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)])
@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ([NAN, 1.0, -40.0, NAN], {1}),
        ([NAN] * 4, {0, 1, 2, 3}),
        ([-INF] * 4, {0, 1, 2, 3}),
        ([-INF, NAN, -INF, 5.0], {3}),
        ([1.0, INF, 0.0, -INF], {1}),
        ([INF, INF, 0.0, NAN], {0, 1}),
    ],
)
def test_broken_logits_never_crash(
    params: SamplingParams, values: list[float], allowed: set[int]
) -> None:
    sampler = Sampler()
    sampler.admit(0, params, 0, NO_IDS, NO_IDS)
    sampler.admit(1, params, 0, NO_IDS, NO_IDS)
    healthy = [0.0, 0.0, 50.0, 0.0]
    for position in range(10):
        logits = torch.tensor([values, healthy])
        out = sampler.sample(logits, [0, 1], [position] * 2, [False] * 2, [spec_of(1)] * 2)
        assert int(out.token_ids[0]) in allowed
        assert int(out.token_ids[1]) == 2
        assert out.invalid_rows == (0,)
        own = np.frombuffer(out.logprobs[0].logprobs, "<f4")
        assert np.isfinite(own).all()


def test_a_row_of_minus_infinity_but_one_is_healthy() -> None:
    logits = torch.full((V,), -INF)
    logits[17] = 0.0
    sampler = Sampler()
    sampler.admit(0, SamplingParams(), 0, NO_IDS, NO_IDS)
    out = sampler.sample(logits.unsqueeze(0), [0], [0], [False], [None])
    assert out.token_ids.tolist() == [17]
    assert out.invalid_rows == ()


def test_tiny_and_huge_temperature() -> None:
    logits = logits_of(3)
    best = int(logits.argmax())
    cold = SamplingParams(temperature=1.1e-6)
    assert all(sample_one(logits, cold, position=p)[0] == best for p in range(20))
    hot = SamplingParams(temperature=1e30)
    assert len({sample_one(logits, hot, position=p)[0] for p in range(200)}) > 35


# ---- rows -------------------------------------------------------------------------------------


def test_unknown_row_is_a_bug_and_dropping_one_is_not() -> None:
    sampler = Sampler()
    sampler.drop(5)
    with pytest.raises(InvariantError, match="row 5"):
        sampler.sample(torch.zeros(1, V), [5], [0], [False], [None])
    assert sampler.sample(torch.zeros(0, V), [], [], [], []).token_ids.tolist() == []


def test_all_random_rows_of_a_block_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams()

    def run() -> list[int]:
        sampler = Sampler()
        for row in range(7):
            sampler.admit(row, params, row, NO_IDS, NO_IDS)
        logits = torch.stack([logits_of(row) for row in range(7)])
        out = sampler.sample(logits, range(7), [0] * 7, [False] * 7, [None] * 7)
        return out.token_ids.tolist()

    whole = run()
    monkeypatch.setattr("sglang.srt.layers.sampler._BLOCK_BYTES", 4 * V * 2)
    assert run() == whole


def test_native_draws_are_those_of_pytorch() -> None:
    if native_kernels() is None:
        pytest.skip("no native kernels")
    filters = [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(top_p=0.95),
        SamplingParams(temperature=1.5, min_p=0.02),
    ]
    n, v = 200, 3000
    logits = torch.randn(n + 1, v, generator=torch.Generator().manual_seed(3)) * 3
    draws = [Draw(row, filters[row % 4], uniform(row, 7)) for row in range(n)]
    best, greedy = logits.max(-1)
    found, wanted = greedy.clone(), greedy.clone()
    _choose(logits, best, found, draws)
    _choose_by_torch(logits, best, wanted, draws)
    assert torch.equal(found, wanted)
    assert int((found != greedy).sum()) > n // 2
    assert found[n] == greedy[n]
