"""Angles and temperatures around 1M, 4M and 10M against Python's float64."""

from __future__ import annotations

import math

import pytest
import torch

from sglang.srt.configs.model_traits import TemperatureConfig
from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.layers.attention_temperature import AttentionTemperature
from sglang.srt.layers.rotary_embedding import get_rope

DIM = 128
POSITIONS = [base + d for base in (0, 1_000_000, 4_000_000, 10_000_000) for d in (0, 1, 4095)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_exact(interleaved: bool) -> None:
    rope = RopeConfig(theta=500000.0)
    module = get_rope(DIM, rope, 10_485_760, torch.float32, interleaved=interleaved)
    x = torch.randn(len(POSITIONS), DIM, generator=torch.Generator().manual_seed(1))
    turned = module.rotate(torch.tensor(POSITIONS), x)
    held = sum(t.nbytes for t in module.buffers()) + sum(t.nbytes for t in module.parameters())
    held += sum(t.nbytes for t in module._last or ())
    assert held < 64 * DIM * len(POSITIONS)  # of the batch's positions only, no table
    for row, position in enumerate(POSITIONS):
        for pair in (0, 1, 20, DIM // 2 - 1):
            angle = position * 500000.0 ** (-2 * pair / DIM)
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + DIM // 2)
            a, b = x[row, i].item(), x[row, j].item()
            assert turned[row, i].item() == pytest.approx(
                a * math.cos(angle) - b * math.sin(angle), abs=2e-6
            )
            assert turned[row, j].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=2e-6
            )


def test_temperature_is_exact() -> None:
    module = AttentionTemperature(TemperatureConfig(attn_scale=0.1, floor_scale=8192))
    positions = [*POSITIONS, 8190, 8191, 8192 * 1220 - 2, 8192 * 1220 - 1]
    scales = module.scales(torch.tensor(positions)).flatten().tolist()
    for position, scale in zip(positions, scales, strict=True):
        exact = 1 + 0.1 * math.log(1 + (position + 1) // 8192)
        assert scale == torch.tensor(exact, dtype=torch.float32).item()
