"""Helpers of the sampler tests: one row sampled alone, and random logits."""

from __future__ import annotations

import numpy as np
import torch

from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams

NO_IDS = np.empty(0, np.int32)
V = 50


def sample_one(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    seed: int = 1,
    position: int = 9,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    suppress: bool = False,
    spec: LogprobSpec | None = None,
) -> tuple[int, LogprobArrays | None]:
    sampler = Sampler()
    sampler.admit(
        3, params, seed, np.array(prompt or [], np.int32), np.array(output or [], np.int32)
    )
    out = sampler.sample(logits.clone().unsqueeze(0), [3], [position], [suppress], [spec])
    return int(out.token_ids[0]), out.logprobs[0]


def spec_of(top_num: int = 0, picked: tuple[int, ...] = ()) -> LogprobSpec:
    return LogprobSpec(0, NO_IDS, True, top_num, np.array(picked, np.int32))


def logits_of(seed: int, v: int = V, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(v, generator=torch.Generator().manual_seed(seed)) * scale
