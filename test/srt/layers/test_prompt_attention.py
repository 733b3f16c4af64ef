"""Attention within prompts side by side equals that of each prompt alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang.srt.layers.prompt_attention import attend_prompts, plan_groups

CPU = torch.device("cpu")


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int]) -> torch.Tensor:
    outputs = []
    for part in zip(*(x.split(lens) for x in (q, k, v)), strict=True):
        found = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part))
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lens", [[1], [7, 7, 7], [3, 40, 1, 42, 16, 90, 17, 39], [100, 2]])
def test_every_prompt_sees_itself_alone(lens: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(sum(lens), 3, 8, generator=generator) for _ in range(3))
    found = attend_prompts(q, k, v, plan_groups(lens, CPU))
    torch.testing.assert_close(found, alone(q, k, v, lens), rtol=1e-5, atol=1e-6)


def test_prompts_of_about_one_length_go_together() -> None:
    groups = plan_groups([3, 40, 1, 42, 16, 90, 17, 39], CPU)
    assert [tuple(group.rows.shape) for group in groups] == [(3, 16), (1, 17), (3, 42), (1, 90)]
    assert groups[1].seen is None
    assert groups[2].seen is not None
    assert groups[2].seen[:, 0, 0].sum(1).tolist() == [39, 40, 42]


def test_equal_lengths_need_no_filling() -> None:
    (group,) = plan_groups([2, 2], CPU)
    assert group.rows.tolist() == [[0, 1], [2, 3]]
    assert group.seen is None
