"""What a computed step took: what sizes of chunks and lengths of drafts go by, on all ranks."""

from __future__ import annotations

from typing import NamedTuple, Self

from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.schedule_batch import ScheduleBatch


class StepTime(NamedTuple):
    """What a step took, and how much of its tokens was prompts.

    A draft model took `drafting_s` of the `seconds`, for the `num_ahead` tokens of the longest
    draft of `num_drafted` requests.
    """

    num_prefill_tokens: int
    num_tokens: int
    seconds: float
    drafting_s: float = 0.0
    num_drafted: int = 0
    num_ahead: int = 0

    @classmethod
    def of(cls, batch: ScheduleBatch, result: GenerationBatchResult) -> Self:
        """Of a step and its result; what was drafted without a model costs nothing."""
        lengths = [] if result.drafted is None else [len(i.draft) for i in batch.items if i.draft]
        return cls(
            batch.num_prefill_tokens,
            batch.num_tokens,
            result.forward_s,
            result.drafting_s,
            len(lengths),
            max(lengths, default=0),
        )
