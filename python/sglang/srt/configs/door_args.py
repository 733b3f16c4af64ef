"""What the doors need to be told: which model, where to listen, how the APIs answer.

The first part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.flag_spec import flag
from sglang.srt.configs.parser_names import (
    AUTO_PARSER,
    COMPLETION_TEMPLATES,
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
)
from sglang.srt.utils.sizes import parse_bytes, parse_count

MODEL = "Model and tokenizer"
HTTP = "HTTP server"
API = "API"


@dataclass(frozen=True)
class DoorArgs:
    """Settings of the model's place, the HTTP server and the APIs."""

    # ---- model and tokenizer
    model_path: str = flag(
        dataclasses.MISSING,
        "A Hugging Face model directory or a .gguf file.",
        group=MODEL,
        aliases=("--model",),
        metavar="PATH",
    )
    tokenizer_path: str = flag(
        None, "Where the tokenizer is.", group=MODEL, default_text="the model path", metavar="PATH"
    )
    load_format: str = flag(
        "auto",
        "Format of the weights; dummy gives random weights.",
        group=MODEL,
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    trust_remote_code: bool = flag(
        False, "Allow Python code that comes with the model's tokenizer.", group=MODEL
    )
    context_length: int | None = flag(
        None,
        "Longest prompt plus output in tokens (human-readable: 128k, 1M). Clamped, with a "
        "warning, to what the KV memory can hold; above the model's trained length it needs "
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1.",
        group=MODEL,
        parse=parse_count,
        default_text="the model's",
        metavar="TOKENS",
        minimum=1,
    )
    json_model_override_args: str = flag(
        "{}", "A JSON object that replaces fields of the model's config.", group=MODEL
    )
    enable_multimodal: bool = flag(
        False,
        "Serve images: load the vision tower of a Llama 4 checkpoint as well (docs/images.md). "
        "Nothing happens for models that have none.",
        group=MODEL,
    )
    skip_tokenizer_init: bool = flag(
        False, "Load no tokenizer: requests bring input_ids and get output_ids.", group=MODEL
    )

    is_embedding: bool = flag(
        False,
        "Serve vectors of prompts in place of answers. Classifiers, and checkpoints that are a "
        "decoder alone, are served so without it.",
        group=MODEL,
    )
    allow_auto_truncate: bool = flag(
        False,
        "Cut prompts that are too long for the context, keeping their beginning, and generate as "
        "many tokens as fit, instead of refusing with 400.",
        group=MODEL,
    )

    # ---- HTTP server
    host: str = flag("127.0.0.1", "Address to listen on.", group=HTTP)
    port: int = flag(30000, "Port to listen on.", group=HTTP, parse=int, minimum=1, maximum=65535)
    api_key: str | None = flag(
        None,
        "Key, as Bearer or x-api-key, that every endpoint except health asks for.",
        group=HTTP,
        metavar="KEY",
    )
    admin_api_key: str | None = flag(
        None,
        "Bearer key that /set_kv_budget, /compact_kv, /flush_cache, /load_lora_adapter and "
        "/unload_lora_adapter ask for instead.",
        group=HTTP,
        default_text="the --api-key",
        metavar="KEY",
    )
    max_request_bytes: int | None = flag(
        None,
        "Largest request body (bytes with units), enforced while reading. Not in SGLang.",
        group=HTTP,
        parse=parse_bytes,
        default_text="16 bytes x effective context + 1 MiB, at least 32 MiB",
        metavar="BYTES",
        minimum=1,
    )
    skip_server_warmup: bool = flag(
        False, "Say ready without generating a first token.", group=HTTP
    )

    # ---- API
    served_model_name: str = flag(
        None,
        "The model name that /v1/models and /model_info show.",
        group=API,
        default_text="the model path",
        metavar="NAME",
    )
    chat_template: str | None = flag(
        None, "A Jinja chat template: a file, or the template itself.", group=API
    )
    completion_template: str | None = flag(
        None,
        "How the model is asked for what is missing before the suffix of /v1/completions; without "
        "it a suffix is refused.",
        group=API,
        choices=COMPLETION_TEMPLATES,
    )
    tool_call_parser: str | None = flag(
        None,
        "How the model writes tool calls, which then come back as tool_calls. auto: as its chat "
        "template shows. Without it the template gets the tools and the answer is text.",
        group=API,
        choices=(AUTO_PARSER, *TOOL_CALL_PARSERS),
    )
    reasoning_parser: str | None = flag(
        None,
        "How the model marks its reasoning, which then comes back as reasoning_content. auto: as "
        "its chat template shows. Without it reasoning is part of the content.",
        group=API,
        choices=(AUTO_PARSER, *REASONING_PARSERS),
    )
    sampling_defaults: str = flag(
        "model",
        "Where sampling defaults come from: the model's generation_config, or OpenAI's.",
        group=API,
        choices=("model", "openai"),
    )
    preferred_sampling_params: str | None = flag(
        None,
        "A JSON object of sampling_params for requests of /generate that don't set them; "
        "/model_info shows it.",
        group=API,
        metavar="JSON",
    )
    grammar_backend: str = flag(
        "llguidance",
        "Which library holds a text to json_schema, regex or ebnf; none refuses such requests.",
        group=API,
        choices=("llguidance", "none"),
    )
    constrained_json_whitespace_pattern: str | None = flag(
        None,
        "Regular expression of the whitespace that JSON constrained by a schema may have.",
        group=API,
        default_text="any",
        metavar="REGEX",
    )
    constrained_json_disable_any_whitespace: bool = flag(
        False, "JSON constrained by a schema has no whitespace outside of its strings.", group=API
    )
    default_chat_template_kwargs: str = flag(
        "{}",
        "A JSON object of chat_template_kwargs for chats that don't set them, such as "
        '{"enable_thinking": false}.',
        group=API,
        metavar="JSON",
    )
    stream_response_default_include_usage: bool = flag(
        False, "Streams of chats and completions end with usage unless they ask not to.", group=API
    )
    weight_version: str = flag(
        "default", "A name of the weights that replies and /model_info repeat.", group=API
    )
    enable_cache_report: bool = flag(
        False, "Report cached prompt tokens in the usage of OpenAI replies.", group=API
    )
    stream_interval: int = flag(
        1,
        "Tokens between two events of a stream.",
        group=API,
        parse=int,
        metavar="TOKENS",
        minimum=1,
    )
    incremental_streaming_output: bool = flag(
        False, "Streams of /generate carry only the new text and ids of each event.", group=API
    )
    max_prompt_logprob_tokens: int = flag(
        32768,
        "Most prompt tokens whose log probabilities one request may ask for. Not in SGLang.",
        group=API,
        parse=parse_count,
        metavar="TOKENS",
        minimum=0,
    )

    def template_defaults(self) -> dict[str, Any]:
        """`default_chat_template_kwargs` as an object."""
        kwargs: dict[str, Any] = json.loads(self.default_chat_template_kwargs)
        return kwargs
