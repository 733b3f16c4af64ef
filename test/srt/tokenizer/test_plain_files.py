"""Tokenizer directories read without transformers: the same tokenizer, or None."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sglang
from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.tokenizer.gguf_tokenizer import read_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.plain_files import read_plain_files
from srt.tokenizer.vocabularies import demo_gguf

TEXT = "The gull's <|im_start|> 12,345 Grüße 海鸥 😀\n\n\tend <|endoftext|>"
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": True}},
    "add_prefix_space": False,
}


@pytest.fixture(scope="module")
def vocabulary() -> str:
    """A tokenizer.json of the demo model's vocabulary."""
    content: str = read_vocabulary(read_gguf_header(demo_gguf()).metadata).backend.to_str()
    return content


@pytest.fixture
def folder(tmp_path: Path, vocabulary: str) -> Path:
    """The demo model's vocabulary as Hugging Face files."""
    (tmp_path / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_file_is_what_transformers_loads(name: str, folder: Path) -> None:
    write(folder, tokenizer_class=name)
    found, hf = read_plain_files(folder), AutoTokenizer.from_pretrained(folder)
    assert found is not None
    ours, theirs = (json.loads(b.to_str()) for b in (found.backend, hf.backend_tokenizer))
    # transformers puts a post-processor that adds nothing where there is none
    for part in ours.keys() - {"post_processor"}:
        assert ours[part] == theirs[part], part
    for text in ("", "a", TEXT):
        assert found.backend.encode(text).ids == hf.encode(text)
    assert found.id_of("bos_token") == hf.bos_token_id == 1
    assert found.id_of("eos_token") == hf.eos_token_id == 2
    assert found.id_of("sep_token") is None
    assert found.chat_template == hf.chat_template
    assert found.special_tokens == hf.special_tokens_map


def test_neither_loading_nor_a_chat_imports_transformers(folder: Path) -> None:
    code = (
        "import sys; from sglang.srt.tokenizer.loader import load_tokenizer\n"
        f"t = load_tokenizer({str(folder)!r})\n"
        "assert t.encode('hello').size and t.eos_token_ids == (2,)\n"
        "assert t.apply_chat_template([{'role': 'user', 'content': 'x'}]) == '<|im_start|>x'\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(sglang.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": None},
        {"add_bos_token": True},
        {"add_prefix_space": True},
        {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
        {"pad_token": "<new>"},
        {"additional_special_tokens": ["<new>"]},
        {"extra_special_tokens": {"image_token": "<|im_start|>"}, "additional_special_tokens": []},
        {"added_tokens_decoder": {"9": {"content": "<|im_start|>", "special": True}}},
        {"added_tokens_decoder": {"1": {"content": "<|im_start|>", "special": False}}},
        {"added_tokens_decoder": {"49200": {"content": "<new>", "special": True}}},
    ],
    ids=str,
)
def test_what_only_transformers_can_tell(changes: dict[str, Any], folder: Path) -> None:
    write(folder, **changes)
    assert read_plain_files(folder) is None


def test_files_that_are_missing_or_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert read_plain_files(folder) is None
    (folder / "tokenizer.json").unlink()
    assert read_plain_files(folder) is None
    with pytest.raises(ValueError, match="Cannot load a tokenizer from"):
        load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text("[]")
    assert read_plain_files(folder) is None


def test_several_templates_have_names(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    found, hf = read_plain_files(folder), AutoTokenizer.from_pretrained(folder)
    assert found is not None
    assert found.chat_template == hf.chat_template
    assert isinstance(found.chat_template, dict)
    assert found.chat_template["tool_use"] == "tools"
