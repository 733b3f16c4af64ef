"""Where reasoning is in an answer to a raw prompt, and whether its length can be bounded.

For /generate and /v1/completions; chats know it from their template's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.managers.generate_request import GenerateRequest
from sglang.srt.parser.answer_parser import GPT_OSS, AnswerForm, ParserNames
from sglang.srt.sampling.sampling_params import SamplingParams

# Of a prompt that is ids: enough to see whether it ends with a marker of reasoning.
_NUM_END_IDS = 16


def check_budget(params: SamplingParams, names: ParserNames) -> None:
    """Raise RequestError (400) for a budget of reasoning where nobody knows what is reasoning."""
    if params.max_thinking_tokens is None:
        return
    if names.reasoning is None:
        raise bad_field("max_thinking_tokens", "the server has no --reasoning-parser")
    if names.reasoning == GPT_OSS:
        raise bad_field("max_thinking_tokens", f"it is not served with the parser {GPT_OSS}")


def with_reasoning(
    prompt: GenerateRequest, parser: str | None, text_of: Callable[[int], str]
) -> tuple[GenerateRequest, AnswerForm]:
    """A request whose parameters say what reasoning comes first, and how its answer is read.

    `parser` is --reasoning-parser, `text_of` the text of a token. Raises RequestError (400).
    """
    params, names = prompt.sampling_params, ParserNames(reasoning=parser)
    check_budget(params, names)
    form = AnswerForm(
        names,
        tools={},
        max_calls=None,
        prompt=_end_of(prompt, text_of),
        continued="",
        separates=True,
        is_held=params.constraint is not None,
        is_bounded=params.max_thinking_tokens is not None,
    )
    params = msgspec.structs.replace(params, reasoning=form.free_reasoning)
    return replace(prompt, sampling_params=params), form


def _end_of(prompt: GenerateRequest, text_of: Callable[[int], str]) -> str:
    """The text at the end of a prompt."""
    if prompt.input_ids is None:
        return prompt.text or ""
    return "".join(text_of(int(token_id)) for token_id in prompt.input_ids[-_NUM_END_IDS:])
