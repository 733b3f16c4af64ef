"""Incremental decoding and stop strings, as pure functions of ids and cuts."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.managers.incremental_text import (
    PieceDecoder,
    StopMatcher,
    WindowDecoder,
    make_decoder,
)
from sglang.srt.tokenizer.gguf_tokenizer import read_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.tokenizer.vocabularies import load_golden, write_gguf

SPM_TOKENS = load_golden("vocabularies.json")["spm"]["tokens"]
BYTE_0 = SPM_TOKENS.index("<0x00>")
WORD = SPM_TOKENS.index("▁x")
TEXTS = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("a 😀👩‍é你\n1")))
IDS = st.lists(st.integers(-1, 1700), max_size=40)


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("bpe") / "m.gguf", "bpe", pre="smollm")


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", "spm", add_bos_token=False)


@pytest.fixture(scope="module")
def bpe(bpe_file: Path) -> Tokenizer:
    return load_tokenizer(str(bpe_file))


@pytest.fixture(scope="module")
def spm(spm_file: Path) -> Tokenizer:
    return load_tokenizer(str(spm_file))


@pytest.fixture(scope="module")
def bpe_backend(bpe_file: Path) -> tokenizers.Tokenizer:
    return read_vocabulary(read_gguf_header(bpe_file).metadata).backend


@pytest.fixture(scope="module")
def spm_backend(spm_file: Path) -> tokenizers.Tokenizer:
    return read_vocabulary(read_gguf_header(spm_file).metadata).backend


def stream(
    tokenizer: Tokenizer,
    ids: list[int],
    prefix: list[int] | None = None,
    *,
    skip: bool = True,
    kept: tuple[str, ...] = (),
) -> list[str]:
    """The deltas of `ids` after `prefix`, the flush last."""
    decoder = make_decoder(
        tokenizer,
        prefix or [],
        skip_special_tokens=skip,
        spaces_between_special_tokens=True,
        kept_special_tokens=kept,
    )
    return [*[decoder.feed(token_id) for token_id in ids], decoder.flush()]


def test_special_tokens_that_a_parser_needs_are_shown(bpe: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (bpe, spm):
        specials = sorted(tokenizer.special_ids)
        kept, other = (tokenizer.token_text(i) for i in specials[:2])
        assert kept
        assert "".join(stream(tokenizer, specials[:2])) == ""
        assert "".join(stream(tokenizer, specials[:2], kept=(kept, "no token"))) == kept
        assert "".join(stream(tokenizer, specials[:2], skip=False)) == kept + other


@given(ids=IDS, skip=st.booleans())
@settings(deadline=None)
def test_byte_level_streams_equal_the_whole_text(
    bpe: Tokenizer, bpe_backend: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = "".join(stream(bpe, ids, skip=skip))
    assert whole == bpe.decode(ids, skip_special_tokens=skip)
    known = [i for i in ids if i >= 0]
    assert whole == bpe_backend.decode(known, skip_special_tokens=skip)


@given(
    ids=st.lists(st.one_of(st.integers(-1, 950), st.integers(BYTE_0, BYTE_0 + 255)), max_size=40)
)
@settings(deadline=None)
def test_sentencepiece_streams_equal_the_whole_text(spm: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(spm, ids)) == spm.decode(ids)


@given(text=TEXTS)
@settings(deadline=None)
def test_sentencepiece_text_is_what_the_library_decodes(
    spm: Tokenizer, spm_backend: tokenizers.Tokenizer, text: str
) -> None:
    ids = spm.encode(text).tolist()
    assert "".join(stream(spm, ids)) == spm_backend.decode(ids)


@given(text=TEXTS, cut=st.integers(1, 60), vocabulary=st.sampled_from(["bpe", "spm"]))
@settings(deadline=None)
def test_output_continues_its_prompt(
    bpe: Tokenizer, spm: Tokenizer, text: str, cut: int, vocabulary: str
) -> None:
    """Prompt text and streamed text make the whole text, wherever the ids are cut."""
    tokenizer = bpe if vocabulary == "bpe" else spm
    ids = tokenizer.encode("x" + text).tolist()
    prompt, output = ids[:cut], ids[cut:]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    shown = "".join(stream(tokenizer, output, prompt[-6:], skip=False))
    before = tokenizer.decode(prompt, skip_special_tokens=False)
    assert whole == before.rstrip("�") + shown or whole == before + shown


def test_an_unfinished_character_is_held_and_then_shown_whole(spm: Tokenizer) -> None:
    ids = [BYTE_0 + byte for byte in "é😀".encode()]
    assert spm.pieces is not None
    assert spm.pieces.piece(ids[0]) == b"\xc3"
    assert stream(spm, ids, [WORD]) == ["", "é", "", "", "", "😀", ""]


@pytest.mark.parametrize(("vocabulary", "marks"), [("bpe", 1), ("spm", 3)])
def test_what_stays_unfinished_is_replaced_at_the_end(
    bpe: Tokenizer, spm: Tokenizer, vocabulary: str, marks: int
) -> None:
    """One mark for the sequence in byte-level BPE, one for each byte in sentencepiece."""
    tokenizer = bpe if vocabulary == "bpe" else spm
    assert tokenizer.pieces is not None
    ids = [
        next(i for i in range(700) if tokenizer.pieces.piece(i) == bytes([byte]))
        for byte in "😀".encode()[:3]
    ]
    assert stream(tokenizer, ids, [WORD]) == ["", "", "", "�" * marks]


def test_held_bytes_are_bounded(spm: Tokenizer) -> None:
    assert spm.pieces is not None
    decoder = PieceDecoder(spm.pieces, [], skip_special_tokens=True)
    text = "".join(decoder.feed(BYTE_0 + 0xF0) for _ in range(500))
    assert text == "�" * 499
    assert decoder.flush() == "�"


def test_the_first_space_belongs_to_the_encoding(spm: Tokenizer) -> None:
    ids = spm.encode("the thing").tolist()
    assert "".join(stream(spm, ids)) == "the thing"
    assert "".join(stream(spm, ids, spm.encode("x").tolist())) == " the thing"


def test_special_tokens_are_left_out_or_shown(bpe: Tokenizer) -> None:
    ids = [3, *bpe.encode("hi").tolist(), 4]
    assert "".join(stream(bpe, ids)) == "hi"
    assert "".join(stream(bpe, ids, skip=False)) == "<|im_start|>hi<|im_end|>"


def word_piece() -> Tokenizer:
    words = ["[UNK]", "play", "##ing", "the", "##s", "game", "é"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend, lambda: None, bos_token_id=None, eos_token_ids=(), chat_template=None)


@given(ids=st.lists(st.integers(0, 6), max_size=30))
@settings(deadline=None)
def test_other_tokenizers_are_decoded_by_windows(ids: list[int]) -> None:
    tokenizer = word_piece()
    assert tokenizer.pieces is None
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_window_waits_for_unfinished_characters_but_not_for_ever(spm: Tokenizer) -> None:
    decoder = WindowDecoder(
        spm, [WORD], skip_special_tokens=True, spaces_between_special_tokens=True
    )
    assert [decoder.feed(BYTE_0 + byte) for byte in "😀".encode()] == ["", "", "", "😀"]
    bad = [decoder.feed(BYTE_0 + 0xF0) for _ in range(8)]
    assert bad == [""] * 7 + ["�" * 8]
    assert decoder.feed(BYTE_0 + 0xF0) == ""
    assert decoder.flush() == "�"


# ---- stop strings


def first_stop(text: str, stops: list[str], armed_from: int) -> tuple[int, str] | None:
    """(end, stop) of the match that ends first, the longest of those; by brute force."""
    for end in range(armed_from + 1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return end, max(matches, key=len)
    return None


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=15),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    num_unarmed=st.integers(0, 4),
    keep=st.booleans(),
)
def test_stop_strings_are_found_wherever_the_text_is_cut(
    pieces: list[str], stops: list[str], num_unarmed: int, keep: bool
) -> None:
    matcher = StopMatcher(stops, keep_match=keep)
    text = "".join(pieces)
    armed_from = len("".join(pieces[:num_unarmed]))
    expected = first_stop(text, stops, armed_from)
    shown = ""
    for index, piece in enumerate(pieces):
        match = matcher.feed(piece, armed=index >= num_unarmed)
        shown += match.text
        assert text.startswith(shown)
        if match.matched is not None:
            assert expected is not None
            end, stop = expected
            assert match.matched == stop
            assert shown == text[: end if keep else end - len(stop)]
            return
        held = "".join(pieces[: index + 1])[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert expected is None
    assert shown + matcher.flush() == text


def test_text_that_may_begin_a_stop_string_is_held() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.feed("Hi\n").text == "Hi"
    assert matcher.feed("Us").text == ""
    assert matcher.feed("e me").text == "\nUse me"
    assert matcher.feed("\nUser: no").matched == "\nUser:"


def test_a_long_self_repeating_stop_string_costs_no_more_than_its_text() -> None:
    stop = "a" * 5000 + "b"
    matcher = StopMatcher([stop])
    shown = sum(len(matcher.feed("a" * 1000).text) for _ in range(200))
    assert shown == 195_000
    match = matcher.feed("b!")
    assert (match.text, match.matched) == ("", stop)
