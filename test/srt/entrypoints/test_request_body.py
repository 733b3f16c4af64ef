"""Token ids straight from JSON text: the same ids that a JSON parser would give."""

from __future__ import annotations

import json
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.entrypoints import request_body
from sglang.srt.entrypoints.request_body import (
    list_kind,
    read_token_ids,
    split_list,
    split_object,
)
from sglang.srt.errors import RequestError

SPACE = st.sampled_from(["", " ", "\n", "\t ", "  \r\n"])


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50),
    st.lists(SPACE, min_size=4, max_size=4),
)
def test_ids_equal_those_of_a_json_parser(ids: list[int], spaces: list[str]) -> None:
    a, b, c, d = spaces
    text = f"[{a}" + f"{b},{c}".join(map(str, ids)) + f"{d}]"
    assert json.loads(text) == ids
    result = read_token_ids("ids", msgspec.Raw(text.encode()))
    assert result.dtype == np.int32
    assert result.tolist() == ids


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "_ID_BLOCK_BYTES", 7)
    ids = list(range(990, 1100))
    raw = msgspec.Raw(json.dumps(ids).encode())
    assert read_token_ids("ids", raw).tolist() == ids


@given(st.integers())
def test_integers_outside_int32_are_refused(value: int) -> None:
    raw = msgspec.Raw(f"[1, {value}]".encode())
    if 0 <= value < 2**31:
        assert read_token_ids("ids", raw)[1] == value
    else:
        with pytest.raises(RequestError, match=r"'ids': token id .* out of range"):
            read_token_ids("ids", raw)


@pytest.mark.parametrize(
    "text", ["[]", "[ ]", "[1.5]", "[1e2]", "[true]", '["1"]', "[[1]]", "{}", "1", '"1"']
)
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="'ids'"):
        read_token_ids("ids", msgspec.Raw(text.encode()))


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
    assert "byte 7" in caught.value.message
    assert caught.value.http_status == 400
