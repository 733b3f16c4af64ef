"""What a serving benchmark sends: lengths, texts, files and times. A token is a letter here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.bench.serving_load import DATASETS, LoadShape, arrival_times, make_load

SHAPE = LoadShape(num_prompts=50, input_len=20, output_len=10)


class Letters:
    """A token is a letter of the alphabet; `joined`: the pair "aa" is one more token."""

    def __init__(self, joined: bool = False) -> None:
        self.ordinary_ids = np.arange(2 if joined else 26)
        self._joined = joined

    def encode(self, text: str) -> list[int]:
        if self._joined:
            text = text.replace("aa", "{")
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids).replace("{", "aa")


def sharegpt(folder: Path, *conversations: Any) -> str:
    path = folder / "share.json"
    path.write_text(json.dumps(conversations))
    return str(path)


def talk(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


def test_random_lengths_are_drawn_between_the_ratio_and_the_whole() -> None:
    load = make_load("random", None, replace(SHAPE, range_ratio=0.5), Letters(), 3)
    assert len(load) == 50
    assert {one.prompt_len for one in load} <= set(range(10, 21))
    assert {one.output_len for one in load} <= set(range(5, 11))
    assert len({one.prompt_len for one in load}) > 3
    assert all(len(one.prompt) == one.prompt_len for one in load)
    whole = make_load("random", None, replace(SHAPE, range_ratio=1.0), Letters(), 3)
    assert {(one.prompt_len, one.output_len) for one in whole} == {(20, 10)}
    assert min(one.prompt_len for one in make_load("random", None, SHAPE, Letters(), 3)) >= 1


def test_a_seed_says_everything() -> None:
    first, again, other = (make_load("random-ids", None, SHAPE, Letters(), s) for s in (1, 1, 2))
    assert first == again != other


def test_ids_are_sent_as_they_are() -> None:
    load = make_load("random-ids", None, replace(SHAPE, as_ids=True), Letters(), 1)
    assert all(isinstance(one.prompt, list) and len(one.prompt) == one.prompt_len for one in load)


def test_texts_are_counted_as_the_tokenizer_counts_them() -> None:
    """Where neighbours join, a text of drawn ids has fewer tokens: more are added."""
    codec = Letters(joined=True)
    load = make_load("random", None, replace(SHAPE, range_ratio=1.0), codec, 1)
    assert all(len(codec.encode(str(one.prompt))) == one.prompt_len for one in load)
    assert sum(one.prompt_len == 20 for one in load) > 45


def test_words_of_a_file_are_cut_and_repeated(tmp_path: Path) -> None:
    path = sharegpt(tmp_path, talk("abc", "x"))
    shape = replace(SHAPE, range_ratio=1.0, input_len=7)
    assert {one.prompt for one in make_load("random", path, shape, Letters(), 1)} == {"abcabca"}


def test_conversations_keep_their_lengths(tmp_path: Path) -> None:
    path = sharegpt(
        tmp_path,
        talk("question", "answers", "ignored"),
        talk("no", "answer is too long a one"),
        talk("alone"),
        talk("longquestion", "longanswer"),
        {"conversations": [{"value": 3}]},
        "strange",
    )
    load = make_load("sharegpt", path, SHAPE, Letters(), 1)
    assert {(one.prompt, one.prompt_len, one.output_len) for one in load} == {
        ("question", 8, 7),
        ("longquestion", 12, 10),
    }
    (short,) = make_load("sharegpt", path, replace(SHAPE, sharegpt_context_len=15), Letters(), 1)
    assert short.prompt == "question"
    fixed = make_load("sharegpt", path, replace(SHAPE, sharegpt_output_len=5), Letters(), 1)
    assert {one.output_len for one in fixed} == {5}
    assert len(make_load("sharegpt", path, replace(SHAPE, num_prompts=1), Letters(), 1)) == 1


@pytest.mark.parametrize("as_ids", [False, True])
def test_groups_share_their_system_prompt(as_ids: bool) -> None:
    shape = LoadShape(
        num_groups=3, prompts_per_group=4, system_prompt_len=30, question_len=5,
        group_output_len=9, as_ids=as_ids,
    )  # fmt: skip
    load = make_load("generated-shared-prefix", None, shape, Letters(), 1)
    heads = [str(one.prompt[:30]) for one in load]
    assert len(load) == 12
    assert sorted(heads.count(head) for head in set(heads)) == [4, 4, 4]
    assert heads != sorted(heads), "groups come mixed"
    assert {one.output_len for one in load} == {9}
    assert {one.prompt_len for one in load} == {35 if as_ids else 37}
    assert len({str(one.prompt) for one in load}) == 12


@pytest.mark.parametrize(
    ("dataset", "text", "shape", "complaint"),
    [
        ("mmmu", None, SHAPE, f"--dataset-name mmmu: {', '.join(DATASETS)} exist"),
        ("sharegpt", None, SHAPE, "needs --dataset-path"),
        ("random", None, replace(SHAPE, num_prompts=0), "num_prompts must be at least 1, not 0"),
        ("random", None, replace(SHAPE, range_ratio=2.0), "is not between 0 and 1"),
        ("sharegpt", "{", SHAPE, "--dataset-path"),
        ("sharegpt", "{}", SHAPE, "is no list of conversations"),
        ("sharegpt", "[]", SHAPE, "no conversation of a usable length"),
        ("random", "[]", SHAPE, "no text in it"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    tmp_path: Path, dataset: str, text: str | None, shape: LoadShape, complaint: str
) -> None:
    path = None
    if text is not None:
        path = str(tmp_path / "file.json")
        Path(path).write_text(text)
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")) as caught:
        make_load(dataset, path, shape, Letters(), 1)
    assert "\n" not in str(caught.value)


def test_arrivals() -> None:
    assert arrival_times(3, float("inf"), 1) == [0.0] * 3
    times = arrival_times(4000, 20.0, 1)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.06)
    gaps = np.diff(times)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1), "Poisson: as wide as the mean"
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="is not above 0"):
            arrival_times(3, rate, 1)
