"""What the doors ask of the TokenizerManager and what they get back.

The HTTP doors and the Engine build one `GenerateRequest` per sequence and read a stream of
`GenerateDelta`. Nothing here knows ZeroMQ, HTTP or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.io_struct import DraftCounts, FinishReason, LogprobArrays, PrefillProgress
from sglang.srt.multimodal.image_tiles import TiledImage
from sglang.srt.sampling.sampling_params import SamplingParams

IdArray = npt.NDArray[np.int32]


@dataclass
class GenerateRequest:
    """One sequence to generate; exactly one of `text` and `input_ids` (int32 [n]) is set.

    It is changed once, by `forget_prompt`.

    `logprob_start_len` is the first prompt position whose log probability is wanted, -1 for none
    of the prompt. `extra_key` keeps requests with different keys from sharing a prefix.
    `priority` None: the client named none.
    `include_progress` asks for deltas that tell how far a long prompt is computed.
    `add_special_tokens` says whether `text` gets the tokenizer's BOS and EOS (False for text
    that a chat template rendered). `kept_special_tokens` are shown although special tokens are
    skipped. `routed_dp_rank` is the replica that has to compute it, None:
    any. `sampling_params.n` is not looked at: the doors expand n. `images` go, in order, to the
    places of the prompt's image tokens.
    """

    rid: str
    text: str | None
    input_ids: IdArray | None
    sampling_params: SamplingParams
    stream: bool
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    extra_key: str | None = None
    priority: int | None = None
    add_special_tokens: bool = True
    kept_special_tokens: tuple[str, ...] = ()
    include_progress: bool = False
    routed_dp_rank: int | None = None
    images: tuple[TiledImage, ...] = ()

    def forget_prompt(self) -> None:
        """Let go of the prompt, which the scheduler has: a request may run for an hour with it."""
        self.text = self.input_ids = None
        self.images = ()


@dataclass(frozen=True)
class GenerateDelta:
    """News of one request since the delta before; `finish_reason` is set on the last one only.

    `text` and `output_ids` (int32) are deltas and may be empty, `prompt_tokens`,
    `completion_tokens`, `cached_tokens` and `num_retractions` are totals so far.
    `input_logprobs` comes at most once, `output_logprobs` covers exactly `output_ids`. `dp_rank` is
    the replica's number, None where there is one; `drafts` are totals, None without any. `progress`
    is set, and nothing else is new, on a delta that only tells of the prompt's progress.
    """

    text: str
    output_ids: IdArray
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_retractions: int
    finish_reason: FinishReason | None
    input_logprobs: LogprobArrays | None = None
    output_logprobs: LogprobArrays | None = None
    progress: PrefillProgress | None = None
    dp_rank: int | None = None
    drafts: DraftCounts | None = None


def concat_logprobs(parts: Sequence[LogprobArrays]) -> LogprobArrays | None:
    """Join the rows of `parts` in order; None when there are none.

    All parts belong to one request, so `top_num` and `picked_ids` agree.
    """
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return LogprobArrays(
        num_rows=sum(part.num_rows for part in parts),
        token_ids=b"".join(part.token_ids for part in parts),
        logprobs=b"".join(part.logprobs for part in parts),
        top_num=parts[0].top_num,
        top_ids=b"".join(part.top_ids for part in parts),
        top_logprobs=b"".join(part.top_logprobs for part in parts),
        picked_ids=parts[0].picked_ids,
        picked_logprobs=b"".join(part.picked_logprobs for part in parts),
    )


def first_rows(arrays: LogprobArrays | None, num_rows: int) -> LogprobArrays | None:
    """Keep the first `num_rows` rows of `arrays` (None stays None)."""
    if arrays is None or num_rows >= arrays.num_rows:
        return arrays
    num_picked = len(arrays.picked_ids) // 4
    return LogprobArrays(
        num_rows=num_rows,
        token_ids=arrays.token_ids[: 4 * num_rows],
        logprobs=arrays.logprobs[: 4 * num_rows],
        top_num=arrays.top_num,
        top_ids=arrays.top_ids[: 4 * num_rows * arrays.top_num],
        top_logprobs=arrays.top_logprobs[: 4 * num_rows * arrays.top_num],
        picked_ids=arrays.picked_ids,
        picked_logprobs=arrays.picked_logprobs[: 4 * num_rows * num_picked],
    )
