"""/api/chat and /api/generate: the fields of a request, and the chat request that they stand for.

Ollama's API says what a chat request says in other words. Here its fields and messages are read,
and checked as far as chat's own checks would name fields that the client never wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.protocol import RETURNS, ChatBody
from sglang.srt.entrypoints.openai.response_format import JsonSchemaFormat, ResponseFormat
from sglang.srt.entrypoints.request_body import RawFields, decode_field, first_char
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal
from sglang.srt.errors import RequestError

Message = dict[str, Any]
UNLIMITED = (-1, -2)  # values of num_predict: without end, up to the end of the context
_TEXT: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_NO_PICTURES = Refusal("pictures are not made")


class OptionsBody(msgspec.Struct, frozen=True):
    """The served fields of `options`; None: the model's default.

    `num_predict` below 0 means up to the context's end, `num_ctx` is the least context that the
    client wants.
    """

    num_predict: Int | None = None
    num_ctx: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Int | None = None
    stop: str | list[str] = []
    repeat_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


_LOADING = "the model is loaded as the server's flags say"
OPTION_FIELDS = FieldTable(
    OptionsBody,
    # How fast and where it is computed; what belongs to mirostat does nothing without it.
    accepted=(
        "f16_kv",
        "low_vram",
        "main_gpu",
        "mirostat_eta",
        "mirostat_tau",
        "num_batch",
        "num_gpu",
        "num_keep",
        "num_thread",
        "numa",
        "use_mlock",
        "use_mmap",
    ),
    refused={
        "repeat_last_n": Refusal("penalties look at the whole context", (-1,)),
        "penalize_newline": Refusal("penalties make no difference between tokens", (True,)),
        "mirostat": Refusal("mirostat is not served", (0,)),
        "tfs_z": Refusal("tail-free sampling is not served", (1, 1.0)),
        "typical_p": Refusal("typical sampling is not served", (1, 1.0)),
        "logits_all": Refusal(_LOADING, (False,)),
        "vocab_only": Refusal(_LOADING, (False,)),
        "embedding_only": Refusal(_LOADING, (False,)),
    },
    refuse_unknown=True,
)


class SharedBody(msgspec.Struct, frozen=True, kw_only=True):
    """What chats and prompts have; `format` and `options` are JSON as the client wrote it.

    `think` None leaves it to the chat template; a text is the template's `reasoning_effort`.
    """

    model: str = ""
    options: RawFields = {}
    format: msgspec.Raw | None = None
    stream: bool = True
    think: bool | str | None = None


class OllamaChatBody(SharedBody, frozen=True, kw_only=True):
    """The served fields of /api/chat."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []


class OllamaGenerateBody(SharedBody, frozen=True, kw_only=True):
    """The served fields of /api/generate; a `raw` prompt goes to the model as it is."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    images: tuple[str, ...] = ()


_ACCEPTED = ("keep_alive",)  # the model stays
_REFUSED = {
    "logprobs": Refusal(RETURNS, (False,)),
    "top_logprobs": Refusal(RETURNS, (0,)),
    "truncate": Refusal("a prompt that is too long is refused", (False,)),
    "shift": Refusal("an answer ends with the context", (False,)),
    "_debug_render_only": Refusal(
        "prompts are not shown", (False,)
    ),  # Ollama's own client sends it
}
OLLAMA_CHAT_FIELDS = FieldTable(
    OllamaChatBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=True
)
OLLAMA_GENERATE_FIELDS = FieldTable(
    OllamaGenerateBody,
    accepted=_ACCEPTED,
    refused={
        **_REFUSED,
        "suffix": Refusal("the model has no fill-in-the-middle template", ("",)),
        "template": Refusal("the template is the server's (--chat-template)", ("",)),
        "context": Refusal("contexts are not given back; use /api/chat", ([],)),
        "width": _NO_PICTURES,
        "height": _NO_PICTURES,
        "steps": _NO_PICTURES,
    },
    refuse_unknown=True,
)


def read_chat(fields: RawFields) -> OllamaChatBody:
    """Read the fields of a chat; RequestError 400 naming the first that cannot be served."""
    body = OLLAMA_CHAT_FIELDS.read(fields)
    _check_model(body)
    return body


def read_generate(fields: RawFields) -> OllamaGenerateBody:
    """Read the fields of a prompt; RequestError 400 naming the first that cannot be served."""
    body = OLLAMA_GENERATE_FIELDS.read(fields)
    _check_model(body)
    if body.raw and body.system:
        raise bad_field("system", "a raw prompt goes to the model as it is")
    if body.raw and body.images:
        raise bad_field("images", "a raw prompt has no place for them")
    if body.raw and body.think:
        raise bad_field("think", "a raw prompt goes to the model as it is")
    return body


def _check_model(body: SharedBody) -> None:
    if not body.model:
        raise bad_field("model", "it is missing")


def read_options(body: SharedBody, context_length: int) -> OptionsBody:
    """The `options`; RequestError 400 naming the first that cannot be served."""
    options = OPTION_FIELDS.read(body.options, "options.")
    if options.num_ctx is not None and options.num_ctx > context_length:
        problem = f"the context has {context_length} tokens (--context-length)"
        raise bad_field("options.num_ctx", problem)
    if options.num_predict is not None and options.num_predict < min(UNLIMITED):
        raise bad_field("options.num_predict", "it must be at least -2")
    return options


def shared_fields(body: SharedBody, options: OptionsBody) -> dict[str, Any]:
    """What of OpenAI's requests says the same; RequestError 400 naming a bad field.

    They are streams in any case, so that the first token can be timed.
    """
    return {
        "model": body.model.removesuffix(":latest"),  # which names no adapter
        "max_tokens": None if options.num_predict in UNLIMITED else options.num_predict,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": -1 if options.top_k == 0 else options.top_k,
        "min_p": options.min_p,
        "seed": None if options.seed == -1 else options.seed,
        "stop": options.stop,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "response_format": _response_format(body.format),
        "stream": True,
    }


def chat_body(
    body: SharedBody,
    options: OptionsBody,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
) -> ChatBody:
    """The chat request that asks the same; RequestError 400 naming a field that can't be served."""
    kwargs: dict[str, Any] = {}
    if body.think is not None and body.think != "":
        # Templates have either name for it, and take no notice of the other.
        kwargs = {"enable_thinking": bool(body.think), "thinking": bool(body.think)}
    return ChatBody(
        **shared_fields(body, options),
        messages=list(messages),
        tools=list(tools),
        chat_template_kwargs=kwargs,
        reasoning_effort=body.think if isinstance(body.think, str) and body.think else None,
    )


def _response_format(raw: msgspec.Raw | None) -> ResponseFormat | None:
    if raw is None:
        return None
    if first_char(raw) == b"{":
        # A copy, for the original is a view of the request's whole body.
        schema = JsonSchemaFormat(schema=msgspec.Raw(bytes(raw)))
        return ResponseFormat("json_schema", schema)
    name = decode_field("format", raw, _TEXT)
    if name not in ("", "json"):
        raise bad_field("format", f"expected json or a schema, got {name!r}")
    return ResponseFormat("json_object") if name else None


def prompt_messages(body: OllamaGenerateBody) -> list[Message]:
    """The conversation that a prompt is."""
    system = [{"role": "system", "content": body.system}] if body.system else []
    content = _with_images("images", body.prompt, list(body.images))
    return [*system, {"role": "user", "content": content}]


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Ollama's messages as a chat's; RequestError 400 naming the first that isn't served.

    Thinking goes to the template as `reasoning_content`.
    """
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _with_images(name: str, text: str, images: Any) -> str | list[dict[str, Any]]:
    """A content: the text alone, or images before it."""
    if not images:
        return text
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise bad_field(name, "expected a list of images in base64")
    parts = [{"type": "image_url", "image_url": {"url": one}} for one in images]
    return [*parts, {"type": "text", "text": text}]


def _message(name: str, message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if not isinstance(content, str | None):
        raise bad_field(f"{name}.content", "expected text")
    shown = _with_images(f"{name}.images", content or "", message.get("images"))
    found: Message = {"role": message.get("role"), "content": shown}
    names = {"thinking": "reasoning_content", "tool_name": "name", "tool_call_id": "tool_call_id"}
    for field, called in names.items():
        value = message.get(field)
        if not isinstance(value, str | None):
            raise bad_field(f"{name}.{field}", "expected text")
        if value:
            found[called] = value
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise bad_field(f"{name}.tool_calls", "expected a list of calls")
        found["tool_calls"] = [{"type": "function", **call} for call in calls]
    return found


def unable_to_think(model: str) -> RequestError:
    """The refusal of `think` where no reasoning is told apart, in Ollama's words."""
    return RequestError(f'"{model}" does not support thinking (no --reasoning-parser)')
