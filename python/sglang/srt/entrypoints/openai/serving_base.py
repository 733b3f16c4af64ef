"""What the two OpenAI endpoints share: sampling parameters, usage, ids, the ends of choices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from sglang.srt.entrypoints.generate_request_body import new_rid, prefix_key
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.fill_in_middle import MiddleMarks
from sglang.srt.entrypoints.openai.protocol import SharedBody, StreamOptions
from sglang.srt.entrypoints.openai.response_format import constraint_fields
from sglang.srt.entrypoints.sampling_fields import (
    CONSTRAINTS,
    logit_bias,
    stop_patterns,
    stop_strings,
    thinking_budget,
)
from sglang.srt.entrypoints.sequences import SequenceOutput, SequenceRunner
from sglang.srt.entrypoints.service import TextService
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.parser.answer_parser import ParserNames
from sglang.srt.sampling.sampling_params import SamplingParams

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Log probabilities of every prompt token would be no answer of this shape's size.
MAX_OPENAI_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class OpenAIOptions:
    """Server settings that show in OpenAI replies.

    `sampling_defaults` are the model's own (--sampling-defaults model), empty for OpenAI's.
    `parsers` are those for answers of chats. `template_defaults` are chat_template_kwargs of chats
    that don't set them. `includes_usage`: streams that don't say otherwise end with usage.
    `middle` None: a completion has no suffix.
    """

    sampling_defaults: Mapping[str, float]
    cache_report: bool = False
    weight_version: str = "default"
    parsers: ParserNames = field(default_factory=ParserNames)
    template_defaults: Mapping[str, Any] = field(default_factory=dict)
    includes_usage: bool = False
    middle: MiddleMarks | None = None


def default_sampling(generation_defaults: Mapping[str, float]) -> dict[str, float]:
    """generation_config.json's values in SGLang's terms: there top_k 0 also means all."""
    defaults = dict(generation_defaults)
    if defaults.get("top_k", -1) <= 0:
        defaults.pop("top_k", None)
    return defaults


def sampling_params(
    body: SharedBody, max_new_tokens: int | None, defaults: Mapping[str, float]
) -> SamplingParams:
    """Sampling parameters of a request; `defaults` fill in what it leaves out."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=body.min_tokens,
        stop=stop_strings(body.stop),
        stop_regex=stop_patterns(body.stop_regex),
        stop_token_ids=tuple(body.stop_token_ids),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        n=body.n,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=body.spaces_between_special_tokens,
        no_stop_trim=body.no_stop_trim,
        logit_bias=logit_bias("logit_bias", body.logit_bias),
        sampling_seed=body.seed,
        max_thinking_tokens=thinking_budget(body.max_thinking_tokens, body.custom_params),
        **constraint_fields(
            body.response_format, {kind: getattr(body, kind) for kind in CONSTRAINTS}
        ),
    )
    given = {name: getattr(body, name) for name in _DEFAULTED if getattr(body, name) is not None}
    return msgspec.structs.replace(params, **{**defaults, **given})


def check_max_tokens(name: str, value: int | None) -> None:
    """OpenAI clients know the field by its own name, so say it before the engine does."""
    if value is not None and value < 0:
        raise bad_field(name, f"it must be at least 0, got {value}")


@dataclass(frozen=True)
class ReplyHead:
    """What every object of one reply repeats."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        """The head of an object of the given kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def call_ids(body: SharedBody) -> tuple[ReplyHead, str, str | None]:
    """The reply's head, the call's id and the key that separates its prefixes from others'."""
    if body.rid == "":
        raise bad_field("rid", "it is empty")
    rid = body.rid or new_rid()
    head = ReplyHead(rid, int(time.time()), body.model)
    return head, rid, prefix_key(body.extra_key, body.cache_salt)


class UsageCounter:
    """Tokens of a whole call; each prompt counts once, whatever n is.

    `shows_reasoning`: the reply has OpenAI's `completion_tokens_details`, too.
    """

    def __init__(
        self, prompt_indices: Sequence[int], cache_report: bool, shows_reasoning: bool = False
    ) -> None:
        self._prompt_of = prompt_indices
        self._shows_reasoning = shows_reasoning
        self._reasoning: dict[int, int] = {}
        self._cache_report = cache_report
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completions: dict[int, int] = {}

    def note(self, index: int, delta: GenerateDelta, reasoning_tokens: int = 0) -> None:
        """Take the totals of sequence `index` so far."""
        self._reasoning[index] = reasoning_tokens
        prompt = self._prompt_of[index]
        self._prompts[prompt] = delta.prompt_tokens
        # n's other choices find the first one's prompt in the cache: that is no saving to report.
        self._cached.setdefault(prompt, delta.cached_tokens)
        self._completions[index] = delta.completion_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt = sum(self._prompts.values())
        completion = sum(self._completions.values())
        details = {"cached_tokens": sum(self._cached.values())} if self._cache_report else None
        reasoning = sum(self._reasoning.values())
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "reasoning_tokens": reasoning,
            "prompt_tokens_details": details,
        }
        if self._shows_reasoning:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage


def finish_fields(reason: FinishReason | None) -> dict[str, Any]:
    """`finish_reason` and `matched_stop` of a choice."""
    if reason is None:
        return {"finish_reason": None, "matched_stop": None}
    matched = reason.matched if reason.type == "stop" else None
    return {"finish_reason": reason.type, "matched_stop": matched}


def id_fields(
    body: SharedBody, prompt_ids: IdArray | None, output_ids: IdArray | None
) -> dict[str, IdArray]:
    """`prompt_token_ids` and `token_ids` of a choice, as far as they are asked for and given."""
    fields = {}
    if body.shows_prompt_ids and prompt_ids is not None:
        fields["prompt_token_ids"] = prompt_ids
    if body.return_token_ids and output_ids is not None:
        fields["token_ids"] = output_ids
    return fields


def last_of(output: SequenceOutput) -> GenerateDelta:
    """The final delta; RequestError 500 for a sequence that never answered."""
    if output.last is None:
        raise RequestError("The request ended without an answer.", 500)
    return output.last


class OpenAIServing:
    """What serving either endpoint needs."""

    def __init__(
        self, service: TextService, runner: SequenceRunner, options: OpenAIOptions
    ) -> None:
        self.service = service
        self.runner = runner
        self.options = options

    def includes_usage(self, options: StreamOptions) -> bool:
        """Whether a stream ends with usage."""
        wanted = options.include_usage
        return self.options.includes_usage if wanted is None else wanted

    async def with_ids(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its text tokenized, for replies that show the ids."""
        if request.text is None:
            return request
        ids = await self.service.tokenize(request.text, request.add_special_tokens)
        return replace(request, text=None, input_ids=ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token; its number under --skip-tokenizer-init."""
        tokenizer = self.service.tokenizer
        return str(token_id) if tokenizer is None else tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of its number under --skip-tokenizer-init."""
        tokenizer = self.service.tokenizer
        return str(token_id).encode() if tokenizer is None else tokenizer.token_bytes(token_id)
