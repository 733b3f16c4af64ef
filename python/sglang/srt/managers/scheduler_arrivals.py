"""Requests as they arrive: refused by numbers alone, or made, numbered and seeded.

The scheduler asks; queues and outputs stay its own.
"""

from __future__ import annotations

import numpy as np

from sglang.srt.managers.draft_policy import DraftPolicy
from sglang.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.scheduler_lora import SchedulerAdapters


class Arrivals:
    """Counts requests in the order in which they come, on every rank alike.

    `seed` is where those begin that requests don't bring; `drafting` sets up what is drafted.
    """

    def __init__(self, adapters: SchedulerAdapters, drafting: DraftPolicy, seed: int) -> None:
        self._adapters = adapters
        self._drafting = drafting
        self._seeds = np.random.default_rng(seed)
        self._num_made = 0

    def refusal(
        self, message: TokenizedGenerateReqInput, limits: SchedulerLimits
    ) -> FinishReason | None:
        """Why a request can't be served, whoever waits; None when it can."""
        num_tokens = message.input_ids.nbytes // 4
        reason = limits.refusal(num_tokens, message.sampling_params.max_new_tokens)
        return reason or self._adapters.refusal(message.lora_id)

    def make(self, message: TokenizedGenerateReqInput, urgency: int | None) -> Req:
        """The request of a message that was not refused; `urgency` as `Req` takes it."""
        seed = message.sampling_params.sampling_seed
        if seed is None:
            seed = int(self._seeds.integers(1 << 62))
        req = Req(message, self._num_made, seed, urgency=urgency)
        self._drafting.start(req)
        self._num_made += 1
        return req
