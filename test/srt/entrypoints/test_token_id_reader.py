"""Token ids straight from JSON text: the same ids that a JSON parser would give."""

from __future__ import annotations

import json
import re
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.entrypoints import token_id_reader
from sglang.srt.entrypoints.generate_request_body import read_id_prompts
from sglang.srt.entrypoints.token_id_reader import read_id_list, read_id_lists
from sglang.srt.errors import RequestError

SPACE = st.sampled_from(["", " ", "\n", "\t ", "  \r\n", " " * 40])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_id_reader, "BLOCK_BYTES", 13)


@given(
    st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 12), min_size=1, max_size=50),
    st.lists(SPACE, min_size=4, max_size=4),
    st.integers(1, 60),
)
def test_ids_equal_those_of_a_json_parser(ids: list[int], spaces: list[str], block: int) -> None:
    a, b, c, d = spaces
    text = f"[{a}" + f"{b},{c}".join(map(str, ids)) + f"{d}]"
    assert json.loads(text) == ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_id_reader, "BLOCK_BYTES", block)
        result, end = read_id_list("ids", f"..{text}..".encode(), 2)
    assert result.dtype == np.int32
    assert result.tolist() == ids
    assert end == 2 + len(text.encode())


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1))
def test_lists_of_ids(rows: list[list[int]]) -> None:
    text = json.dumps(rows).encode()
    lists, end = read_id_lists("ids", bytearray(text), 0, 1000)
    assert [ids.tolist() for ids in lists.arrays] == rows
    assert lists.is_batch
    assert end == len(text)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0, 1, 7, 49])
@pytest.mark.parametrize(
    ("element", "problem"),
    [
        ("-1", "is -1: this token id is out of range"),
        ("-0", "is -0: this token id is out of range"),
        ("2147483648", "is 2147483648: this token id is out of range"),
        ("9999999999", "is 9999999999: this token id is out of range"),
        ("1" + "0" * 60, f"is 1{'0' * 39}...: this token id is out of range"),
        ("1.5", "is 1.5, but token ids must be integers"),
        ("1e2", "is 1e2, but token ids must be integers"),
        ("01", "is 01, but token ids must be integers"),
        ("+1", "is +1, but"),
        ("1 2", "is 1 2, but"),
        ("true", "is true, but"),
        ("null", "is null, but"),
        ("NaN", "is NaN, but"),
        ('"7"', 'is "7", but'),
        ('"]"', 'is ", but'),
        ("[3]", "is [3, but"),
        ('{"a":1}', 'is {"a":1}, but'),
        ("\u0663", "is \u0663, but"),
        ("", "is missing before"),
        ("   ", "is missing before"),
    ],
)
def test_the_element_that_is_no_id_is_named(at: int, element: str, problem: str) -> None:
    elements = [str(i * 1000) for i in range(50)]
    elements[at] = element
    text = f"[{', '.join(elements)}]".encode()
    with pytest.raises(RequestError) as caught:
        read_id_list("ids", text, 0)
    assert f"'ids': element {at} {problem}" in caught.value.message
    assert caught.value.http_status == 400


@pytest.mark.parametrize("text", ["[]", "[ ]", "[\n\t]"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="'ids': the list of token ids is empty"):
        read_id_list("ids", text.encode(), 0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[1, 2,   ", "[1" + ",1" * 40])
def test_a_list_without_an_end(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape("Invalid JSON in the request body")):
        read_id_list("ids", text.encode(), 0)


@pytest.mark.parametrize("text", ["{}", "1", '"1"', "[[1], 2]"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="'ids'"):
        read_id_prompts("ids", msgspec.Raw(text.encode()))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[1], 2]", "'ids': element 1 is not a list of token ids"),
        ("[[1], []]", "'ids[1]': the list of token ids is empty"),
        ("[[1], [2, -3]]", "'ids[1]': element 1 is -3"),
        ("[[1], [2], [3]]", "'ids': more than 2 prompts in one request"),
        ("[[1] [2]]", "expected a comma or ']' in 'ids' (byte 5)"),
        ("[[1],", "'ids': element 1 is not a list"),
    ],
)
def test_batches_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        read_id_lists("ids", text.encode(), 0, 2)


def long_list() -> tuple[np.ndarray[Any, Any], bytes]:
    ids = np.arange(300_000, 700_000, dtype=np.int32)
    return ids, ("[" + ",".join(map(str, ids.tolist())) + "]").encode()


def test_memory_follows_the_ids_not_the_text() -> None:
    """The ids, room to grow and a few blocks: no Python list, no copy of the text."""
    ids, text = long_list()
    tracemalloc.start()
    result, _ = read_id_list("ids", text, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(result, ids)
    assert peak < 1.25 * ids.nbytes + 24 * token_id_reader.BLOCK_BYTES


def test_no_step_is_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads wait for one numpy operation on one block, however long the list is."""
    _, text = long_list()
    sizes: list[int] = []
    parse = token_id_reader._parse

    def watch(chars: Any) -> Any:
        sizes.append(len(chars))
        return parse(chars)

    monkeypatch.setattr(token_id_reader, "_parse", watch)
    read_id_list("ids", text, 0)
    assert max(sizes) <= token_id_reader.BLOCK_BYTES
    assert len(sizes) < 1.1 * len(text) / token_id_reader.BLOCK_BYTES + 2
    assert sum(sizes) + len(sizes) + 1 == len(text)  # every byte once: a comma or bracket each
