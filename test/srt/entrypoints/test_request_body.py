"""A body is split into raw fields; the long values of a long one are read beforehand."""

from __future__ import annotations

import json
import re
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.entrypoints import body_outline, request_body
from sglang.srt.entrypoints.generate_request_body import parse_generate
from sglang.srt.entrypoints.request_body import (
    Fields,
    list_kind,
    split_body,
    split_list,
    split_object,
)
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.errors import RequestError


def test_split_object_keeps_values_as_text() -> None:
    fields = split_object(b'{"a": [1, {"b": null}] , "c":"x"}')
    assert bytes(fields["a"]) == b'[1, {"b": null}]'
    assert bytes(fields["c"]) == b'"x"'
    assert [bytes(row) for row in split_list(fields["a"])] == [b"1", b'{"b": null}']


@pytest.mark.parametrize(
    ("text", "kind"), [(b"[]", b"]"), (b"[ \n]", b"]"), (b"[ [1]]", b"["), (b'[\t"a"]', b'"')]
)
def test_list_kind(text: bytes, kind: bytes) -> None:
    assert list_kind(msgspec.Raw(text)) == kind


def test_json_errors_say_where() -> None:
    with pytest.raises(RequestError, match=re.escape("Invalid JSON in the request body")) as caught:
        split_object(b'{"a": 01}')
    assert "JSON is malformed" in caught.value.message
    assert "byte 7" in caught.value.message
    assert caught.value.http_status == 400


# ---- what a long body costs


@pytest.mark.parametrize("name", ["input_ids", "text", "input_ids_b64"])
def test_the_parser_never_sees_a_long_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the interpreter lock from a body's first byte to its last."""
    value = {
        "input_ids": [*range(100_000)],
        "text": "text " * 100_000,
        "input_ids_b64": "A" * 400_000,
    }
    body = json.dumps({"rid": "r", name: value[name], "stream": True}).encode()
    seen: list[int] = []

    class Watch:
        def __init__(self, decoder: msgspec.json.Decoder[Any]) -> None:
            self._decoder = decoder

        def decode(self, data: Any) -> Any:
            seen.append(len(memoryview(data)))
            return self._decoder.decode(data)

    monkeypatch.setattr(request_body, "_RAW_FIELDS", Watch(request_body._RAW_FIELDS))
    monkeypatch.setattr(body_outline, "_TEXT", Watch(body_outline._TEXT))
    monkeypatch.setattr(body_outline, "PIECE_BYTES", 1 << 16)
    call = parse_generate(body)
    assert call.stream
    assert len(seen) > 1
    assert max(seen) < (1 << 16) + 1000


def test_memory_of_a_long_request_is_bounded_by_its_body() -> None:
    body = json.dumps({"input_ids": [*range(200_000, 600_000)]}).encode()
    tracemalloc.start()
    call = parse_generate(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(body)
    ids = call.call.prompts[0].input_ids
    assert ids is not None
    assert len(ids) == 400_000


# ---- long bodies: everything counts as long here


@pytest.fixture
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "INLINE_PARSE_BYTES", 0)
    monkeypatch.setattr(body_outline, "LONG_BYTES", 2)
    monkeypatch.setattr(body_outline, "PIECE_BYTES", 3)


def split_long(body: bytes) -> Fields:
    return split_body(bytearray(body), ids_in=["ids"], text_in=["text"], most_lists=3)


def plain(fields: Fields) -> dict[str, Any]:
    """What a JSON parser would have given."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, IdLists):
            rows = [ids.tolist() for ids in value.arrays]
            values[name] = rows if value.is_batch else rows[0]
        else:
            values[name] = json.loads(bytes(value)) if isinstance(value, msgspec.Raw) else value
    return values


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
OTHER = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.usefixtures("everything_is_long")
@given(
    st.dictionaries(TEXT, OTHER, max_size=4),
    IDS | st.lists(IDS, min_size=1, max_size=3),
    TEXT,
    st.randoms(use_true_random=False),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
)
@settings(max_examples=200)
def test_long_values_are_those_of_a_json_parser(
    others: dict[str, Any], ids: Any, text: str, random: Any, ascii_only: bool, indent: Any
) -> None:
    items = [*{**others, "ids": ids, "text": text}.items()]
    random.shuffle(items)
    values = dict(items)
    fields = split_long(json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode())
    assert isinstance(fields["ids"], IdLists)
    assert plain(fields) == values


@pytest.mark.usefixtures("everything_is_long")
@given(st.binary(max_size=40) | TEXT.map(str.encode))
def test_what_is_no_json_is_refused_as_before(junk: bytes) -> None:
    body = b'{"a":1,"text":"xyz","ids":[1,2]' + junk
    try:
        values = json.loads(body)
    except ValueError:
        with pytest.raises(RequestError) as caught:
            split_long(body)
        assert caught.value.http_status == 400
    else:
        assert plain(split_long(body)).keys() == values.keys()


@pytest.mark.usefixtures("everything_is_long")
@pytest.mark.parametrize(
    "body",
    [
        b'{"ids":[1,2}',
        b'{"ids":[1,2',
        b'{"ids":[1,2]',
        b'{"ids":[1,2]]}',
        b'{"ids":[[1,2],]}',
        b'{"ids":[[1,2] [3]]}',
        b'{"text":"no end}',
        b'{"text":"bad escape \\q here"}',
        b'{"text":"a raw\nline"}',
        b'{"text":"not \xff UTF-8"}',
        b'{"text":"half a \xe4\xbd character"}',
        b'{"ids":[1,2],"b":[}',
        b'["ids",[1,2]]',
        b"   ",
    ],
)
def test_broken_bodies(body: bytes) -> None:
    with pytest.raises(RequestError, match=r"Invalid (JSON|value)") as caught:
        split_long(body)
    assert caught.value.http_status == 400


@pytest.mark.usefixtures("everything_is_long")
def test_the_byte_of_an_error_is_that_of_the_whole_body() -> None:
    body = b'{"ids":[1,2,3,4,5,6,7],"text":"abcdefgh","a":01}'
    with pytest.raises(RequestError, match=re.escape(f"(byte {body.index(b'01') + 1})")):
        split_long(body)


@pytest.mark.usefixtures("everything_is_long")
def test_a_name_that_comes_again_counts_last() -> None:
    fields = split_long(b'{"text":"abcdef","text":7,"ids":[1],"ids":[2,3]}')
    assert plain(fields) == {"text": 7, "ids": [2, 3]}


@pytest.mark.usefixtures("everything_is_long")
def test_a_name_with_escapes_is_the_same_name() -> None:
    assert plain(split_long(b'{"\\u0069ds":[4,5]}')) == {"ids": [4, 5]}


@pytest.mark.usefixtures("everything_is_long")
def test_more_lists_than_allowed() -> None:
    with pytest.raises(RequestError, match="'ids': more than 3 prompts"):
        split_long(b'{"ids":[[1],[2],[3],[4]]}')


@pytest.mark.usefixtures("everything_is_long")
def test_surrogate_pairs_are_never_cut() -> None:
    text = "\U0001f600" * 20
    assert split_long(json.dumps({"text": text}).encode())["text"] == text
