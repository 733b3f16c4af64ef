"""What the doors ask of the TokenizerManager and what they get back.

The HTTP doors and the Engine build one `GenerateRequest` per sequence and read a stream of
`GenerateDelta`. Nothing here knows ZeroMQ, HTTP or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.managers.io_struct import (
    DetokOptions,
    DraftCounts,
    FinishReason,
    LogprobArrays,
    PoolingSpec,
    PrefillProgress,
)
from sglang.srt.multimodal.image_tiles import TiledImage
from sglang.srt.sampling.sampling_params import SamplingParams

IdArray = npt.NDArray[np.int32]

NUM_PREFIX_IDS = 6
"""Prompt ids that the detokenizer gets as context: more than the bytes of one character."""


class SessionParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SGLang's `session_params`: of which session a request is, and what it goes on from.

    `id` None: of none. `rid` is the earlier request; None: none, or the last one of a streaming
    session. `drop_previous_output` leaves out its output, `offset` (0: none) cuts what is left of
    it, `replace` forgets all that went on from it: all requests where there is no `rid`.
    """

    id: str | None = None
    rid: str | None = None
    offset: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None


@dataclass
class GenerateRequest:
    """One sequence to generate; exactly one of `text` and `input_ids` (int32 [n]) is set.

    It is changed by `forget_prompt`, and `lora_number` by who starts it.

    `logprob_start_len` is the first prompt position whose log probability is wanted, -1 for none
    of the prompt. `extra_key` keeps requests with different keys from sharing a prefix.
    `lora_path` is the name of a loaded LoRA adapter, None or empty for the model as it is,
    `lora_number` the one that is held for the request, None: whichever has the name then.
    `priority` None: the client named none.
    `include_progress` asks for deltas that tell how far a long prompt is computed.
    `add_special_tokens` says whether `text` gets the tokenizer's BOS and EOS (False for text
    that a chat template rendered). `kept_special_tokens` are shown although special tokens are
    skipped. `routed_dp_rank` is the replica that has to compute it, None:
    any. `session` (None: no session's) is the doors', too, as n is: `sampling_params.n` is not
    looked at. `pooling` None: the model generates; else it is pooled so, and
    `sampling_params.max_new_tokens` is 0. `images` go, in order, to the places of the prompt's
    image tokens.
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
    lora_path: str | None = None
    lora_number: int | None = None
    priority: int | None = None
    add_special_tokens: bool = True
    kept_special_tokens: tuple[str, ...] = ()
    include_progress: bool = False
    routed_dp_rank: int | None = None
    images: tuple[TiledImage, ...] = ()
    pooling: PoolingSpec | None = None
    session: SessionParams | None = None

    def detok_options(self, input_ids: IdArray) -> DetokOptions:
        """What the detokenizer has to know of the request, whose prompt is `input_ids`."""
        params = self.sampling_params
        return DetokOptions(
            stop_strings=params.stop,
            stop_regex=params.stop_regex,
            min_new_tokens=params.min_new_tokens,
            no_stop_trim=params.no_stop_trim,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prefix_ids=input_ids[-NUM_PREFIX_IDS:].tobytes(),
            kept_special_tokens=self.kept_special_tokens,
        )

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
    is set, and nothing else is new, on a delta that only tells of the prompt's progress. `pooled`
    float32 [d] comes with a pooled request's end: what the device made of the hidden states, not
    yet normalised.
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
    pooled: npt.NDArray[np.float32] | None = None


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
