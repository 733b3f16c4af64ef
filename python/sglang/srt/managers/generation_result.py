"""What a computed step hands back: the value between the worker and the scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.io_struct import LogprobArrays


@dataclass(frozen=True, slots=True)
class GenerationBatchResult:
    """What a step computed.

    `token_ids` int64 [sampled] and `output_logprobs` follow the sampled order,
    `input_logprobs` the batch's; `forward_s` is the time on the worker thread. `invalid_rows`
    are places in the sampled order whose logits had NaN or no finite maximum, `failures` those
    whose grammar could not go on, and why: their token is nobody's. `pooled[b]`, float32, is what
    the step adds to the vector of request b (see `PoolingState`). `drafted` int64 [N] are the
    tokens that a draft model said, those of a request in order (None: no model drafted), and
    `drafting_s` what it took of `forward_s`.
    """

    token_ids: npt.NDArray[np.int64]
    output_logprobs: Sequence[LogprobArrays | None]
    input_logprobs: Sequence[LogprobArrays | None]
    forward_s: float
    invalid_rows: tuple[int, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    pooled: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    drafted: npt.NDArray[np.int64] | None = None
    drafting_s: float = 0.0
