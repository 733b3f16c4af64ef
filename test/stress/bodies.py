"""Bodies for every door: good ones, and what random changes make of them. Pure."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

from sglang.srt.entrypoints import (
    admin_doors,
    api_doors,
    encode_api,
    generate_request_body,
    lora_doors,
    memory_doors,
    parser_doors,
    sampling_fields,
    session_doors,
)
from sglang.srt.entrypoints.anthropic import messages_fields
from sglang.srt.entrypoints.ollama import ollama_doors, ollama_fields
from sglang.srt.entrypoints.openai import pooling_fields, protocol, responses_fields
from sglang.srt.entrypoints.request_fields import FieldTable

TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "r"},
    {"role": "user", "content": "so"},
]
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "stop": ["zz"]}
# Path, method, field tables (for names) and a good body.
Door = tuple[str, str, tuple[FieldTable[Any], ...], dict[str, Any]]
DOORS: tuple[Door, ...] = (
    (
        "/generate",
        "POST",
        (generate_request_body.GENERATE_FIELDS,),
        {
            "text": "abc",
            "sampling_params": {"max_new_tokens": 6, "temperature": 0.5, "stop": ["q"], "n": 2},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
            "token_ids_logprob": [1, 2],
            "stream": False,
            "extra_key": "k",
        },
    ),
    (
        "/generate",
        "POST",
        (generate_request_body.GENERATE_FIELDS, sampling_fields.SAMPLING_FIELDS),
        {
            "input_ids": [[1, 2, 3], [4, 5]],
            "sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 4, "regex": "[a-z]+"}],
            "return_logprob": [True, False],
            "rid": ["", "y"],
            "lora_path": [None, "a1"],
            "session_params": None,
            "priority": 1,
        },
    ),
    (
        "/v1/chat/completions",
        "POST",
        (protocol.CHAT_FIELDS,),
        {
            "model": "m",
            "messages": TURNS,
            "max_tokens": 6,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            **SAMPLING,
        },
    ),
    (
        "/v1/chat/completions",
        "POST",
        (protocol.CHAT_FIELDS,),
        {
            "messages": TURNS[:2],
            "max_completion_tokens": 8,
            "n": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
            },
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"a": 1},
            "max_thinking_tokens": 3,
        },
    ),
    (
        "/v1/completions",
        "POST",
        (protocol.COMPLETION_FIELDS,),
        {
            "prompt": ["abc", "de"],
            "max_tokens": 5,
            "echo": True,
            "logprobs": 2,
            "n": 2,
            "stop_regex": ["a+b"],
            "logit_bias": {"5": 2.0},
            "stop_token_ids": [9],
            **SAMPLING,
        },
    ),
    (
        "/v1/responses",
        "POST",
        (responses_fields.RESPONSES_FIELDS,),
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ],
            "max_output_tokens": 16,
            "tools": [{"type": "function", **TOOL}],
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
            "reasoning": {"effort": "low"},
            "include": ["message.output_text.logprobs"],
        },
    ),
    (
        "/v1/messages",
        "POST",
        (messages_fields.MESSAGES_FIELDS,),
        {
            "model": "m",
            "max_tokens": 6,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}],
                },
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["q"],
        },
    ),
    (
        "/v1/messages/count_tokens",
        "POST",
        (messages_fields.COUNT_FIELDS,),
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    ),
    (
        "/api/chat",
        "POST",
        (ollama_fields.OLLAMA_CHAT_FIELDS,),
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "options": {"num_predict": 5, "temperature": 0.5, "stop": ["q"], "seed": 1},
            "tools": [{"type": "function", "function": TOOL}],
            "format": SCHEMA,
        },
    ),
    (
        "/api/generate",
        "POST",
        (ollama_fields.OLLAMA_GENERATE_FIELDS, ollama_fields.OPTION_FIELDS),
        {"model": "m", "prompt": "hi", "options": {"num_predict": 5}, "raw": True},
    ),
    ("/api/show", "POST", (ollama_doors.SHOW_FIELDS,), {"model": "m"}),
    ("/encode", "POST", (encode_api.ENCODE_FIELDS,), {"text": "a"}),
    ("/v1/embeddings", "POST", (pooling_fields.EMBEDDING_FIELDS,), {"input": ["a", "b"]}),
    ("/v1/classify", "POST", (pooling_fields.CLASSIFY_FIELDS,), {"input": "a"}),
    (
        "/v1/rerank",
        "POST",
        (pooling_fields.RERANK_FIELDS,),
        {"query": "q", "documents": ["a", "b"]},
    ),
    (
        "/v1/score",
        "POST",
        (pooling_fields.SCORE_FIELDS,),
        {"query": "q", "items": ["a", "b"], "label_token_ids": [1, 2], "apply_softmax": True},
    ),
    ("/tokenize", "POST", (api_doors.TOKENIZE_FIELDS,), {"prompt": ["a", "b"]}),
    ("/tokenize", "POST", (api_doors.TOKENIZE_FIELDS,), {"messages": TURNS}),
    ("/detokenize", "POST", (api_doors.DETOKENIZE_FIELDS,), {"tokens": [[1, 2], [3]]}),
    (
        "/separate_reasoning",
        "POST",
        (parser_doors.SEPARATE_REASONING_FIELDS,),
        {"text": "<think>a</think>b", "reasoning_parser": "deepseek-r1"},
    ),
    (
        "/parse_function_call",
        "POST",
        (parser_doors.PARSE_FUNCTION_CALL_FIELDS,),
        {
            "text": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            "tools": [{"type": "function", "function": TOOL}],
            "tool_call_parser": "qwen25",
        },
    ),
    (
        "/open_session",
        "POST",
        (session_doors.OPEN_SESSION_FIELDS,),
        {"capacity_of_str_len": 10, "session_id": "s1", "streaming": False, "timeout": 5},
    ),
    ("/close_session", "POST", (session_doors.CLOSE_SESSION_FIELDS,), {"session_id": "s1"}),
    ("/abort_request", "POST", (admin_doors.ABORT_FIELDS,), {"rid": "r", "abort_all": False}),
    ("/set_kv_budget", "POST", (memory_doors.BUDGET_FIELDS,), {"bytes": 400_000, "timeout_s": 1}),
    ("/compact_kv", "POST", (memory_doors.COMPACT_FIELDS,), {"timeout_s": 1}),
    (
        "/load_lora_adapter",
        "POST",
        (lora_doors.LOAD_FIELDS,),
        {"lora_name": "x", "lora_path": "/nowhere", "pinned": False},
    ),
    ("/unload_lora_adapter", "POST", (lora_doors.UNLOAD_FIELDS,), {"lora_name": "x"}),
    ("/flush_cache", "POST", (), {}),
)
READS = (
    *("/health", "/v1/models", "/v1/models/m", "/v1/models/%00", "/model_info", "/server_info"),
    *("/get_load", "/metrics", "/api/tags", "/api/ps", "/api/version", "/v1/responses/nope"),
    *("/flush_cache?timeout=x", "/flush_cache?timeout=-1", "/open_session", "/nothing"),
    *("/v1/responses/%ff", "/health_generate", "/flush_cache?timeout=1e999", "/"),
)


class Text(str):
    """JSON text that is put into a body as it stands."""


_DEEP = Text("[" * 300 + "]" * 300)
ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 100, 0.5, -0.5, 1e-320, 1e308),
    *(1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63) - 1, 1 << 200),
    *(Text("1e999"), Text("-1e999"), Text("NaN"), Text("01"), Text('"\\ud800"'), _DEEP),
    *("", "a", "\x00", "é\U0001f600", "x" * 5000, "{", "auto", "none", "required", "a1", "s1"),
    *("(a", "[a-z]{1,9}", "(?=a)", "a{1000000}", 'root ::= "a"', "root ::= root", "{}", "[]"),
    *([], [[]], [1], ["a"], [None], [""], [[1, 2], "a"], [1.5], [-1], [1 << 40], [{}], [[[]]]),
    *({}, {"a": 1}, {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}),
    *({"type": "structural_tag", "structures": [], "triggers": []}, {"type": "function"}),
    *({"role": "user"}, [{"role": "user", "content": None}], {"type": "regex", "pattern": "a"}),
    *([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],),
    *({"id": "s1"}, {"id": "s1", "rid": "x", "offset": -5}, {"id": "s1", "replace": True}),
    *({"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#/x"}}}, {"5": 1e9}),
    *(json.dumps(SCHEMA), {"type": "array", "items": {"type": "string"}, "minItems": 1 << 40}),
)


@dataclass(frozen=True)
class Call:
    """One request; its client goes after `leaves` bytes of the reply (None: it stays)."""

    method: str
    path: str
    body: bytes
    kind: str = "application/json"
    leaves: int | None = None


def draw_call(dice: random.Random) -> Call:
    """A call that may be good, bad or broken."""
    if dice.random() < 0.06:
        return Call(dice.choice(("GET", "GET", "HEAD", "DELETE", "POST")), dice.choice(READS), b"")
    path, method, tables, good = dice.choice(DOORS)
    body = copy.deepcopy(good)
    names = [name for table in tables for name in _names(table)] or ["a"]
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        _change(dice, body, names)
    if "stream" in names and dice.random() < 0.35:
        body["stream"] = True
    data = _encode(body)
    broken = dice.random()
    if broken < 0.02:
        data = data[: dice.randrange(len(data))]
    elif broken < 0.04:
        data = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 60)))
    elif broken < 0.06:
        data = data[:-1] + b',"stream":true' * dice.choice((1, 50)) + b"}"
    kinds = ("application/json", "text/plain", "application/octet-stream", "multipart/form-data")
    kind = kinds[0] if dice.random() < 0.95 else dice.choice(kinds)
    leaves = dice.choice((0, 1, 200, 500)) if dice.random() < 0.12 else None
    return Call(method, path, data, kind, leaves)


def _names(table: FieldTable[Any]) -> list[str]:
    return sorted({*table.served, *table.accepted, *table.refused})


def _change(dice: random.Random, body: dict[str, Any], names: list[str]) -> None:
    """Set, drop or spoil a field of a body, or something deep inside of one."""
    if dice.random() < 0.55 or not body:
        body[dice.choice(names)] = copy.deepcopy(dice.choice(ATOMS))
        return
    places = list(_places(body))
    holder, key = dice.choice(places)
    if dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(dice.choice(ATOMS))


def _places(value: Any) -> Any:
    """Every (container, key) inside of a value."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _encode(value: Any) -> bytes:
    """JSON as clients write it, with `Text` as it stands."""
    raw: list[str] = []

    def mark(one: Any) -> Any:
        if isinstance(one, Text):
            raw.append(one)
            return f"@raw{len(raw) - 1}@"
        if isinstance(one, dict):
            return {key: mark(item) for key, item in one.items()}
        return [mark(item) for item in one] if isinstance(one, list) else one

    text = json.dumps(mark(value))
    for number, one in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', one)
    return text.encode()
