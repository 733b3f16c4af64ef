"""Hugging Face tokenizer files that mean what they say: read without transformers.

Importing transformers takes seconds of processor time and hundreds of megabytes in each process of
the text side. For the tokenizer classes that take tokenizer.json as it is, and where nothing in
tokenizer_config.json changes it, that file is the whole tokenizer. Called by loader.py, which turns
to transformers for everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

# Classes whose backend is the file itself: compared with what transformers 5.24 loads.
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Fields that may change what the file says about the ends of texts and about spaces.
_CHANGING_FIELDS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "auto_map",
    "split_special_tokens",
)
_TOKEN_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class PlainFiles:
    """A tokenizer directory as read: `special_tokens` by field name, for chat templates."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | Mapping[str, str] | None

    def id_of(self, field: str) -> int | None:
        """The id of the token that `field` names, None when it names none."""
        token = self.special_tokens.get(field)
        return None if token is None else self.backend.token_to_id(token)


def read_plain_files(directory: Path) -> PlainFiles | None:
    """Read tokenizer.json and what stands beside it; None: only transformers can tell."""
    path = directory / "tokenizer.json"
    if not path.is_file() or (directory / "added_tokens.json").exists():
        return None
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
        template = _read_template(directory, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if config.get("tokenizer_class") not in _PLAIN_CLASSES:
        return None
    if any(config.get(field) for field in _CHANGING_FIELDS):
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - tokenizers raises no other; transformers says what it is
        return None
    names = {field: _text_of(config.get(field)) for field in _TOKEN_FIELDS}
    special = {field: text for field, text in names.items() if text is not None}
    if not _is_complete(config, backend, special):
        return None
    return PlainFiles(backend, special, template)


def _is_complete(
    config: Mapping[str, Any], backend: tokenizers.Tokenizer, special: Mapping[str, str]
) -> bool:
    """Whether every token of the configuration is one of the file's, with the same meaning."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(more, Mapping):
        return False
    wanted = [*special.values(), *map(_text_of, more)]
    if not all(text is not None and known.get(text) for text in wanted):
        return False
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        text = _text_of(entry)
        if text is None or backend.token_to_id(text) != int(number):
            return False
        if known.get(text) != bool(entry.get("special")):
            return False
    return True


def _text_of(token: Any) -> str | None:
    """A token as configurations write it: its text, or an object with it."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    """The chat template, of several one by name; files beside the configuration come first."""
    more = directory / "additional_chat_templates"
    single = directory / "chat_template.jinja"
    if single.is_file():
        found = {"default": single.read_text("utf-8")}
        if more.is_dir():
            found |= {path.stem: path.read_text("utf-8") for path in sorted(more.glob("*.jinja"))}
        return found if len(found) > 1 else found["default"]
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template if isinstance(template, str) else None
