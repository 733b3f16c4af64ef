"""Whether a request can be served, decided on values alone, before any work is done for it.

Called by the TokenizerManager. Each check raises `RequestError` (400) with a sentence for the
client; none has side effects.
"""

from __future__ import annotations

import msgspec
import numpy as np

from sglang.srt.configs.priority_args import MAX_PRIORITY
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateRequest, IdArray
from sglang.srt.managers.stop_regex import check_stop_regex
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer.tokenizer import is_unicode

_EMPTY_PROMPT = "The prompt is empty: it must have at least one token."
_IDS_AT_ONCE = 1 << 18
MAX_TOP_LOGPROBS = 1024
MAX_PICKED_LOGPROBS = 4096


def check_fields(
    request: GenerateRequest,
    *,
    vocab_size: int,
    has_tokenizer: bool,
    num_replicas: int = 1,
    no_constraints: str | None = None,
    refuses_priority: bool = False,
) -> None:
    """Check everything that needs no token ids.

    `no_constraints` says why json_schema, regex and ebnf can't be served; None: they are.
    `refuses_priority`: requests that name a priority are not served.
    """
    wanted = request.routed_dp_rank
    if wanted is not None and not 0 <= wanted < num_replicas:
        raise RequestError(
            f"routed_dp_rank {wanted} is not one of the {num_replicas} replicas, counted from 0."
        )
    if (request.text is None) == (request.input_ids is None):
        raise RequestError("Exactly one of text and input_ids must be given.")
    if request.text == "":
        raise RequestError(_EMPTY_PROMPT)
    _check_wire_fields(request)
    if refuses_priority and request.priority is not None:
        raise RequestError(
            "priority has no effect on this server (--abort-on-priority-when-disabled without "
            "--enable-priority-scheduling): leave it out."
        )
    if not has_tokenizer:
        if request.text is not None:
            raise RequestError(
                "The server has no tokenizer (--skip-tokenizer-init): send input_ids, not text."
            )
        if request.sampling_params.stop or request.sampling_params.stop_regex:
            raise RequestError(
                "stop and stop_regex need a tokenizer, but the server has none "
                "(--skip-tokenizer-init): use stop_token_ids."
            )
    if no_constraints is not None and request.sampling_params.held_to is not None:
        raise RequestError(no_constraints)
    request.sampling_params.verify(vocab_size)
    check_stop_regex(request.sampling_params.stop_regex)
    if request.return_logprob:
        _check_logprob_fields(request, vocab_size)


def _check_wire_fields(request: GenerateRequest) -> None:
    """Check what could not be sent to another process: text that is not Unicode, huge numbers."""
    fields = [("rid", request.rid), ("extra_key", request.extra_key)]
    fields.append(("lora_path", request.lora_path))
    fields += [("stop", stop) for stop in request.sampling_params.stop]
    fields += [("stop_regex", pattern) for pattern in request.sampling_params.stop_regex]
    constraint = request.sampling_params.constraint
    if constraint is not None:
        fields.append((constraint.kind, constraint.text))
    for name, value in fields:
        if value is not None and not is_unicode(value):
            raise RequestError(f"{name} is not valid Unicode.")
    priority = request.priority
    if priority is not None and not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise RequestError(
            f"priority must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], got {priority}."
        )


def _check_logprob_fields(request: GenerateRequest, vocab_size: int) -> None:
    most = min(MAX_TOP_LOGPROBS, vocab_size)
    if not 0 <= request.top_logprobs_num <= most:
        raise RequestError(
            f"top_logprobs_num must be in [0, {most}], got {request.top_logprobs_num}."
        )
    if len(request.token_ids_logprob) > MAX_PICKED_LOGPROBS:
        raise RequestError(
            f"token_ids_logprob may name at most {MAX_PICKED_LOGPROBS} ids, "
            f"got {len(request.token_ids_logprob)}."
        )
    for token_id in request.token_ids_logprob:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token_ids_logprob has token id {token_id}, but the vocabulary has "
                f"{vocab_size} ids."
            )
    if request.logprob_start_len < -1:
        raise RequestError(
            f"logprob_start_len must be -1 (none of the prompt) or a position in it, "
            f"got {request.logprob_start_len}."
        )


def check_ids(input_ids: IdArray, vocab_size: int, name: str = "input_ids") -> None:
    """Check that a prompt has tokens and that the model has an embedding for each.

    `name` is what the message calls the ids.
    """
    if input_ids.ndim != 1 or len(input_ids) == 0:
        raise RequestError(_EMPTY_PROMPT)
    for start in range(0, len(input_ids), _IDS_AT_ONCE):  # bounded memory, whatever the length
        block = input_ids[start : start + _IDS_AT_ONCE]
        if block.min() >= 0 and block.max() < vocab_size:
            continue
        at = start + int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
        raise RequestError(
            f"{name}[{at}] is {int(input_ids[at])}, but the vocabulary has {vocab_size} ids."
        )


def fit_to_context(num_tokens: int, params: SamplingParams, context_length: int) -> SamplingParams:
    """`params` with a definite max_new_tokens for a prompt of `num_tokens`.

    None becomes what the effective context leaves. The two refusals read as SGLang's do. A prompt
    that gets no new token may fill the context.
    """
    if num_tokens + (params.max_new_tokens != 0) > context_length:
        raise RequestError(
            f"The input ({num_tokens} tokens) is longer than the model's context length "
            f"({context_length} tokens)."
        )
    if params.max_new_tokens is None:
        room = context_length - num_tokens
        if params.min_new_tokens > room:
            raise RequestError(
                f"min_new_tokens is {params.min_new_tokens}, but after the prompt's {num_tokens} "
                f"tokens the context length of {context_length} tokens has room for {room}."
            )
        return msgspec.structs.replace(params, max_new_tokens=room)
    total = num_tokens + params.max_new_tokens
    if total > context_length:
        raise RequestError(
            "Requested token count exceeds the model's maximum context length of "
            f"{context_length} tokens. You requested a total of {total} tokens: {num_tokens} "
            f"tokens from the input and {params.max_new_tokens} tokens for the completion."
        )
    return params


def truncate(
    input_ids: IdArray, params: SamplingParams, context_length: int
) -> tuple[IdArray, SamplingParams]:
    """What of a request fits (--allow-auto-truncate): its prompt's beginning, fewer new tokens.

    At least one token of the context is left for the output.
    """
    kept = input_ids[: max(1, context_length - 1)]
    room = context_length - len(kept)
    most = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    least = min(params.min_new_tokens, most)
    return kept, msgspec.structs.replace(params, max_new_tokens=most, min_new_tokens=least)


def prompt_logprob_start(request: GenerateRequest, num_tokens: int, most: int) -> int:
    """The first prompt position whose log probability is computed; `num_tokens` for none.

    At most `most` prompt tokens (--max-prompt-logprob-tokens) may have them.
    """
    if not request.return_logprob or request.logprob_start_len == -1:
        return num_tokens
    start = request.logprob_start_len
    if start > num_tokens:
        raise RequestError(
            f"logprob_start_len is {start}, but the prompt has only {num_tokens} tokens."
        )
    if num_tokens - start > most:
        raise RequestError(
            f"Log probabilities of {num_tokens - start} prompt tokens were asked for, but the "
            f"limit is {most} (--max-prompt-logprob-tokens); raise logprob_start_len."
        )
    return start


def merged_stop_ids(params: SamplingParams, end_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The request's stop ids and, unless `ignore_eos`, the model's end-of-text ids, sorted."""
    if params.ignore_eos:
        return params.stop_token_ids
    return tuple(sorted({*params.stop_token_ids, *end_ids}))
