"""Sampling parameters as clients write them: `sampling_params` of /generate and of the Engine.

Turns raw JSON, or a Python dict, into `SamplingParams`; ranges are checked later by its `verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.request_body import RawFields
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal
from sglang.srt.sampling.sampling_params import SamplingParams

CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")


class SamplingBody(msgspec.Struct, frozen=True):
    """The served fields; names, defaults and meaning as in `SamplingParams`."""

    max_new_tokens: Int | None = 128
    stop: str | list[str] = []
    stop_regex: str | list[str] = []
    stop_token_ids: list[Int] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: Int = 0
    n: Int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] = {}
    sampling_seed: Int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    custom_params: dict[str, Any] = {}


SAMPLING_FIELDS = FieldTable(
    SamplingBody,
    # It only changes how the same tokens are cut into events.
    accepted=("stream_interval",),
    refused={
        "beam_width": Refusal("beam search is not served", (0, 1)),
    },
    refuse_unknown=True,
)


def sampling_from_raw(fields: RawFields) -> SamplingParams:
    """`SamplingParams` from the raw fields of a JSON object; RequestError 400 naming a bad one."""
    body = SAMPLING_FIELDS.read(fields, "sampling_params.")
    values = {name: getattr(body, name) for name in body.__struct_fields__}
    values["stop"] = stop_strings(body.stop)
    values["stop_regex"] = stop_patterns(body.stop_regex)
    values["stop_token_ids"] = tuple(body.stop_token_ids)
    values["logit_bias"] = logit_bias("sampling_params.logit_bias", body.logit_bias)
    values |= {kind: getattr(body, kind) or None for kind in CONSTRAINTS}  # "" asks for none
    values["max_thinking_tokens"] = thinking_budget(None, values.pop("custom_params"))
    return SamplingParams(**values)


def thinking_budget(tokens: int | None, custom_params: Mapping[str, Any]) -> int | None:
    """`max_thinking_tokens`, else what `custom_params` has as `thinking_budget`; None: no bound.

    Everything else in `custom_params` is for custom logit processors, which are not served. -1
    asks for no bound. RequestError 400 for what is no number.
    """
    name, value = "max_thinking_tokens", tokens
    if value is None:
        name, value = "custom_params.thinking_budget", custom_params.get("thinking_budget")
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise bad_field(name, f"expected a number of tokens, got {value!r}")
    return value


def stop_strings(stop: str | list[str]) -> tuple[str, ...]:
    """One stop string or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop)


def stop_patterns(stop_regex: str | list[str]) -> tuple[str, ...]:
    """One stop pattern or several, as a tuple; "" asks for none."""
    return stop_strings(stop_regex) if stop_regex else ()


def logit_bias(name: str, biases: Mapping[str, float]) -> dict[int, float]:
    """JSON's object with token ids as keys; RequestError 400 when a key is no integer."""
    result: dict[int, float] = {}
    for key, bias in biases.items():
        digits = key[1:] if key.startswith("-") else key
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
            raise bad_field(name, f"key {key[:40]!r} is not a token id")
        result[int(key)] = bias
    return result
