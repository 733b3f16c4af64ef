"""The OpenAI-compatible requests: which fields are served, accepted and refused.

Field names and defaults are OpenAI's, with SGLang's additions. Fields that neither knows are
ignored: clients send many of their own, and the known ones that would change an answer are all
refused by name here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang.srt.entrypoints.generate_request_body import (
    DISAGGREGATION,
    HIDDEN_STATES,
    LOGIT_PROCESSOR,
    RAW_NULL,
)
from sglang.srt.entrypoints.openai.response_format import ResponseFormat
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.managers.generate_request import SessionParams

FUNCTIONS = Refusal("use tools", ([],))
RETURNS = "it is not returned"


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`; `include_progress` is ours: comments while a long prompt is computed."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_progress: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What all OpenAI endpoints that generate serve.

    None: the model's or the API's default. `logit_bias` has token ids as keys.
    """

    model: str = "default"
    min_tokens: Int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: Int | None = None
    stop: str | list[str] = []
    stop_regex: str | list[str] = []
    stop_token_ids: list[Int] = []
    logit_bias: dict[str, float] = {}
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    max_thinking_tokens: Int | None = None
    custom_params: dict[str, Any] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: Int | None = None


class SharedBody(GenerationBody, frozen=True, kw_only=True):
    """What chats and completions serve."""

    max_tokens: Int | None = None
    n: Int = 1
    response_format: ResponseFormat | None = None
    session_params: SessionParams | None = None
    return_token_ids: bool = False
    return_prompt_token_ids: bool = False
    routed_dp_rank: Int | None = None
    data_parallel_rank: Int | None = None

    @property
    def replica(self) -> int | None:
        """The replica that has to compute it, by the field's newer or older name; None: any."""
        named = self.routed_dp_rank
        return self.data_parallel_rank if named is None else named

    @property
    def shows_prompt_ids(self) -> bool:
        """Whether each choice has its prompt's ids."""
        return self.return_token_ids or self.return_prompt_token_ids


class ChatBody(SharedBody, frozen=True, kw_only=True):
    """The served fields of /v1/chat/completions."""

    messages: list[dict[str, Any]] = []
    lora_path: str | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    stream_reasoning: bool = True


class CompletionBody(SharedBody, frozen=True, kw_only=True):
    """The served fields of /v1/completions."""

    prompt: msgspec.Raw | str | IdLists = RAW_NULL
    suffix: str | None = None
    lora_path: str | list[str | None] | None = None
    echo: bool = False
    logprobs: Int | None = None


# Nothing of these changes an answer here: identification, bookkeeping, hints about speed.
_ACCEPTED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "no_logs",
    "custom_labels",
    "stream_interval",
)

SHARED_REFUSALS = {
    "custom_logit_processor": LOGIT_PROCESSOR,
    "return_hidden_states": HIDDEN_STATES,
    "return_routed_experts": Refusal(RETURNS, (False,)),
    "return_cached_tokens_details": Refusal(RETURNS, (False,)),
    "return_meta_info": Refusal(RETURNS, (False,)),
    "use_beam_search": Refusal("beam search is not served", (False,)),
    "beam_width": Refusal("beam search is not served", (0, 1)),
    "bootstrap_host": DISAGGREGATION,
    "bootstrap_port": DISAGGREGATION,
    "bootstrap_room": DISAGGREGATION,
}

CHAT_FIELDS = FieldTable(
    ChatBody,
    accepted=_ACCEPTED,
    refused={
        **SHARED_REFUSALS,
        "functions": FUNCTIONS,
        "function_call": Refusal("use tool_choice", ("none", "auto")),
        "input_ids": Refusal("send ids to /v1/completions or /generate", ([],)),
        "modalities": Refusal("audio is neither taken nor given", ([], ["text"])),
        "audio": Refusal("audio is neither taken nor given"),
        "web_search_options": Refusal("web search is not served"),
        "verbosity": Refusal("verbosity is not served", ("medium",)),
        "thinking": Refusal("use chat_template_kwargs", ()),
        "video_fps": Refusal("videos are not served"),
    },
    refuse_unknown=False,
)

COMPLETION_FIELDS = FieldTable(
    CompletionBody,
    accepted=_ACCEPTED,
    refused={
        **SHARED_REFUSALS,
        "best_of": Refusal("best_of is not served; use n", (1,)),
    },
    refuse_unknown=False,
)
