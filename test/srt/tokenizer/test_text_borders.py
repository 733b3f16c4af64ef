"""A long text in pieces gives the ids of the whole text, with every tokenizer served here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sglang.srt.errors import RequestError
from sglang.srt.tokenizer import text_borders, tokenizer
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.pre_tokenizers import cutting_patterns, word_cuttings
from sglang.srt.tokenizer.text_borders import TextBorders
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.tokenizer.vocabularies import demo_gguf, load_golden, write_gguf

PROBES = load_golden("probes.json")
SIZE = 12  # characters of a piece; every text is long

WORDS = [
    *PROBES,
    *["the", "The", "hello", "don't", "we'll", "I'M", "x", "1", "12345", "3.14", "1,000"],
    *["  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "...", "?!", "(a)", "[b]", "{c}", '"q"'],
    *[
        "\u00e9",
        "e\u0301",
        "\u0301",
        "\u0338",
        "=\u0338",
        "\u4f60\u597d\uff0c",
        "\u4e16\u754c\u3002",
    ],
    *["\u3042\u3044", "\uac00", "\U0001f600", "\u0e01", "\u05d0", "\u2581", "a\u2581b", "\ufb01"],
    *["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<tool> a", "see also", "<pad>", "x y"],
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=8, max_size=60).flatmap(
    lambda words: st.sampled_from(["", " ", "  "]).map(lambda between: between.join(words))
)


def hf_bpe(
    normalizer: Any, pre_tokenizer: Any, vocabulary: str = "spm", **options: Any
) -> tokenizers.Tokenizer:
    """A tokenizer as a tokenizer.json makes it, around a golden vocabulary."""
    source = load_golden("vocabularies.json")[vocabulary]
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(source["tokens"]):
        vocab.setdefault(token, token_id)
    if "merges" in source:
        merges = [tuple(merge.split(" ")) for merge in source["merges"]]
    else:
        merges = [
            (token[:cut], token[cut:])
            for token in source["tokens"]
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", **options}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="B $A E", special_tokens=[("B", 1), ("E", 2)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def mark() -> normalizers.Normalizer:
    return normalizers.Replace(" ", "\u2581")


def metaspace(scheme: str, cut: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut)


WHOLE = [pattern for pattern, cuts in cutting_patterns().items() if cuts]
BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    **{
        f"pattern {i}": lambda pattern=pattern: hf_bpe(None, split(pattern), "bpe")
        for i, pattern in enumerate(WHOLE)
    },
    "gpt2": lambda: hf_bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=False), "bpe"),
    "nfc": lambda: hf_bpe(normalizers.NFC(), split(WHOLE[0]), "bpe"),
    "gemma": lambda: hf_bpe(mark(), pre_tokenizers.Split(" ", "merged_with_previous")),
    "legacy": lambda: hf_bpe(normalizers.Sequence([normalizers.Prepend("\u2581"), mark()]), None),
    **{
        f"metaspace {scheme} {cut}": lambda scheme=scheme, cut=cut: hf_bpe(
            None, metaspace(scheme, cut)
        )
        for scheme in ("first", "always", "never")
        for cut in (False, True)
    },
}
ADDED = {
    "none": [],
    "special": ["<|im_start|>", AddedToken("<pad>", special=True, normalized=False)],
    "odd": [
        AddedToken("see also", normalized=False),
        AddedToken("x y", normalized=True),
        AddedToken("<tool>", rstrip=True, normalized=False),
        AddedToken("end1", rstrip=True, normalized=False),
        AddedToken("<pad>", lstrip=True, normalized=False),
        AddedToken("  ", normalized=False),
        AddedToken("hello", normalized=False),
    ],
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", SIZE)
    monkeypatch.setattr(text_borders, "_HOP_CHARS", 9)


def check(subject: Tokenizer, text: str) -> int:
    """Compare; the number of pieces."""
    num_pieces = 0
    for special in (False, True):
        whole = subject._encode_whole(text, special)
        pieces = [*subject.encode_pieces(text, add_special_tokens=special)]
        assert np.concatenate(pieces).tolist() == whole.tolist()
        num_pieces = len(pieces)
    return num_pieces


def wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, lambda: None, bos_token_id=1, eos_token_ids=(2,), chat_template=None)


LONG = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ENGLISH = "This is the story of a text, and of 12 pieces. They have no end; or so it seems! " * 5


@pytest.mark.parametrize("name", sorted(word_cuttings()))
def test_gguf_byte_level(name: str, tmp_path: Path) -> None:
    subject = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", "bpe", pre=name)))
    assert check(subject, ENGLISH) > len(ENGLISH) / SIZE / 2

    @given(TEXTS)
    @LONG
    def any_text(text: str) -> None:
        check(subject, text)

    any_text()


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "spm", add_space_prefix=prefix, add_eos_token=True)
    subject = load_tokenizer(str(path))
    assert check(subject, ENGLISH) > len(ENGLISH) / SIZE / 3

    @given(TEXTS)
    @LONG
    def any_text(text: str) -> None:
        check(subject, text)

    any_text()


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", BACKENDS)
def test_tokenizer_json(name: str, added: str) -> None:
    backend = BACKENDS[name]()
    backend.add_tokens(ADDED[added])
    subject = wrap(backend)
    assert check(subject, ENGLISH) > 10

    @given(TEXTS)
    @LONG
    def any_text(text: str) -> None:
        check(subject, text)

    any_text()


def test_the_demo_model() -> None:
    subject = load_tokenizer(str(demo_gguf()))
    for between in ("", " ", "\n"):
        assert check(subject, between.join(PROBES * 3)) > 20


def unigram() -> tokenizers.Tokenizer:
    scores = [("<unk>", 0.0), ("\u2581", -1.0), ("a", -1.0), ("\u2581a", -1.5)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = metaspace("always", False)
    return backend


def with_single_word() -> tokenizers.Tokenizer:
    backend = BACKENDS["gpt2"]()
    backend.add_tokens([AddedToken("word", single_word=True)])
    return backend


def crossing() -> tokenizers.Tokenizer:
    """Without its space mark a vocabulary may fuse unknown characters across a border."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[]))
    backend.normalizer = mark()
    return backend


UNKNOWN: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "unigram": unigram,
    "single_word": with_single_word,
    "no mark": crossing,
    "other pattern": lambda: hf_bpe(None, split(r"\w+ \w+|\s"), "bpe"),
    "other normalizer": lambda: hf_bpe(normalizers.Lowercase(), split(WHOLE[0]), "bpe"),
    "prefix space": lambda: hf_bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=True), "bpe"),
    "bytes first": lambda: hf_bpe(
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                pre_tokenizers.Split(Regex(WHOLE[0]), "isolated"),
            ]
        ),
        "bpe",
    ),
    "not isolated": lambda: hf_bpe(
        None, pre_tokenizers.Split(Regex(WHOLE[0]), "merged_with_next"), "bpe"
    ),
    "no cutting": lambda: hf_bpe(None, None, "bpe"),
    "digits only": lambda: hf_bpe(None, pre_tokenizers.Digits(), "bpe"),
    "dropout": lambda: hf_bpe(None, split(WHOLE[0]), "bpe", dropout=0.5),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_without_a_known_rule_a_text_is_encoded_whole(name: str) -> None:
    backend = UNKNOWN[name]()
    assert TextBorders.of(backend) is None
    assert len([*wrap(backend).encode_pieces("a b. " * 100)]) == 1


def test_tokens_with_a_mark_inside_forbid_their_borders() -> None:
    """A merge that crosses from a letter to the next word is never parted."""
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3, "a\u2581": 4, "b\u2581": 5, "a\u2581b": 6}
    merges = [("a", "\u2581"), ("a\u2581", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.normalizer = mark()
    assert check(wrap(backend), "a b" * 100) == 1  # "a " and nothing else
    subject = wrap(backend)
    assert check(subject, "c a b c " * 40) > 5


def test_a_text_without_borders_is_one_piece() -> None:
    assert check(wrap(BACKENDS["gpt2"]()), "x" * 1000) == 1
    assert check(wrap(BACKENDS["gpt2"]()), "x" * 1000 + " y" * 500) > 20


def test_lone_surrogates_are_refused_wherever_they_are() -> None:
    subject = wrap(BACKENDS["gpt2"]())
    with pytest.raises(RequestError, match="not valid Unicode"):
        subject.encode("a b " * 100 + "\ud800")
