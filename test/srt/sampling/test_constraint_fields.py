"""Which constraints a request may carry: one at a time, bounded in size, schemas that are JSON."""

from __future__ import annotations

import pytest

from sglang.srt.errors import RequestError
from sglang.srt.sampling.sampling_params import (
    MAX_CONSTRAINT_CHARS,
    Constraint,
    SamplingParams,
)


def refusal(**fields: str) -> str:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields).verify(10)
    assert caught.value.http_status == 400
    return str(caught.value)


def test_each_kind_is_the_constraint() -> None:
    assert SamplingParams().constraint is None
    cases = {"json_schema": "{}", "regex": "a+", "ebnf": "r ::= x", "structural_tag": "{}"}
    for kind, text in cases.items():
        params = SamplingParams(**{kind: text})
        params.verify(10)
        assert params.constraint == Constraint(kind, text)


def test_only_one_constraint_at_a_time() -> None:
    assert refusal(regex="a", ebnf="root ::= a") == (
        "Only one constraint can be given, not regex and ebnf."
    )
    assert "json_schema and regex" in refusal(json_schema="{}", regex="a")


def test_a_schema_must_be_a_json_object() -> None:
    assert "not valid JSON" in refusal(json_schema="{")
    assert refusal(json_schema="[]") == "json_schema must be a JSON object."
    assert "not valid JSON" in refusal(json_schema='{"a":' * 20_000)
    assert "not valid JSON" in refusal(json_schema='{"a": "\ud800"}')
    assert refusal(structural_tag="[]") == "structural_tag must be a JSON object."


def test_a_constraint_is_bounded() -> None:
    limits = {"json_schema": 131072, "regex": 16384, "ebnf": 65536, "structural_tag": 131072}
    assert limits == MAX_CONSTRAINT_CHARS
    for kind, most in limits.items():
        empty = '{"const": ""}' if most == 131072 else ""
        text = empty[:-2] + "a" * (most - len(empty)) + empty[-2:]
        SamplingParams(**{kind: text}).verify(10)
        assert refusal(**{kind: text + " "}) == (
            f"{kind} has {most + 1} characters, at most {most} are served."
        )
