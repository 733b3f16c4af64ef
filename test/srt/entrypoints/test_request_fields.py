"""The field tables: every documented field has one kind, and reading follows it."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang.srt.entrypoints.generate_request_body import GENERATE_FIELDS, read_generate
from sglang.srt.entrypoints.openai.protocol import CHAT_FIELDS, COMPLETION_FIELDS
from sglang.srt.entrypoints.request_body import split_object
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal, raw_from_python
from sglang.srt.entrypoints.sampling_fields import SAMPLING_FIELDS
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.errors import RequestError


class Body(msgspec.Struct, frozen=True):
    count: Int = 3
    limit: Int | None = 5
    names: list[str] = []


def table(*, refuse_unknown: bool) -> FieldTable[Body]:
    return FieldTable(
        Body,
        accepted=("hint",),
        refused={"beam": Refusal("no beams", (1, False, {"type": "none"}))},
        refuse_unknown=refuse_unknown,
    )


def fields(**values: Any) -> dict[str, msgspec.Raw]:
    return split_object(json.dumps(values).encode())


def test_null_means_not_given_unless_the_type_has_a_none() -> None:
    body = table(refuse_unknown=True).read(fields(count=None, limit=None, hint=None, beam=None))
    assert body == Body(count=3, limit=None)


def test_accepted_fields_take_any_value() -> None:
    assert table(refuse_unknown=True).read(fields(hint={"x": [1]})) == Body()


def test_unknown_fields_are_refused_or_ignored() -> None:
    with pytest.raises(RequestError, match=r"Unknown field 'top\.other'"):
        table(refuse_unknown=True).read(fields(other=1), "top.")
    assert table(refuse_unknown=False).read(fields(other=1)) == Body()


@pytest.mark.parametrize("value", [1, False, {"type": "none"}, None])
def test_neutral_values_of_refused_fields_pass(value: Any) -> None:
    assert table(refuse_unknown=True).read(fields(beam=value)) == Body()


@pytest.mark.parametrize("value", [True, 0, 1.0, 2, "", {}, {"type": "none", "x": 1}])
def test_other_values_of_refused_fields_do_not(value: Any) -> None:
    with pytest.raises(RequestError, match="'beam': no beams"):
        table(refuse_unknown=True).read(fields(beam=value))


def test_types_are_strict_and_named() -> None:
    for bad in ({"count": "1"}, {"count": True}, {"count": 1.0}, {"count": 2**63}):
        with pytest.raises(RequestError, match="'count'"):
            table(refuse_unknown=True).read(fields(**bad))
    with pytest.raises(RequestError, match=r"'names'.*\$\[1\]"):
        table(refuse_unknown=True).read(fields(names=["a", 1]))


def test_python_values_follow_the_same_rules() -> None:
    call = read_generate(
        raw_from_python(
            {
                "text": None,
                "input_ids": np.arange(3),
                "sampling_params": {"temperature": np.float32(0.5), "top_k": np.int64(4)},
                "stream": False,
            }
        )
    )
    prompt = call.call.prompts[0]
    assert prompt.input_ids is not None
    assert prompt.input_ids.tolist() == [0, 1, 2]
    assert prompt.sampling_params.temperature == 0.5
    assert prompt.sampling_params.top_k == 4


@pytest.mark.parametrize(
    "values",
    [
        {"sampling_params": {"temperature": math.nan}},
        {"sampling_params": [{"temperature": math.inf}]},
        {"priority": math.nan},
        {"text": object()},
        {"text": "\ud800"},
        {"input_ids": {1, 2}},
        {"priority": 2**70},
    ],
)
def test_python_values_that_json_cannot_carry(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        read_generate(raw_from_python({"text": "x", **values}))


# Names that SGLang documents; each must be in one of the three kinds.
GENERATE_NAMES = """text input_ids input_embeds rid sampling_params stream return_logprob
logprob_start_len top_logprobs_num token_ids_logprob return_text_in_logprobs return_hidden_states
return_prompt_token_ids return_bytes return_entropy session_id session_params lora_path
custom_logit_processor priority extra_key cache_salt require_reasoning max_thinking_tokens
background no_logs image_data video_data audio_data modalities routed_dp_rank bootstrap_host
bootstrap_port bootstrap_room model"""
SAMPLING_NAMES = """max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p
frequency_penalty presence_penalty repetition_penalty min_new_tokens n json_schema regex ebnf
structural_tag ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim
stream_interval logit_bias sampling_seed custom_params beam_width"""
CHAT_NAMES = """messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens
max_completion_tokens n presence_penalty response_format seed stop stream stream_options
temperature top_p user tool_choice top_k min_p min_tokens regex ebnf repetition_penalty
stop_token_ids stop_regex no_stop_trim ignore_eos continue_final_message skip_special_tokens
lora_path session_params separate_reasoning stream_reasoning chat_template_kwargs
reasoning_effort thinking return_meta_info return_token_ids return_prompt_token_ids
return_cached_tokens_details rid extra_key cache_salt priority input_ids
custom_logit_processor"""
COMPLETION_NAMES = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n
presence_penalty seed stop stream stream_options suffix temperature top_p user top_k min_p
min_tokens json_schema regex ebnf repetition_penalty stop_token_ids no_stop_trim ignore_eos
skip_special_tokens lora_path session_params"""


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (GENERATE_FIELDS, GENERATE_NAMES),
        (SAMPLING_FIELDS, SAMPLING_NAMES),
        (CHAT_FIELDS, CHAT_NAMES),
        (COMPLETION_FIELDS, COMPLETION_NAMES),
    ],
    ids=["generate", "sampling", "chat", "completions"],
)
def test_every_documented_field_has_one_kind(table: FieldTable[Any], names: str) -> None:
    for name in names.split():
        kinds = (name in table.served, name in table.accepted, name in table.refused)
        assert sum(kinds) == 1, (name, kinds)


def test_an_array_of_ids_is_copied_and_not_written_as_json() -> None:
    ids = np.arange(3, dtype=np.int32)
    fields = raw_from_python({"input_ids": ids})
    assert isinstance(fields["input_ids"], IdLists)
    (prompt,) = read_generate(fields).call.prompts
    assert prompt.input_ids is not None
    assert not np.shares_memory(prompt.input_ids, ids)
    assert prompt.input_ids.tolist() == [0, 1, 2]
    for other in (ids.reshape(1, 3), ids.astype(np.int64)):
        (prompt,) = read_generate(raw_from_python({"input_ids": other})).call.prompts
        assert prompt.input_ids is not None
        assert prompt.input_ids.tolist() == [0, 1, 2]
