"""A `tokenizers.Tokenizer` from the vocabulary inside a GGUF file.

Byte-level BPE (`tokenizer.ggml.model` "gpt2") and sentencepiece BPE with scores and byte fallback
("llama"); anything else is refused by name. Called by loader.py. Sources: the public GGUF
specification for the keys, the tokenizers library for the algorithms; ids are tested against
llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from sglang.srt.tokenizer.pre_tokenizers import find_word_cutting

_SPACE_MARK = "▁"
_KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as the specification numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GGUFVocabulary:
    """What a GGUF file says about text: a backend, the special ids and the chat template.

    `eos_token_ids` holds the end of text, of turn and of message, those that the file names.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | dict[str, str] | None


def read_vocabulary(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """Build the tokenizer that `metadata` (the file's key-value pairs) describes.

    Raises ValueError naming the key that is missing or not supported.
    """
    source = _Source(metadata)
    model = source.need("model")
    if model == "gpt2":
        backend = _byte_level_bpe(source)
    elif model == "llama":
        backend = _sentencepiece_bpe(source)
    else:
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}, which is not supported (gpt2 and llama are); "
            "give the model's Hugging Face tokenizer with --tokenizer-path instead."
        )
    _add_marked_tokens(backend, source)
    _add_ends(backend, source, default_bos=source.default_bos)
    bos = source.token_id("bos_token_id")
    ends = [source.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return GGUFVocabulary(
        backend=backend,
        bos_token=None if bos is None else source.tokens[bos],
        eos_token=None if ends[0] is None else source.tokens[ends[0]],
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=_chat_templates(metadata),
    )


class _Source:
    """The `tokenizer.ggml.*` values, checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: list[str] = [str(token) for token in self.need("tokens")]
        types = self.get("token_type")
        self.types = (
            np.full(len(self.tokens), TokenType.NORMAL)
            if types is None
            else np.asarray(types, dtype=np.int64)
        )
        if len(self.types) != len(self.tokens):
            raise ValueError("tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")
        self.default_bos = True

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(_KEY + name, default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ValueError(f"the file has no {_KEY}{name}")
        return value

    def token_id(self, name: str) -> int | None:
        """A special token's id, None when the file has none or one outside the vocabulary."""
        value = self.get(name)
        if value is None or not 0 <= int(value) < len(self.tokens):
            return None
        return int(value)


def _byte_level_bpe(source: _Source) -> tokenizers.Tokenizer:
    cutting = find_word_cutting(str(source.get("pre", "default")))
    source.default_bos = cutting.adds_bos
    merges = []
    for merge in source.need("merges"):
        left, separator, right = str(merge).partition(" ")
        if not separator:
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, which is not a pair")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=_first_ids(source.tokens),
            merges=merges,
            ignore_merges=cutting.ignore_merges,
        )
    )
    normalizer = cutting.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = cutting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(source: _Source) -> tokenizers.Tokenizer:
    scores = np.asarray(source.need("scores"), dtype=np.float64)
    if len(scores) != len(source.tokens):
        raise ValueError("tokenizer.ggml.scores and tokenizer.ggml.tokens differ in length")
    unknown = source.token_id("unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=_first_ids(source.tokens),
            merges=_merges_by_score(source, scores),
            unk_token=None if unknown is None else source.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE_MARK)]
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if bool(source.get("add_space_prefix", True)):
        marks.insert(0, normalizers.Prepend(_SPACE_MARK))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(marks)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _first_ids(tokens: list[str]) -> dict[str, int]:
    """Token -> id; of equal tokens the first keeps the text."""
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocab.setdefault(token, token_id)
    return vocab


def _merges_by_score(source: _Source, scores: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """Sentencepiece's scores as a merge list: any two tokens that make a third, best score first.

    Sentencepiece merges whichever neighbours make the token with the highest score.
    """
    mergeable = {
        token: float(scores[token_id])
        for token_id, token in enumerate(source.tokens)
        if source.types[token_id] in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    }
    pairs: list[tuple[float, str, str]] = []
    for token, score in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                pairs.append((-score, left, right))
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def _add_marked_tokens(backend: tokenizers.Tokenizer, source: _Source) -> None:
    """Make control and user-defined tokens whole words of the text; control ones are special."""
    marked = []
    for token_id, token in enumerate(source.tokens):
        kind = source.types[token_id]
        if token and kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED
            marked.append(AddedToken(token, special=special, normalized=False))
    backend.add_tokens(marked)


def _add_ends(backend: tokenizers.Tokenizer, source: _Source, *, default_bos: bool) -> None:
    """Let `add_special_tokens` add BOS and EOS as the file says."""
    bos = source.token_id("bos_token_id")
    eos = source.token_id("eos_token_id")
    add_bos = bool(source.get("add_bos_token", default_bos)) and bos is not None
    add_eos = bool(source.get("add_eos_token", False)) and eos is not None
    if not add_bos and not add_eos:
        return
    template, specials = ["$A"], []
    if add_bos and bos is not None:
        template.insert(0, "BOS")
        specials.append({"id": "BOS", "ids": [bos], "tokens": [source.tokens[bos]]})
    if add_eos and eos is not None:
        template.append("EOS")
        specials.append({"id": "EOS", "ids": [eos], "tokens": [source.tokens[eos]]})
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=specials
    )


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """`tokenizer.chat_template`, with its named variants when there are any."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates") or []
    named = {
        str(name): str(metadata[f"tokenizer.chat_template.{name}"])
        for name in names
        if f"tokenizer.chat_template.{name}" in metadata
    }
    if not named:
        return None if default is None else str(default)
    if default is not None:
        named["default"] = str(default)
    return named
