"""A request's life, and the batch of one step: what is computed, never where it is stored.

`Req` moves along one enum with legal edges, changed by `Req.move` only; its memory is one
`KVLease`, opened at admission and closed when it is retracted or ends. `ScheduleBatch` names
requests and token ranges. No slot, no tensor, no socket appears here.

    tokens       [0 ................. known)  prompt, then what was generated and is known here
    scheduled    [0 ........ num_scheduled)   K and V computed, or in a forward under way
    extend       [num_scheduled, known)       left to compute before the next token is sampled
    pending      sampled by forwards whose results are not processed yet (overlap: at most 2)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.constrained.grammar import Grammar
from sglang.srt.errors import InvariantError
from sglang.srt.managers.io_struct import (
    DetokOptions,
    FinishReason,
    LogprobArrays,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.pooling_state import PoolingState
from sglang.srt.managers.req_images import ReqImage, vocabulary_ids
from sglang.srt.mem_cache.allocation import KVLease
from sglang.srt.model_executor.forward_mode import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.model_drafts import ModelDrafts
from sglang.srt.speculative.ngram_drafts import NgramDrafts

Int32Array = npt.NDArray[np.int32]

# Admission counts at most this many tokens still to be generated: most answers end long before
# a generous max_new_tokens, and a retraction costs less than an idle device (SGLang clips too).
CLIP_MAX_NEW_TOKENS = 4096
# From here on a request is admitted only with its full need reserved.
RETRACTIONS_BEFORE_RESERVING = 2
MAX_RETRACTIONS = 3


class ReqState(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    RETRACTED = "retracted"
    ABORTING = "aborting"
    FINISHED = "finished"


_EDGES: dict[ReqState, frozenset[ReqState]] = {
    ReqState.WAITING: frozenset({ReqState.PREFILL, ReqState.ABORTING}),
    ReqState.PREFILL: frozenset(
        {ReqState.DECODE, ReqState.RETRACTED, ReqState.ABORTING, ReqState.FINISHED}
    ),
    ReqState.DECODE: frozenset({ReqState.RETRACTED, ReqState.ABORTING, ReqState.FINISHED}),
    # A stop string may be found in what a request said before it was retracted.
    ReqState.RETRACTED: frozenset({ReqState.PREFILL, ReqState.ABORTING, ReqState.FINISHED}),
    ReqState.ABORTING: frozenset({ReqState.FINISHED}),
    ReqState.FINISHED: frozenset(),
}


class TokenSequence:
    """Prompt and generated ids in one growing int32 buffer: appended to, never concatenated."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, prompt: Int32Array, room: int) -> None:
        self._buffer = np.empty(len(prompt) + max(1, room), dtype=np.int32)
        self._buffer[: len(prompt)] = prompt
        self._length = len(prompt)

    def append(self, token_id: int) -> None:
        """Add one id; amortised O(1)."""
        if self._length == len(self._buffer):
            grown = np.empty(self._length + max(64, self._length // 2), dtype=np.int32)
            grown[: self._length] = self._buffer
            self._buffer = grown
        self._buffer[self._length] = token_id
        self._length += 1

    def view(self, start: int = 0, stop: int | None = None) -> Int32Array:
        """The ids [start, stop) without a copy; must not be kept across an append."""
        return self._buffer[start : self._length if stop is None else min(stop, self._length)]

    def __len__(self) -> int:
        return self._length


@dataclass(slots=True)
class LogprobState:
    """What a request asked of log probabilities, and the prompt part gathered so far.

    Prompt rows [start, prompt_len - 1) are wanted; entry `start` itself has none. `input_parts`
    are the finished chunks in order, sent once when the prompt is complete.
    """

    start: int
    top_num: int
    picked_ids: Int32Array
    input_parts: list[LogprobArrays] = field(default_factory=list)
    input_sent: bool = False


class Req:
    """One request, from its arrival to its one final output.

    Invariants: `kv` is set exactly in PREFILL, DECODE and (while a forward names it) ABORTING;
    `num_inflight` counts forwards under way that name it; `finish_reason` is set at most once,
    and the request enters no batch from then on.
    """

    def __init__(
        self,
        message: TokenizedGenerateReqInput,
        arrival: int,
        seed: int,
        *,
        urgency: int | None = None,
    ) -> None:
        """`urgency` orders requests, the highest first; None: priorities order nothing here."""
        params = message.sampling_params
        prompt = np.frombuffer(message.input_ids, dtype="<i4")
        self.rid = message.rid
        self.arrival = arrival
        self.prompt_len = len(prompt)
        self.tokens = TokenSequence(prompt, min(params.max_new_tokens or 256, 256))
        self.images = tuple(ReqImage.of(image) for image in message.images)
        self.params: SamplingParams = params
        self.stop_token_ids = frozenset(() if params.ignore_eos else params.stop_token_ids)
        self.seed = seed
        self.stream = message.stream
        self.include_progress = message.include_progress
        self.extra_key = message.prefix_key
        self.adapter_id = message.lora_id
        self.adapter_place = -1  # where it lies, from admission on; -1: it has none
        self.urgency = 0 if urgency is None else urgency
        # What the prefix cache evicts by, if it is told to.
        self.priority = (message.priority or 0) if urgency is None else urgency
        self.detok: DetokOptions | None = message.detok
        self.has_stop_strings = message.detok.stops_by_text
        self.grammar: Grammar | None = None  # set before it is admitted, if it has a constraint
        # Set before it is admitted, if it is drafted.
        self.drafts: NgramDrafts | ModelDrafts | None = None
        self.logprob: LogprobState | None = None
        if message.return_logprob:
            picked = np.frombuffer(message.token_ids_logprob, dtype="<i4")
            start = min(message.logprob_start_len, self.prompt_len)
            self.logprob = LogprobState(start, message.top_logprobs_num, picked)
        self.pooling: PoolingState | None = None
        if message.pooling is not None:
            self.pooling = PoolingState(message.pooling, self.prompt_len)

        self.state = ReqState.WAITING
        self.kv: KVLease | None = None
        self.num_scheduled = 0
        # Of the scheduled tokens, those of which a draft model has K and V; None: there is none.
        self.num_followed: int | None = None
        self.num_pending = 0
        self.num_inflight = 0
        self.num_retractions = 0
        # Of them, for a budget that was lowered or a request that is more urgent.
        self.num_forced_retractions = 0
        self.num_passed_over = 0
        self.num_cached_tokens: int | None = None  # of the first admission; None: never admitted
        self.sampler_ready = False  # the sampler knows this row's parameters and history
        self.finish_reason: FinishReason | None = None
        self.final_sent = False  # its one final output is on its way
        self.num_sent = 0  # generated tokens already told to the detokenizer
        self.output_logprobs: list[LogprobArrays] = []  # of tokens not yet sent

    def vocabulary_ids(self, start: int, stop: int) -> Int32Array:
        """Tokens [start, stop) as the model and the sampler know them: no number that stands for
        an image; must not be kept across an append."""
        return vocabulary_ids(self.tokens.view(start, stop), self.images)

    # ---- derived, never stored ----

    @property
    def known(self) -> int:
        """Tokens whose ids are known here."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Generated tokens whose ids are known here."""
        return self.known - self.prompt_len

    @property
    def extend_left(self) -> int:
        """Known tokens whose K and V are still to be scheduled (0 while decoding ahead)."""
        return max(0, self.known - self.num_scheduled)

    @property
    def num_shareable(self) -> int:
        """Known tokens that have K and V of all layers."""
        computed = min(self.num_scheduled, self.known)
        return computed if self.num_followed is None else min(computed, self.num_followed)

    @property
    def is_ending(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_waiting(self) -> bool:
        """True while it waits for a place, for the first time or again."""
        return self.state in (ReqState.WAITING, ReqState.RETRACTED)

    @property
    def max_new_tokens(self) -> int:
        """The user's limit; the text side always resolves None before sending."""
        assert self.params.max_new_tokens is not None
        return self.params.max_new_tokens

    def new_tokens_left(self) -> int:
        """Tokens that may still be generated, those in flight excluded."""
        return max(0, self.max_new_tokens - self.num_output - self.num_pending)

    def target_len(self, *, full: bool) -> int:
        """Tokens that will have a slot at the end; clipped as admission counts unless `full`."""
        left = self.new_tokens_left()
        left = left if full else min(left, CLIP_MAX_NEW_TOKENS)
        # The last token generated is never fed back, hence never stored.
        return self.known + self.num_pending + max(0, left - 1)

    @property
    def num_own_retractions(self) -> int:
        """Retractions that its own growth and its neighbours' caused.

        Others say nothing of how much it is likely to need, so they neither make it reserve its
        full need nor bring it nearer to `MAX_RETRACTIONS`.
        """
        return self.num_retractions - self.num_forced_retractions

    @property
    def needs_reservation(self) -> bool:
        """True once it was retracted so often that it is admitted with its full need only."""
        return self.num_own_retractions >= RETRACTIONS_BEFORE_RESERVING

    @property
    def second_from(self) -> int:
        """The position of the second of a prompt's two texts, its end where there is one text."""
        start = 0 if self.pooling is None else self.pooling.spec.second_from
        return start or self.prompt_len

    @property
    def computes_whole(self) -> bool:
        """True when its prompt may not be cut into chunks."""
        return self.pooling is not None and self.pooling.spec.whole

    def max_prefix(self) -> int:
        """Longest prefix a cache hit may cover: a row must be left whose logits are wanted."""
        limit = self.known - 1
        if self.logprob is not None and not self.logprob.input_sent:
            limit = min(limit, self.logprob.start)
        if self.pooling is not None and self.pooling.needs_all_rows:
            limit = 0
        return max(0, limit)

    def own_computed(self) -> int:
        """Tokens that a retraction would have to compute again: those beyond the cached prefix."""
        if self.kv is None:
            return 0
        return max(0, self.num_scheduled - self.kv.num_cached_tokens)

    def wants_decode(self, context_length: int) -> bool:
        """True when its next step feeds back one sampled token (known here or still in flight)."""
        if self.kv is None or self.is_ending:
            return False
        if self.num_output + self.num_pending == 0 or self.extend_left > 1:
            return False
        ahead = self.known + self.num_pending
        return (
            self.num_scheduled == ahead - 1
            and self.new_tokens_left() > 0
            and ahead < context_length
        )

    # ---- changes ----

    def move(self, state: ReqState) -> None:
        """Take one edge of its life; raises InvariantError on an edge that does not exist."""
        if state not in _EDGES[self.state]:
            raise InvariantError(f"{self!r} cannot become {state.value}")
        self.state = state

    def admit(self, lease: KVLease) -> None:
        """Take a place in memory; its prefix hit counts as scheduled."""
        self.move(ReqState.PREFILL)
        self.kv = lease
        self.num_scheduled = lease.num_cached_tokens
        if self.num_followed is not None:
            self.num_followed = lease.rewritten_from = lease.num_cached_tokens
        self.sampler_ready = False
        if self.num_cached_tokens is None:
            self.num_cached_tokens = lease.num_cached_tokens

    def retract(self, *, forced: bool) -> None:
        """Give up its place (the caller closed the lease) and wait again, outputs kept.

        `forced`: neither its own growth nor its neighbours' is the cause.
        """
        if self.num_inflight:
            raise InvariantError(f"{self!r} is retracted while a forward names it")
        self.move(ReqState.RETRACTED)
        self.kv = None
        self.num_scheduled = 0
        self.num_retractions += 1
        self.num_forced_retractions += forced
        for image in self.images:
            image.rows = None
        if self.logprob is not None and not self.logprob.input_sent:
            self.logprob.input_parts.clear()
        if self.pooling is not None:
            self.pooling.clear()

    def finish(self, reason: FinishReason) -> bool:
        """Note why it ends; False when it was ending already (the first reason stands)."""
        if self.finish_reason is not None:
            return False
        self.finish_reason = reason
        if reason.type == "abort":
            self.move(ReqState.ABORTING)
        return True

    def __repr__(self) -> str:
        return (
            f"Req({self.rid} {self.state.value} prompt={self.prompt_len} out={self.num_output} "
            f"scheduled={self.num_scheduled} pending={self.num_pending} "
            f"inflight={self.num_inflight} retractions={self.num_retractions})"
        )


class Follow(NamedTuple):
    """What a draft model computes of a request in a step: the K and V of tokens [first, end).

    Those of the first `reached` are right when the step is over.
    """

    first: int
    end: int
    reached: int


@dataclass(frozen=True, slots=True)
class ScheduledReq:
    """One request's part of a step: tokens [start, start + num_tokens), and whether to sample.

    `from_relay`: the one input token is what the forward before sampled for this row. `draft` are
    the last of the tokens: not known but proposed, to be sampled against. `follow` is a draft
    model's part (None: it has none).
    """

    req: Req
    start: int
    num_tokens: int
    sample: bool
    from_relay: bool = False
    draft: tuple[int, ...] = ()
    follow: Follow | None = None

    def launch(self) -> None:
        """Let the request know that the step is on its way."""
        self.req.num_scheduled += self.num_tokens
        self.req.num_inflight += 1
        self.req.num_pending += int(self.sample)
        if self.follow is not None:
            self.req.num_followed = self.follow.reached
            self.lease.rewritten_from = self.follow.first

    @property
    def is_extend(self) -> bool:
        """False for a decoding request, drafted or not."""
        return self.num_tokens - len(self.draft) > 1 or not self.req.num_output

    @property
    def num_places(self) -> int:
        """Tokens that it samples: none, one, or one more than are drafted."""
        return 1 + len(self.draft) if self.sample else 0

    def input_ids(self) -> list[int] | Int32Array:
        """The ids of its tokens, the draft's included; must not be kept across an append."""
        end = self.start + self.num_tokens - len(self.draft)
        known = self.req.vocabulary_ids(self.start, end)
        return [*known.tolist(), *self.draft] if self.draft else known

    @property
    def lease(self) -> KVLease:
        """The request's hold on memory; set for as long as a batch names the request."""
        if self.req.kv is None:
            raise InvariantError(f"{self.req!r} is in a batch without memory")
        return self.req.kv

    def logprob_rows(self) -> tuple[int, int]:
        """(first position, count) of this step's positions whose next prompt token is scored."""
        logprob = self.req.logprob
        if logprob is None or logprob.input_sent:
            return (self.start, 0)
        first = max(self.start, logprob.start)
        last = min(self.start + self.num_tokens, self.req.prompt_len - 1)
        return (first, max(0, last - first))

    def pooled_rows(self) -> tuple[int, int]:
        """(first position, count) of this step's positions whose hidden states are pooled."""
        pooling = self.req.pooling
        return (self.start, 0) if pooling is None else pooling.rows(self.start, self.num_tokens)


class AdapterChange(NamedTuple):
    """An adapter that takes a place before the step computes; what was there goes."""

    place: int
    adapter_id: int


@dataclass(frozen=True, slots=True)
class ScheduleBatch:
    """What one step computes; decodes as they were admitted, then extends, urgent ones first."""

    step: int
    items: tuple[ScheduledReq, ...]
    adapter_changes: tuple[AdapterChange, ...] = ()

    @property
    def forward_mode(self) -> ForwardMode:
        extends = sum(item.is_extend for item in self.items)
        if not self.items:
            return ForwardMode.IDLE
        if extends == 0:
            return ForwardMode.TARGET_VERIFY if self.has_drafts else ForwardMode.DECODE
        return ForwardMode.EXTEND if extends == len(self.items) else ForwardMode.MIXED

    @property
    def has_drafts(self) -> bool:
        return any(item.draft for item in self.items)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the extends: all but those that decode."""
        return sum(i.num_tokens for i in self.items if i.num_tokens > 1 and not i.draft)
