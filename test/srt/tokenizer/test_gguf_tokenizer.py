"""Ids from GGUF vocabularies against llama.cpp's (see golden/make_golden.py)."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.tokenizer.gguf_tokenizer import read_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.tokenizer.vocabularies import demo_gguf, load_golden, write_gguf

PROBES = load_golden("probes.json")
FILES = load_golden("golden_ids.json")["files"]
BPE_NAMES = [name.removeprefix("bpe/") for name in FILES if name.startswith("bpe/")]
NFC_NAMES = {"qwen2", "deepseek-r1-qwen"}


def differing(tokenizer: Tokenizer, golden: list[list[int]]) -> list[str]:
    return [
        probe
        for probe, ids in zip(PROBES, golden, strict=True)
        if tokenizer.encode(probe, add_special_tokens=False).tolist() != ids
    ]


def has_marks(text: str) -> bool:
    return any(unicodedata.category(char).startswith("M") for char in text)


def test_there_are_enough_probes() -> None:
    assert len(PROBES) >= 30
    assert len(BPE_NAMES) == 12


def test_the_demo_model_gives_llama_cpps_ids() -> None:
    tokenizer = load_tokenizer(str(demo_gguf()))
    assert differing(tokenizer, FILES["smollm2"]["special"]) == []
    assert tokenizer.encode("x 2024").tolist()[-4:] == [34, 32, 34, 36]  # digits one by one


def test_the_demo_model_reads_special_tokens_as_text_when_told() -> None:
    backend = read_vocabulary(read_gguf_header(demo_gguf()).metadata).backend
    backend.encode_special_tokens = True
    golden = FILES["smollm2"]["plain"]
    assert [backend.encode(probe, add_special_tokens=False).ids for probe in PROBES] == golden


@pytest.mark.parametrize("name", BPE_NAMES)
def test_every_cutting_gives_llama_cpps_ids(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", pre=name)
    wrong = differing(load_tokenizer(str(path)), FILES[f"bpe/{name}"]["special"])
    if name in NFC_NAMES:  # these families normalise text to NFC; llama.cpp does not
        wrong = [probe for probe in wrong if unicodedata.is_normalized("NFC", probe)]
    if name == "tekken":  # Mistral's published pattern counts combining marks as letters
        wrong = [probe for probe in wrong if not has_marks(probe)]
    assert wrong == []


@pytest.mark.parametrize("name", ["spm", "spm-no-prefix"])
def test_sentencepiece_vocabularies_give_llama_cpps_ids(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "spm", add_space_prefix=name == "spm")
    assert differing(load_tokenizer(str(path)), FILES[name]["special"]) == []


@pytest.mark.parametrize("name", [*[f"bpe/{name}" for name in BPE_NAMES], "spm"])
def test_bos_is_added_where_llama_cpp_adds_it(name: str, tmp_path: Path) -> None:
    if name == "spm":
        path = write_gguf(tmp_path / "m.gguf", "spm")
    else:
        path = write_gguf(tmp_path / "m.gguf", "bpe", pre=name.removeprefix("bpe/"))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("Hello").tolist() == FILES[name]["with_ends"]


def test_the_file_decides_on_bos_and_eos(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", "bpe", pre="gpt-2", add_bos_token=True, add_eos_token=True
    )
    tokenizer = load_tokenizer(str(path))
    plain = tokenizer.encode("a b", add_special_tokens=False).tolist()
    assert tokenizer.encode("a b").tolist() == [1, *plain, 2]
    path = write_gguf(tmp_path / "n.gguf", "spm", add_bos_token=False)
    assert 1 not in load_tokenizer(str(path)).encode("a b")


def test_a_file_without_a_cutting_gets_the_default(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe")
    assert differing(load_tokenizer(str(path)), FILES["bpe/default"]["special"]) == []


def test_an_unknown_cutting_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", pre="martian")
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'martian'.*smollm"):
        load_tokenizer(str(path))


def test_an_unknown_model_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", model="rwkv")
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is 'rwkv'"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("missing", ["model"])
def test_a_missing_key_is_named(missing: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", **{missing: None})
    with pytest.raises(ValueError, match=rf"no tokenizer\.ggml\.{missing}"):
        load_tokenizer(str(path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(ValueError, match="Cannot load the tokenizer"):
        load_tokenizer(str(path))


def test_special_ids_and_ends_come_from_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", pre="smollm", eot_token_id=4)
    tokenizer = load_tokenizer(str(path))
    user_defined = load_golden("vocabularies.json")["bpe"]["tokens"].index("<tool>")
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2, 4)
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.decode([3, user_defined, 4]) == "<tool>"
    assert tokenizer.decode([3, user_defined, 4], skip_special_tokens=False) == (
        "<|im_start|><tool><|im_end|>"
    )


def test_an_end_outside_the_vocabulary_is_no_end(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", eos_token_id=1 << 20)
    assert load_tokenizer(str(path)).eos_token_ids == ()


@pytest.mark.parametrize("vocabulary", ["bpe", "spm"])
def test_text_survives_the_round_trip(vocabulary: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", vocabulary)))
    for probe in PROBES:
        ids = tokenizer.encode(probe)
        assert ids.dtype == np.int32
        shown = tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<s>")
        if not any(special in probe for special in ("<|im_", "</s>", "<tool>")):
            assert shown.removeprefix(" " if vocabulary == "spm" else "") in (
                probe,
                probe.removeprefix(" " if vocabulary == "spm" else ""),
            )


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "bpe", pre="smollm")
    tokenizer = load_tokenizer(str(tmp_path))
    assert differing(tokenizer, FILES["bpe/smollm"]["special"]) == []
