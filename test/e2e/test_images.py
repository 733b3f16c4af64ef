"""Images over HTTP to a real server with a tiny Llama 4: transformers' answers, clear refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from e2e.server_process import ServerProcess, running_server
from sglang.srt.multimodal.image_tiles import tile_image
from srt.models.hf_vision import (
    TILE,
    TOKENS,
    make_hf_vision_model,
    prompt_of,
    save_vision_model,
    vision_logits,
)

NEW_TOKENS = 6
CONTEXT = 256
MEMORY = ("--kv-memory-budget", "32MiB", "--kv-segment-size", "64", "--page-size", "16")
TEMPLATE = """\
{%- for message in messages %}
{%- if message['content'] is string %}{{ ' ' + message['content'] + ' ' }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}"""
SPECIALS = (
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
)


def save_tokenizer(folder: Path) -> None:
    """Words are their numbers: "w7" is token 7."""
    words = {f"w{number}": number for number in range(TOKENS.patch)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def file_of(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"


CAT, WIDE = file_of(1, TILE, TILE), file_of(2, 3 * TILE, 2 * TILE)


class Asked:
    """A server, and transformers' model of the same weights."""

    def __init__(self, server: ServerProcess, reference: Any) -> None:
        self.server = server
        self.reference = reference

    def check(self, prompt: Sequence[int | bytes], text: str) -> int:
        """That `text` is what transformers says after words and image files; tokens before it."""
        images = [tile_image(part, TILE, 16) for part in prompt if isinstance(part, bytes)]
        rest = iter(images)
        parts = [part if isinstance(part, int) else next(rest) for part in prompt]
        ids = prompt_of(parts).ids.tolist()
        output = [int(word.removeprefix("w")) for word in text.split()]
        assert len(output) == NEW_TOKENS
        logits = vision_logits(self.reference, [*ids, *output], images)
        assert logits.argmax(-1)[len(ids) - 1 : -1].tolist() == output
        return len(ids)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("llama4")
    reference = make_hf_vision_model()
    path = save_vision_model(reference, folder)
    save_tokenizer(folder)
    flags = ("--model-path", path, "--enable-multimodal", "--dtype", "float32")
    limits = ("--context-length", str(CONTEXT), "--allow-auto-truncate")
    with running_server(*flags, *MEMORY, *limits) as process:
        yield Asked(process, reference)


def chat(server: ServerProcess, *content: dict[str, Any]) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": list(content)}]
        return client.chat.completions.create(
            model="m", messages=messages, max_tokens=NEW_TOKENS, temperature=0
        )


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_chats_of_the_openai_client(asked: Asked) -> None:
    reply = chat(asked.server, text("w3 w4"), image(data_url(WIDE)), text("w9"))
    count = asked.check([3, 4, WIDE, 9], reply.choices[0].message.content)
    assert reply.usage.prompt_tokens == count
    reply = chat(asked.server, image(data_url(CAT)), text("w5"), image(data_url(WIDE)), text("w6"))
    asked.check([CAT, 5, WIDE, 6], reply.choices[0].message.content)


def test_responses_keep_their_images(asked: Asked) -> None:
    with openai.OpenAI(base_url=f"{asked.server.url}/v1", api_key="none", max_retries=0) as client:
        fields: Any = {"model": "m", "max_output_tokens": NEW_TOKENS, "temperature": 0}
        words = {"type": "input_text", "text": "w3"}
        picture = {"type": "input_image", "image_url": data_url(WIDE), "detail": "auto"}
        begun: Any = [{"role": "user", "content": [words, picture]}]
        first = client.responses.create(input=begun, **fields)
        asked.check([3, WIDE], first.output_text)
        next_turn: Any = "w7"
        second = client.responses.create(input=next_turn, previous_response_id=first.id, **fields)
        said = [int(word.removeprefix("w")) for word in first.output_text.split()]
        asked.check([3, WIDE, *said, 7], second.output_text)


def test_generate(asked: Asked) -> None:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    body = {
        "text": ["w8<|image|>w2", "w1 w2 w3"],
        "image_data": [base64_of(CAT), None],
        "sampling_params": params,
    }
    seen, plain = asked.server.post("/generate", body).json()
    asked.check([8, CAT, 2], seen["text"])
    asked.check([1, 2, 3], plain["text"])
    body = {
        "input_ids": [8, TOKENS.image, 2, TOKENS.image],
        "image_data": [data_url(CAT), data_url(WIDE)],
        "sampling_params": {**params, "n": 2},
    }
    for choice in asked.server.post("/generate", body).json():
        asked.check([8, CAT, 2, WIDE], choice["text"])
    assert asked.server.get("/model_info").json()["has_image_understanding"] is True


@pytest.mark.parametrize(
    ("prompt", "images", "named"),
    [
        ("w1<|image|>", ["AAAA"], "none of PNG, JPEG"),
        ("w1<|image|>", ["cat.png"], "neither a URL nor base64"),
        ("w1<|image|>", ["http://127.0.0.1:1/a.png"], "private address"),
        ("w1<|image|>", ["file:///etc/passwd"], "files are not read"),
        ("w1", [base64_of(CAT)], "0 image tokens (<|image|>) for 1 images"),
        ("<|image|><|image|>", [base64_of(CAT)], "2 image tokens (<|image|>) for 1 images"),
        ("<|image|>", ["AAAA"] * 65, "may have 64 images, got 65"),
    ],
    ids=["no image", "path", "private", "file", "no place", "two places", "many"],
)
def test_refusals(asked: Asked, prompt: str, images: list[str], named: str) -> None:
    reply = asked.server.post("/generate", {"text": prompt, "image_data": images})
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


def test_a_chat_with_what_is_no_image(asked: Asked) -> None:
    with pytest.raises(openai.BadRequestError, match="none of PNG"):
        chat(asked.server, image(data_url(b"text")))


def test_prompts_with_images_are_not_cut_and_not_kept_in_sessions(asked: Asked) -> None:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    long = "w1 " * CONTEXT
    body: dict[str, Any] = {"text": long, "sampling_params": params}
    assert asked.server.post("/generate", body).status_code == 200
    body |= {"text": f"{long}<|image|>", "image_data": base64_of(CAT)}
    reply = asked.server.post("/generate", body)
    assert reply.status_code == 400
    assert "longer than the model's context length" in reply.json()["error"]["message"]
    session = asked.server.post("/open_session", {"capacity_of_str_len": 100}).json()
    body |= {"text": "w1<|image|>", "session_params": {"id": session}}
    reply = asked.server.post("/generate", body)
    assert reply.status_code == 400
    assert "a session keeps no images" in reply.json()["error"]["message"]


def test_messages_and_ollama_see_images(asked: Asked) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64_of(WIDE)}
    content = [
        {"type": "text", "text": "w3"},
        {"type": "image", "source": source},
        {"type": "text", "text": "w9"},
    ]
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": content}]}
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0}
    message = asked.server.post("/v1/messages", {**body, **sampling}).json()
    count = asked.check([3, WIDE, 9], message["content"][0]["text"])
    assert asked.server.post("/v1/messages/count_tokens", body).json() == {"input_tokens": count}
    options = {"num_predict": NEW_TOKENS, "temperature": 0}
    fields = {"model": "m", "stream": False, "options": options}
    asks = [{"role": "user", "content": "w4", "images": [base64_of(CAT), base64_of(WIDE)]}]
    reply = asked.server.post("/api/chat", {**fields, "messages": asks}).json()
    asked.check([CAT, WIDE, 4], reply["message"]["content"])
    written = {"prompt": "w4", "images": [base64_of(CAT)]}
    asked.check(
        [CAT, 4], asked.server.post("/api/generate", {**fields, **written}).json()["response"]
    )
