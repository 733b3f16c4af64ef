"""What /generate takes: SGLang's native request, read into a `Call`.

Pure: raw JSON in, `GenerateRequest`s out. What depends on the model (ids in range, lengths) is
checked by the TokenizerManager.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.binary_ids import ids_of_base64, ids_of_body
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.request_body import (
    Fields,
    FieldValue,
    RawFields,
    decode_field,
    split_body,
    split_list,
    split_object,
)
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal, is_null
from sglang.srt.entrypoints.sampling_fields import sampling_from_raw, thinking_budget
from sglang.srt.entrypoints.sequences import MAX_SEQUENCES, Call
from sglang.srt.entrypoints.token_id_reader import IdLists, read_id_lists
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateRequest, IdArray, SessionParams
from sglang.srt.sampling.sampling_params import SamplingParams

MULTIMODAL = Refusal("neither videos nor audio are served", ("", [], [None]))
POOLED_IMAGES = Refusal("images are for models that generate only", ("", [], [None]))
POOLED_LORA = Refusal("adapters are served of models that generate only", ("", [], [None]))
HIDDEN_STATES = Refusal("hidden states are not returned", (False, [False]))
LOGIT_PROCESSOR = Refusal("custom logit processors are not served", ("",))
DISAGGREGATION = Refusal("prefill and decode are not disaggregated here", ([], ""))

# Where a request whose body is binary has its other fields: a JSON object.
FIELDS_HEADER = "x-generate-fields"

RAW_NULL = msgspec.Raw(b"null")
NO_FIELDS: RawFields = {}


class GenerateBody(msgspec.Struct, frozen=True):
    """The served fields of /generate; lists hold one value per prompt of a batch."""

    text: str | list[str] | None = None
    input_ids: msgspec.Raw | IdLists = RAW_NULL
    input_ids_b64: str | None = None
    sampling_params: msgspec.Raw = RAW_NULL
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] = False
    logprob_start_len: Int | list[Int] = -1
    top_logprobs_num: Int | list[Int] = 0
    token_ids_logprob: list[Int | list[Int] | None] = []
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    lora_path: str | list[str | None] | None = None
    priority: Int | None = None
    include_progress: bool = False
    require_reasoning: bool = False
    max_thinking_tokens: Int | list[Int | None] | None = None
    routed_dp_rank: Int | None = None
    data_parallel_rank: Int | None = None
    session_params: SessionParams | list[SessionParams | None] | None = None
    image_data: str | list[str | list[str] | None] | None = None


GENERATE_FIELDS = FieldTable(
    GenerateBody,
    accepted=(
        "model",  # sglang-router adds it; there is one model
        "no_logs",
        "log_metrics",
        "conversation_id",
        "external_trace_header",
        "received_time",
        "custom_labels",
    ),
    refused={
        "input_embeds": Refusal("input embeddings are not served", ([],)),
        "video_data": MULTIMODAL,
        "audio_data": MULTIMODAL,
        "modalities": Refusal("videos and audio are not served", ([], ["text"], ["image"])),
        "return_hidden_states": HIDDEN_STATES,
        "return_routed_experts": Refusal("routed experts are not returned", (False,)),
        "return_bytes": Refusal("bytes are not returned", (False,)),
        "return_entropy": Refusal("entropy is not returned", (False,)),
        "session_id": Refusal("use session_params", ("",)),
        "lora_id": Refusal("name the adapter in lora_path", ("", [], [None])),
        "custom_logit_processor": LOGIT_PROCESSOR,
        "background": Refusal("background requests are not served", (False,)),
        "bootstrap_host": DISAGGREGATION,
        "bootstrap_port": DISAGGREGATION,
        "bootstrap_room": DISAGGREGATION,
        "bootstrap_pair_key": DISAGGREGATION,
    },
    refuse_unknown=True,
)


@dataclass(frozen=True)
class GenerateCall:
    """A read request: the call, and how its reply has to look.

    `prompt_ids`: each prompt's ids, filled in before the call runs when the reply shows them.
    `counts_reasoning`: the reply says how many tokens were reasoning. `images`: what names each
    prompt's images, to be loaded before the call runs; empty without any.
    """

    call: Call
    is_batch: bool
    stream: bool
    text_in_logprobs: bool
    return_prompt_ids: bool
    prompt_ids: tuple[IdArray | None, ...] = ()
    counts_reasoning: bool = False
    images: tuple[tuple[str, ...], ...] = ()

    @property
    def replies_with_list(self) -> bool:
        """True for a batch (of one, too) and for n above 1."""
        return self.is_batch or self.call.num_sequences > 1


def parse_generate(body: bytes | bytearray, preferred: RawFields = NO_FIELDS) -> GenerateCall:
    """Read a JSON body, which may be long: call it off the event loop. Raises RequestError 400.

    `preferred` are the sampling_params of requests that don't set them.
    """
    fields = split_body(
        body,
        ids_in=["input_ids"],
        text_in=["text", "input_ids_b64"],
        most_lists=MAX_SEQUENCES,
    )
    return read_generate(fields, preferred)


def parse_binary_generate(
    body: bytes | bytearray, header: bytes, preferred: RawFields = NO_FIELDS
) -> GenerateCall:
    """Read a binary body with the other fields as JSON in `header` (b"" for none).

    The ids are a view of `body`, `preferred` as for `parse_generate`. Raises RequestError 400.
    """
    fields: dict[str, FieldValue] = {**split_object(header)} if header else {}
    for name in ("text", "input_ids", "input_ids_b64"):
        if name in fields:
            raise bad_field(name, "the prompt is the body's token ids")
    fields["input_ids"] = IdLists((ids_of_body(body),), False)
    return read_generate(fields, preferred)


def read_generate(fields: Fields, preferred: RawFields = NO_FIELDS) -> GenerateCall:
    """Read and check the fields; RequestError 400 naming the first that cannot be served.

    `preferred` as for `parse_generate`.
    """
    body = GENERATE_FIELDS.read(fields)
    texts, ids, is_batch = _prompts(body)
    count = len(texts)
    rid, rids = _rids(body.rid, count, is_batch)
    params = _sampling(body.sampling_params, count, is_batch, preferred)
    picked = _picked(body.token_ids_logprob, count, is_batch)
    want = _each("return_logprob", body.return_logprob, count, is_batch)
    start = _each("logprob_start_len", body.logprob_start_len, count, is_batch)
    top = _each("top_logprobs_num", body.top_logprobs_num, count, is_batch)
    extra = _each("extra_key", body.extra_key, count, is_batch)
    salt = _each("cache_salt", body.cache_salt, count, is_batch)
    budgets = _each("max_thinking_tokens", body.max_thinking_tokens, count, is_batch)
    session = _each("session_params", body.session_params, count, is_batch)
    adapters = adapter_for_each(body.lora_path, count, is_batch)
    replica = body.routed_dp_rank
    if replica is None:
        replica = body.data_parallel_rank  # its older name
    requests = tuple(
        GenerateRequest(
            rid=rids[i],
            text=texts[i],
            input_ids=ids[i],
            sampling_params=_bounded(params[i], budgets[i]),
            stream=body.stream,
            return_logprob=want[i],
            logprob_start_len=start[i],
            top_logprobs_num=top[i],
            token_ids_logprob=picked[i],
            extra_key=prefix_key(extra[i], salt[i]),
            lora_path=adapters[i],
            priority=body.priority,
            include_progress=body.stream and body.include_progress,
            routed_dp_rank=replica,
            session=session_of(session[i]),
        )
        for i in range(count)
    )
    return GenerateCall(
        Call(rid, requests),
        is_batch,
        body.stream,
        body.return_text_in_logprobs,
        body.return_prompt_token_ids,
        counts_reasoning=body.require_reasoning,
        images=_images(body.image_data, count, is_batch),
    )


def new_rid() -> str:
    """An id for a request that brings none."""
    return uuid.uuid4().hex


def session_of(params: SessionParams | None) -> SessionParams | None:
    """What a request says of its session; None when it names none."""
    return None if params is None or params.id is None else params


def prefix_key(extra_key: str | None, cache_salt: str | None) -> str | None:
    """One key for both fields, different for every different pair; None when both are absent."""
    if not extra_key and not cache_salt:
        return None
    salt = cache_salt or ""
    return f"{len(salt)}:{salt}{extra_key or ''}"


def _prompts(body: GenerateBody) -> tuple[list[str | None], list[IdArray | None], bool]:
    """Texts, ids (one of the two per prompt), and whether the client sent a batch."""
    has_ids = isinstance(body.input_ids, IdLists) or not is_null(body.input_ids)
    given = [body.text is not None, has_ids, body.input_ids_b64 is not None]
    if sum(given) != 1:
        raise RequestError(
            "Give exactly one of 'text', 'input_ids' and 'input_ids_b64'.", 400, "BadRequestError"
        )
    if body.input_ids_b64 is not None:
        return [None], [ids_of_base64("input_ids_b64", body.input_ids_b64)], False
    if body.text is not None:
        is_batch = isinstance(body.text, list)
        texts: list[str | None] = list(body.text) if isinstance(body.text, list) else [body.text]
        _check_count("text", len(texts))
        if not all(texts):
            raise bad_field("text", "a prompt is empty")
        return texts, [None] * len(texts), is_batch
    lists = read_id_prompts("input_ids", body.input_ids)
    return [None] * len(lists.arrays), list(lists.arrays), lists.is_batch


def read_id_prompts(name: str, value: msgspec.Raw | IdLists) -> IdLists:
    """A list of ids, or a list of such lists; RequestError 400 naming what is neither."""
    if isinstance(value, IdLists):
        return value
    text = bytes(memoryview(value))
    if text[:1] != b"[":
        raise bad_field(name, "expected a list of token ids")
    return read_id_lists(name, text, 0, MAX_SEQUENCES)[0]


def _check_count(name: str, count: int) -> None:
    if count == 0:
        raise bad_field(name, "the batch is empty")
    if count > MAX_SEQUENCES:
        raise bad_field(name, f"{count} prompts in one request; the limit is {MAX_SEQUENCES}")


def _images(
    value: str | Sequence[str | list[str] | None] | None, count: int, is_batch: bool
) -> tuple[tuple[str, ...], ...]:
    """Each prompt's images: one for all, a list for the only prompt, or one or a list for each."""
    if not value:
        return ()
    if isinstance(value, str):
        return ((value,),) * count
    if not is_batch and all(isinstance(item, str) for item in value):
        return (tuple(item for item in value if isinstance(item, str)),)
    if len(value) != count:
        raise bad_field("image_data", f"{len(value)} values for {count} prompts")
    rows = tuple((item,) if isinstance(item, str) else tuple(item or ()) for item in value)
    return rows if any(rows) else ()


def _rids(rid: str | list[str] | None, count: int, is_batch: bool) -> tuple[str, list[str]]:
    """The call's id and each prompt's."""
    if rid is None:
        call_rid = new_rid()
    elif isinstance(rid, str):
        if not rid:
            raise bad_field("rid", "it is empty")
        call_rid = rid
    else:
        rids: list[str] = _each("rid", rid, count, is_batch)
        if not all(rids) or len(set(rids)) != count:
            raise bad_field("rid", "ids must be different and not empty")
        # With one id each, every prompt is aborted by its own.
        return (rids[0], rids) if count == 1 else (new_rid(), rids)
    return call_rid, [call_rid] if not is_batch else [f"{call_rid}_{i}" for i in range(count)]


def _sampling(
    raw: msgspec.Raw, count: int, is_batch: bool, preferred: RawFields
) -> list[SamplingParams]:
    if bytes(memoryview(raw)[:1]) == b"[":
        rows = _each("sampling_params", split_list(raw), count, is_batch)
        return [_one_sampling(row, preferred) for row in rows]
    return [_one_sampling(raw, preferred)] * count


_OBJECT = msgspec.json.Decoder(RawFields | None)


def _one_sampling(raw: msgspec.Raw, preferred: RawFields) -> SamplingParams:
    given = decode_field("sampling_params", raw, _OBJECT) or {}
    return sampling_from_raw({**preferred, **given})


def _bounded(params: SamplingParams, max_thinking_tokens: int | None) -> SamplingParams:
    """The parameters with the request's own budget, which goes before theirs."""
    if max_thinking_tokens is None:
        return params
    budget = thinking_budget(max_thinking_tokens, {})
    return msgspec.structs.replace(params, max_thinking_tokens=budget)


def _picked(
    value: Sequence[int | list[int] | None], count: int, is_batch: bool
) -> list[tuple[int, ...]]:
    """`token_ids_logprob`: one list for all prompts, or one list (or null) per prompt."""
    flat = tuple(item for item in value if isinstance(item, int))
    if len(flat) == len(value):
        return [flat] * count
    if flat:
        raise bad_field("token_ids_logprob", "expected ids, or one list of ids per prompt")
    rows = [tuple(item) if isinstance(item, list) else () for item in value]
    return _each("token_ids_logprob", rows, count, is_batch)


def _each(name: str, value: Any, count: int, is_batch: bool) -> list[Any]:
    """A value per prompt: a list as it is (its length must fit), anything else repeated."""
    if not isinstance(value, list):
        return [value] * count
    if not is_batch or len(value) != count:
        raise bad_field(name, f"{len(value)} values for {count} prompts")
    return value


def adapter_for_each(
    lora_path: str | list[str | None] | None, count: int, is_batch: bool
) -> list[str | None]:
    """The LoRA adapter of each prompt: one for all, or a list of one (or null) per prompt."""
    return _each("lora_path", lora_path or None, count, is_batch)
