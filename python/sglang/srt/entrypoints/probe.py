"""The smallest request that makes a server do all of its work: for the warm-up and for health."""

from __future__ import annotations

import numpy as np

from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.managers.generate_request import GenerateRequest
from sglang.srt.sampling.sampling_params import SamplingParams


def probe_request(
    rid: str, num_tokens: int, pooling: PoolingConfig | None, dp_rank: int | None = None
) -> GenerateRequest:
    """A prompt of one token that is answered with `num_tokens`, or pooled.

    `pooling` None: the model generates. `dp_rank` None: any replica.
    """
    return GenerateRequest(
        rid=rid,
        text=None,
        input_ids=np.zeros(1, np.int32),
        sampling_params=SamplingParams(
            max_new_tokens=num_tokens if pooling is None else 0, temperature=0.0, ignore_eos=True
        ),
        stream=False,
        routed_dp_rank=dp_rank,
        pooling=None if pooling is None else pooling.spec,
    )
