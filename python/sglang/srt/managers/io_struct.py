"""The messages between the processes, and nothing else.

HTTP process (TokenizerManager) -> scheduler -> detokenizer -> HTTP process, over ZeroMQ, encoded
with msgspec's msgpack. Token ids and logprobs travel as raw little-endian buffers (int32,
float32), never as lists. No message carries an object of any room.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Union

import msgspec

from sglang.srt.sampling.sampling_params import SamplingParams

Buffer = Union[bytes, memoryview]
PoolingMode = Literal["last", "mean", "cls"]
"""Which of a prompt's hidden states its vector is made of; see `PoolingConfig`."""


class IpcNames(msgspec.Struct, frozen=True):
    """ZeroMQ endpoints; each process binds the PULL socket of its own name."""

    tokenizer: str
    scheduler: str
    detokenizer: str

    @classmethod
    def in_directory(cls, path: str) -> IpcNames:
        """Endpoints that are Unix sockets in the directory `path`."""
        return cls(*(f"ipc://{path}/{name}" for name in cls.__struct_fields__))

    def of_replica(self, dp_rank: int) -> IpcNames:
        """The same with the scheduler's endpoint of one replica; the other ends are common."""
        if dp_rank == 0:
            return self
        return msgspec.structs.replace(self, scheduler=f"{self.scheduler}-{dp_rank}")


class FinishReason(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended; becomes SGLang's `finish_reason` object.

    `type` is "stop" (`matched`: token id, stop string or stop pattern, None when none applies),
    "length" (`length`: tokens generated) or "abort" (`message`, `status_code`, `err_type`).
    """

    type: str
    matched: int | str | None = None
    length: int = 0
    message: str = ""
    status_code: int = 0
    err_type: str = ""


class DetokOptions(msgspec.Struct, frozen=True, array_like=True):
    """What the detokenizer has to know of a request; rides on its first output.

    `prefix_ids` holds the last few prompt ids (int32), so that the first generated piece is
    decoded in context; their text is never shown. `kept_special_tokens` are shown although
    special tokens are skipped: a parser looks for them.
    """

    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prefix_ids: bytes = b""
    kept_special_tokens: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()

    @property
    def stops_by_text(self) -> bool:
        """Whether the text may end the request."""
        return bool(self.stop_strings or self.stop_regex)


class LogprobArrays(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of `num_rows` consecutive tokens.

    token_ids int32 [N], logprobs float32 [N] (NaN: none, as for the very first prompt token),
    top_ids int32 [N, top_num] and top_logprobs float32 [N, top_num] in descending order,
    picked_ids int32 [M] and picked_logprobs float32 [N, M] for `token_ids_logprob`.
    """

    num_rows: int
    token_ids: bytes
    logprobs: bytes
    top_num: int = 0
    top_ids: bytes = b""
    top_logprobs: bytes = b""
    picked_ids: bytes = b""
    picked_logprobs: bytes = b""


class PoolingSpec(msgspec.Struct, frozen=True, array_like=True):
    """How a prompt is pooled. `whole`: it is computed in one step and shares no prefix.

    `second_from` is where the second of two texts begins, 0: there is one.
    """

    mode: PoolingMode
    whole: bool = False
    second_from: int = 0


# ---- to the scheduler -------------------------------------------------------------------------


class ImageInput(msgspec.Struct, frozen=True, array_like=True):
    """One image of a prompt: `pixels` uint8 [tiles, 3, size, size].

    `positions` int32 [rows], ascending, are those of the prompt where its embeddings go, in order;
    there the prompt has numbers below 0 in place of `patch_id`, which differ as images do.
    """

    pixels: bytes
    positions: bytes
    patch_id: int


class TokenizedGenerateReqInput(msgspec.Struct, tag="generate"):
    """One request as the scheduler takes it, validated against everything the text side knows.

    `input_ids` int32 [n]. `sampling_params.stop_token_ids` already holds the model's and the
    tokenizer's end-of-text ids unless `ignore_eos`. `logprob_start_len` is an absolute prompt
    position: log probabilities are wanted for prompt tokens at and after it; it equals n when
    none of the prompt is wanted. `priority` (None: none was named) and `extra_key` as in SGLang
    (`extra_key` also carries `cache_salt`): requests with different keys never share a prefix.
    `lora_id` is the number under which its adapter was loaded, None: it has none.
    `include_progress` asks for `PrefillProgress` while the prompt is computed. `pooling` (None: the
    request generates) asks for the prompt's vector and no token; `max_new_tokens` is then 0. Only
    where `images` are does the prompt hold numbers below 0.
    """

    bulk_field: ClassVar[str] = "input_ids"  # forty megabytes at ten million tokens: see channel.py

    rid: str
    input_ids: memoryview
    sampling_params: SamplingParams
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = 0
    top_logprobs_num: int = 0
    token_ids_logprob: bytes = b""
    extra_key: str | None = None
    lora_id: int | None = None
    priority: int | None = None
    detok: DetokOptions = DetokOptions()
    include_progress: bool = False
    images: tuple[ImageInput, ...] = ()
    pooling: PoolingSpec | None = None

    @property
    def prefix_key(self) -> str | None:
        """`extra_key` and the adapter: what has another one never shares a prefix."""
        if self.lora_id is None:
            return self.extra_key
        return f"lora{self.lora_id}:{self.extra_key or ''}"  # the former begins with a digit


class VocabularyReq(msgspec.Struct, tag="vocabulary"):
    """What a scheduler needs to hold texts to a grammar; comes before the first such request.

    `tokenizer_json` is the tokenizer as the tokenizers library writes it, `num_tokens` one more
    than its largest id, `end_ids` the tokens that end a text.
    """

    tokenizer_json: str
    num_tokens: int
    end_ids: tuple[int, ...]


class AbortReq(msgspec.Struct, tag="abort"):
    """End `rid`, or every request when `abort_all`, in whatever state it is."""

    rid: str = ""
    abort_all: bool = False
    message: str = "Request aborted by the client"


class StopStringHit(msgspec.Struct, tag="stop_hit"):
    """The detokenizer found a stop string and has already sent the final output of `rid`."""

    rid: str


class ControlReq(msgspec.Struct, tag="control"):
    """A question to the scheduler; answered by a `ControlReply` with the same `seq`.

    `op`: "flush_cache", "internal_state" (what /metrics reads), "server_info" (that and what costs
    more: the segment map and the system's resident figure), "audit",
    "set_kv_budget" (`budget_bytes`, `time_limit_s`), "compact_kv" (`time_limit_s`). These two
    take several steps. `data` of a refusal has `status_code`. "load_lora_adapter" (`adapter_id`,
    `name`, `path`, `pinned`) and "unload_lora_adapter" (`adapter_id`) are done when answered.
    """

    seq: int
    op: str
    args: dict[str, Any] = {}


ToScheduler = Union[TokenizedGenerateReqInput, VocabularyReq, AbortReq, StopStringHit, ControlReq]


# ---- from the scheduler -----------------------------------------------------------------------


class DraftCounts(msgspec.Struct, frozen=True, array_like=True):
    """Drafts of a request that were verified so far, their tokens, and those that were taken."""

    num_verified: int
    num_proposed: int
    num_correct: int


class TokenOut(msgspec.Struct, array_like=True):
    """News of one request: tokens since its last news, and its end when `finish_reason` is set.

    `output_ids` int32, only the new ones. `completion_tokens` counts all so far. `detok` is set
    on a request's first news only, `drafts` where drafts were verified, `input_logprobs` on the
    first news after the prompt was computed, `output_logprobs` covers exactly `output_ids`.
    `pooled`, float32, is what a pooled request gets with its end.
    """

    rid: str
    output_ids: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    num_retractions: int = 0
    finish_reason: FinishReason | None = None
    input_logprobs: LogprobArrays | None = None
    output_logprobs: LogprobArrays | None = None
    detok: DetokOptions | None = None
    drafts: DraftCounts | None = None
    pooled: bytes | None = None


class BatchTokenIDOut(msgspec.Struct, tag="token_out"):
    """All news of one step, scheduler -> detokenizer."""

    outs: list[TokenOut]


class TextOut(msgspec.Struct, array_like=True):
    """`TokenOut` with the text that those tokens add; `text` is a delta and may be empty."""

    rid: str
    text: str
    output_ids: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    num_retractions: int = 0
    finish_reason: FinishReason | None = None
    input_logprobs: LogprobArrays | None = None
    output_logprobs: LogprobArrays | None = None
    drafts: DraftCounts | None = None
    pooled: bytes | None = None


class BatchStrOut(msgspec.Struct, tag="str_out"):
    """All news of one step, detokenizer -> TokenizerManager."""

    outs: list[TextOut]


class PrefillProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far a long prompt is computed.

    `tokens_per_s` is the present rate, `eta_s` the seconds left at that rate (None: no rate yet).
    """

    rid: str
    done_tokens: int
    total_tokens: int
    tokens_per_s: float
    eta_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """What clients see."""
        return {
            "done_tokens": self.done_tokens,
            "total_tokens": self.total_tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
        }


class BatchProgressOut(msgspec.Struct, tag="progress_out"):
    """Progress of prompts whose clients asked for it, scheduler -> TokenizerManager."""

    news: list[PrefillProgress]


class ControlReply(msgspec.Struct, tag="control_reply"):
    """The answer to a `ControlReq`."""

    seq: int
    success: bool
    message: str = ""
    data: dict[str, Any] = {}


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Sent several times a second by a thread of the scheduler, inside long steps too.

    `progress` advances with every layer computed; `busy` is False when nothing is queued or
    running. `context_length` is the effective one at this moment, `dp_rank` the replica's number.
    """

    progress: int
    busy: bool
    num_running: int
    num_waiting: int
    context_length: int
    dp_rank: int = 0


class SchedulerReady(msgspec.Struct, tag="ready"):
    """Sent once when the model is loaded and the pool stands in its idle state."""

    context_length: int
    context_length_requested: int
    capacity_tokens: int
    max_running_requests: int
    max_req_input_len: int
    page_size: int
    details: dict[str, Any] = {}


ToDetokenizer = Union[BatchTokenIDOut]
ToTokenizer = Union[BatchStrOut, BatchProgressOut, ControlReply, Heartbeat]


def int32_buffer(ids: Any) -> bytes:
    """Pack a sequence or array of token ids as little-endian int32 bytes."""
    import numpy as np

    return np.ascontiguousarray(ids, dtype="<i4").tobytes()
