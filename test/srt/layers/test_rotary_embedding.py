from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sglang.srt.configs.rope_config import RopeConfig, rope_config_from_hf
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope, inverse_frequencies

DIM, HEADS, KV_HEADS, TRAINED = 64, 4, 2, 4096

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": YARN,
    "yarn_mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn_one_mscale": {**YARN, "mscale": 0.9},
    "yarn_attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn_untruncated": {**YARN, "truncate": False},
    "yarn_betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
}


def theirs(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=TRAINED,
        rope_parameters=dict(fields),
    )


def ours(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> RotaryEmbedding:
    rope = rope_config_from_hf({"rope_parameters": fields}, max_position_embeddings=TRAINED)
    return get_rope(DIM, rope, TRAINED, dtype)


def random_qk(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, HEADS * DIM, generator=generator)
    return q, torch.randn(tokens, KV_HEADS * DIM, generator=generator)


def rotated_by_transformers(
    module: LlamaRotaryEmbedding, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = len(positions)
    cos, sin = module(q, positions.unsqueeze(0))
    heads_q = q.view(1, tokens, HEADS, DIM).transpose(1, 2)
    heads_k = k.view(1, tokens, KV_HEADS, DIM).transpose(1, 2)
    out_q, out_k = apply_rotary_pos_emb(heads_q, heads_k, cos, sin)
    return out_q.transpose(1, 2).reshape(q.shape), out_k.transpose(1, 2).reshape(k.shape)


@pytest.mark.parametrize("name", [n for n in SCALINGS if n not in ("default", "dynamic")])
def test_frequencies_equal_transformers(name: str) -> None:
    fields = SCALINGS[name]
    want, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](theirs(fields), torch.device("cpu"))
    rope = ours(fields)
    got = inverse_frequencies(DIM, rope.rope)
    # transformers computes in float32: equal to its rounding, 5e-7 of each value.
    np.testing.assert_allclose(got.numpy(), want.double().numpy(), rtol=5e-7)
    assert rope.rope.attention_scaling == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_equals_transformers_within_the_trained_length(name: str) -> None:
    fields = SCALINGS[name]
    positions = torch.tensor([0, 1, 2, 17, 100, 999])
    q, k = random_qk(len(positions))
    want_q, want_k = rotated_by_transformers(LlamaRotaryEmbedding(theirs(fields)), positions, q, k)
    got_q, got_k = ours(fields)(positions, q, k)
    # float32 angles near 1,000 are off by 6e-5; ours are not.
    torch.testing.assert_close(got_q, want_q, rtol=0, atol=5e-4)
    torch.testing.assert_close(got_k, want_k, rtol=0, atol=5e-4)
    early = positions < 10
    torch.testing.assert_close(got_q[early], want_q[early], rtol=0, atol=5e-6)


@pytest.mark.parametrize("length", [TRAINED + 1, 9000, 20000])
def test_dynamic_base_of_a_token_beyond_the_trained_length(length: int) -> None:
    fields = SCALINGS["dynamic"]
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs(fields), torch.device("cpu"), seq_len=length)
    angles = ours(fields).angles(torch.tensor([length - 1]))
    np.testing.assert_allclose(angles[0] / (length - 1), want.double().numpy(), rtol=5e-7)


def test_dynamic_decode_beyond_the_trained_length_equals_transformers() -> None:
    # transformers sees one new token a step, each with the base of the length it brings.
    fields = SCALINGS["dynamic"]
    module, rope = LlamaRotaryEmbedding(theirs(fields)), ours(fields)
    for position in (TRAINED - 1, TRAINED, TRAINED + 1, TRAINED + 500):
        positions = torch.tensor([position])
        q, k = random_qk(1)
        want_q, _ = rotated_by_transformers(module, positions, q, k)
        got_q, _ = rope(positions, q, k)
        torch.testing.assert_close(got_q, want_q, rtol=0, atol=3e-3)  # float32 angles near 4,096


@pytest.mark.parametrize("name", SCALINGS)
def test_a_token_is_rotated_the_same_in_any_batch(name: str) -> None:
    rope = ours(SCALINGS[name])
    positions = torch.tensor([3, 5000, 17, 4096, 4095, 0, 90_000])
    q, k = random_qk(len(positions))
    all_q, all_k = rope(positions, q, k)
    for i in range(len(positions)):
        one_q, one_k = rope(positions[i : i + 1].clone(), q[i : i + 1], k[i : i + 1])
        assert torch.equal(one_q[0], all_q[i])
        assert torch.equal(one_k[0], all_k[i])


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("position", [1_000_000, 4_194_304, 10_485_759])
def test_far_positions_are_exact(name: str, position: int) -> None:
    rope = ours(SCALINGS[name])
    cos, sin = rope.cos_sin(torch.tensor([position]))
    frequencies = rope.angles(torch.tensor([position]))[0] / position
    if SCALINGS[name]["rope_type"] != "dynamic":
        frequencies = inverse_frequencies(DIM, rope.rope)
    scaling = rope.rope.attention_scaling
    for pair, frequency in enumerate(frequencies.tolist()):
        # The angle reduced in exact integer arithmetic: position * frequency mod 2 pi in 200 bits.
        angle = reduced_angle(position, frequency)
        assert float(cos[0, 0, pair]) == pytest.approx(scaling * math.cos(angle), abs=2e-7)
        assert float(sin[0, 0, DIM // 2 + pair]) == pytest.approx(
            scaling * math.sin(angle), abs=2e-7
        )
        assert float(sin[0, 0, pair]) == -float(sin[0, 0, DIM // 2 + pair])


# 2 pi to 60 digits.
TWO_PI_E60 = 6283185307179586476925286766559005768394338798750211641949889


def reduced_angle(position: int, frequency: float) -> float:
    numerator, denominator = frequency.as_integer_ratio()
    scaled = position * numerator * 10**60 // denominator
    return (scaled % TWO_PI_E60) / 10**60


def test_float32_angles_would_be_wrong_there() -> None:
    # Why the angles are float64: the same product in float32 misses the cosine by a lot.
    rope = ours(SCALINGS["default"])
    position = torch.tensor([10_485_759])
    exact = rope.angles(position)
    single = position.float().unsqueeze(-1) * inverse_frequencies(DIM, rope.rope).float()
    assert (single.double().cos() - exact.cos()).abs().max() > 0.1


def test_distance_is_all_that_counts() -> None:
    rope = ours(SCALINGS["llama3"])
    q, k = random_qk(1)
    scores = []
    for base in (0, 5_000_000):
        far_q, _ = rope(torch.tensor([base + 37]), q, k)
        _, far_k = rope(torch.tensor([base + 11]), q, k)
        scores.append(float(far_q[0, :DIM] @ far_k[0, :DIM]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_half_precision_in_and_out() -> None:
    rope = ours(SCALINGS["default"], torch.bfloat16)
    exact = ours(SCALINGS["default"])
    positions = torch.arange(50, 60)
    q, k = (t.bfloat16() for t in random_qk(10))
    got_q, got_k = rope(positions, q, k)
    want_q, _ = exact(positions, q.float(), k.float())
    assert got_q.dtype is got_k.dtype is torch.bfloat16
    assert torch.equal(got_q, want_q.bfloat16())


def test_strided_inputs_and_no_tokens() -> None:
    rope = ours(SCALINGS["default"])
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * DIM, generator=torch.Generator().manual_seed(0))
    q, k, _ = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
    before = qkv.clone()
    positions = torch.arange(5)
    got_q, got_k = rope(positions, q, k)
    want_q, want_k = rope(positions, q.contiguous(), k.contiguous())
    assert torch.equal(got_q, want_q)
    assert torch.equal(got_k, want_k)
    assert torch.equal(qkv, before)
    empty_q, empty_k = rope(positions[:0], q[:0], k[:0])
    assert (empty_q.shape, empty_k.shape) == ((0, HEADS * DIM), (0, KV_HEADS * DIM))


def test_angles_are_computed_once_a_step() -> None:
    rope = ours(SCALINGS["yarn"])
    positions = torch.arange(4)
    first = rope.cos_sin(positions)
    assert rope.cos_sin(positions)[0] is first[0]
    assert rope.cos_sin(torch.arange(4))[0] is not first[0]


def test_freq_factors_divide_the_frequencies() -> None:
    factors = tuple(1.0 + i for i in range(DIM // 2))
    plain = inverse_frequencies(DIM, RopeConfig())
    divided = inverse_frequencies(DIM, RopeConfig(freq_factors=factors))
    np.testing.assert_allclose(divided * torch.tensor(factors, dtype=torch.float64), plain)
    with pytest.raises(ValueError, match="freq_factors has 3 values for 32 pairs"):
        inverse_frequencies(DIM, RopeConfig(freq_factors=(1.0, 2.0, 3.0)))


def test_frequencies_survive_the_meta_device() -> None:
    with torch.device("meta"):
        rope = ours(SCALINGS["yarn"])
    cos, _ = rope.cos_sin(torch.tensor([5]))
    assert torch.equal(cos, ours(SCALINGS["yarn"]).cos_sin(torch.tensor([5]))[0])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="even head_dim, not 63"):
        get_rope(63, RopeConfig(), TRAINED, torch.float32)
    with pytest.raises(ValueError, match="unknown rope type 'spiral'"):
        get_rope(64, RopeConfig(rope_type="spiral"), TRAINED, torch.float32)


def test_a_part_of_a_head() -> None:
    """The first pairs turn as heads of that width would, the others stay as they are."""
    rope = RopeConfig(theta=1e3, partial=0.5)
    layer = get_rope(16, rope, 512, torch.float32, interleaved=True)
    whole = get_rope(8, replace(rope, partial=1.0), 512, torch.float32, interleaved=True)
    x, positions = torch.randn(3, 32), torch.tensor([0, 5, 900])
    heads, turned = x.view(3, 2, 16), layer.rotate(positions, x).view(3, 2, 16)
    torch.testing.assert_close(
        turned[..., :8].flatten(1), whole.rotate(positions, heads[..., :8].flatten(1))
    )
    torch.testing.assert_close(turned[..., 8:], heads[..., 8:], atol=0, rtol=0)
    with pytest.raises(ValueError, match="5 of 16 dimensions"):
        get_rope(16, replace(rope, partial=0.34), 512, torch.float32)


def test_scaling_is_for_the_part_that_turns() -> None:
    factors = (1.0, 2.0)
    rope = RopeConfig(
        rope_type="longrope",
        partial=0.5,
        attention_factor=1.5,
        short_factors=factors,
        long_factors=(3.0, 4.0),
        original_max_position=64,
    )
    positions = torch.tensor([0, 7])
    for served, divisors in ((64, factors), (65, (3.0, 4.0))):
        layer = get_rope(8, rope.for_context(served), 512, torch.float32)
        base = torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)
        cos, sin = layer.cos_sin(positions)
        angles = positions.double().unsqueeze(1) * base / torch.tensor(divisors)
        expected = torch.cat((angles.cos() * 1.5, torch.ones(2, 2)), -1)
        torch.testing.assert_close(cos[:, 0, :4].double(), expected, atol=1e-6, rtol=0)
        assert not sin[:, 0, 2:4].any()
    with pytest.raises(ValueError, match="long_factor has 2 values for 3 pairs"):
        get_rope(12, rope.for_context(65), 512, torch.float32)
