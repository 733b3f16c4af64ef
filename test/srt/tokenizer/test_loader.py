"""Where tokenizers and chat templates come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.errors import RequestError
from sglang.srt.managers.incremental_text import make_decoder
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.chat_template import built_in_templates, read_chat_template
from sglang.srt.tokenizer.gguf_tokenizer import read_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer, load_tokenizer_for
from srt.tokenizer.vocabularies import demo_gguf, write_gguf

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
]


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """The golden vocabulary as a Hugging Face directory, with truncation left in the file."""
    source = write_gguf(tmp_path / "source.gguf", "bpe", pre="smollm")
    backend = read_vocabulary(read_gguf_header(source).metadata).backend
    backend.enable_truncation(4)
    directory = tmp_path / "hf"
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_gives_the_ids_of_its_gguf_twin(hf_dir: Path, tmp_path: Path) -> None:
    hf = load_tokenizer(str(hf_dir))
    gguf = load_tokenizer(str(tmp_path / "source.gguf"))
    text = "the quick brown fox 12345 <|im_end|> 😀"
    assert hf.encode(text).tolist() == gguf.encode(text).tolist()
    assert len(hf.encode(text)) > 4  # the file's truncation is not ours
    assert (hf.bos_token_id, hf.eos_token_ids, hf.vocab_size) == (1, (2,), gguf.vocab_size)
    assert hf.special_ids == gguf.special_ids
    assert hf.decode(hf.encode(text)) == gguf.decode(gguf.encode(text))
    assert hf.apply_chat_template(CHAT) == "Be brief.|Hi|"


def test_a_missing_path_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))


def test_the_server_arguments_decide(hf_dir: Path, tmp_path: Path) -> None:
    source = str(tmp_path / "source.gguf")
    args = ServerArgs.from_kwargs(model_path=source)
    tokenizer = load_tokenizer_for(args)
    assert tokenizer is not None
    assert tokenizer.chat_template is None
    args = ServerArgs.from_kwargs(model_path=source, tokenizer_path=str(hf_dir))
    tokenizer = load_tokenizer_for(args)
    assert tokenizer is not None
    assert tokenizer.apply_chat_template(CHAT) == "Be brief.|Hi|"
    args = ServerArgs.from_kwargs(model_path=source, chat_template="chatml")
    tokenizer = load_tokenizer_for(args)
    assert tokenizer is not None
    assert tokenizer.apply_chat_template(CHAT).endswith("<|im_start|>assistant\n")
    args = ServerArgs.from_kwargs(model_path=source, skip_tokenizer_init=True)
    assert load_tokenizer_for(args) is None


def test_the_demo_models_own_template() -> None:
    tokenizer = load_tokenizer(str(demo_gguf()))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (ids == 1).sum() == 3
    assert (ids == 2).sum() == 2
    assert tokenizer.eos_token_ids == (2,)


# ---- chat templates


def test_continuing_the_last_message_adds_no_prompt(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", chat_template=built_in_templates()["chatml"])
    tokenizer = load_tokenizer(str(path))
    chat = [*CHAT, {"role": "assistant", "content": "Well,"}]
    text = tokenizer.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nWell,")
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert text.endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", CHAT, "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", CHAT, "cannot render"),
        ("{{ messages[9]['content'].x }}", CHAT, "cannot render"),
        ("{% for %}{{", CHAT, "cannot render"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", CHAT, "cannot render"),
    ],
)
def test_a_template_that_refuses_is_a_400(
    template: str, messages: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe")
    tokenizer = load_tokenizer(str(path), chat_template=template)
    with pytest.raises(RequestError, match=message) as error:
        tokenizer.apply_chat_template(messages)
    assert error.value.http_status == 400


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe")
    template = "{{ mood }}{{ bos_token }}{{ tools[0]['function']['name'] }}"
    tokenizer = load_tokenizer(str(path), chat_template=template)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert tokenizer.apply_chat_template(CHAT, tools=tools, mood="ok") == "ok<s>f"
    with pytest.raises(RequestError, match="cannot render"):
        tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=True)


def test_named_templates_are_picked_by_need(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe")
    tokenizer = load_tokenizer(str(path))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert tokenizer.apply_chat_template(CHAT) == "plain"
    assert tokenizer.apply_chat_template(CHAT, tools=tools) == "with tools"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(RequestError, match=r"\['rag'\], none is the default"):
        tokenizer.apply_chat_template(CHAT)


def test_chat_template_is_a_file_a_name_or_the_template(tmp_path: Path) -> None:
    jinja = tmp_path / "t.jinja"
    jinja.write_text("from a file")
    in_json = tmp_path / "t.json"
    in_json.write_text(json.dumps({"chat_template": "from json"}))
    assert read_chat_template(str(jinja)) == "from a file"
    assert read_chat_template(str(in_json)) == "from json"
    assert read_chat_template("{{ x }}" * 3000) == "{{ x }}" * 3000
    assert "<|im_start|>" in read_chat_template("chatml")
    in_json.write_text("[]")
    with pytest.raises(ValueError, match="no chat_template field"):
        read_chat_template(str(in_json))
    with pytest.raises(ValueError, match=r"neither a file .* chatml"):
        read_chat_template("vicuna-nonsense")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama-2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] Bye [/INST]",
        ),
        (
            "llama-3-instruct",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_the_built_in_templates(name: str, text: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe")
    tokenizer = load_tokenizer(str(path), chat_template=name)
    chat = [*CHAT, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]
    assert tokenizer.apply_chat_template(chat) == text


# ---- slow tokenizers


def test_a_slow_tokenizer_is_served_too(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pieces is None
    text = "naïve 😀 text"
    ids = tokenizer.encode(text, add_special_tokens=False).tolist()
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    decoder = make_decoder(
        tokenizer, [], skip_special_tokens=True, spaces_between_special_tokens=True
    )
    deltas = [decoder.feed(token_id) for token_id in ids]
    assert "".join(deltas) + decoder.flush() == text
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.token_text(ids[0]) == "n"
    assert tokenizer.token_bytes(ids[0]) == b"n"
