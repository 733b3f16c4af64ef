"""Structural tags: which texts they allow, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from sglang.srt.constrained.grammar import Grammar, JsonStyle, Vocabulary
from sglang.srt.errors import RequestError
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import (
    END,
    allowed,
    can_write,
    compiled,
    golden_tokenizer,
    vocabulary_of,
)

NUMBER = {"type": "object", "properties": {"n": {"$ref": "#/$defs/k"}}, "required": ["n"],
          "additionalProperties": False, "$defs": {"k": {"type": "integer"}}}  # fmt: skip
WORD = {"type": "regex", "pattern": "[a-c]+"}
ANY = {"type": "any_text"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), "bpe")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer)


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: dict[str, Any], end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return of("sequence", elements=list(elements))


CALLS = [
    tag("<fn=a>", of("json_schema", json_schema=NUMBER), "</fn>"),
    tag("<fn=b>", WORD, "</fn>"),
]
TRIGGERED = of("triggered_tags", triggers=["<fn="], tags=CALLS)
SEPARATED = of("tags_with_separator", tags=[tag("(", WORD, ")")], separator=", ")

CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (const('a\n\t"\\é/b'), ['a\n\t"\\é/b'], ["a", 'a\n\t"\\é/bb']),
    (of("json_schema", json_schema=NUMBER), ['{"n": 1}'], ['{"n": "1"}', "{}"]),
    (of("json_schema", json_schema=True), ["[1]", '"a"'], ["a"]),
    (of("grammar", grammar='root ::= "}" | x\nx ::= [0-9]+'), ["}", "12"], ["}1", "a"]),
    (of("regex", pattern="a/\n[b]"), ["a/\nb"], ["a/b"]),
    (ANY, ["", "a <fn=\nb"], []),
    (of("any_text", excludes=["foo", "ba"]), ["fo b oo"], ["a foo", "ba", "a\nba"]),
    (tag("<r>", ANY, ["</r>", "|"]), ["<r>a\n</b></r>", "<r>|"], ["<r>a", "<r></r>a", "a"]),
    (tag("<r>", ANY, ""), ["<r>", "<r>abc</r>"], ["a<r>"]),
    (tag("<r>", of("any_text", excludes=["x"]), "</r>"), ["<r>a</r>"], ["<r>x</r>"]),
    (sequence(const("a"), WORD, const("!")), ["ab!"], ["a!", "ab"]),
    (sequence(ANY, const("!"), WORD), ["x y!ab"], ["x y", "!", "!ab!"]),
    (sequence(ANY, tag("<r>", WORD, "</r>"), ANY), ["<r>a</r>", "x<r>a</r>y"], ["x", "<r>x</r>"]),
    (of("or", elements=[const("yes"), sequence(const("no "), ANY)]), ["yes", "no way"], ["no"]),
    (
        tag("<r>", of("or", elements=[const("yes"), sequence(const("no "), ANY)]), "</r>"),
        ["<r>yes</r>", "<r>no way</r>"],
        ["<r>yes", "<r>no way", "<r></r>"],
    ),
    (sequence(of("optional", content=const("a")), const("b")), ["b", "ab"], ["aab"]),
    (of("plus", content=const("ab")), ["ab", "abab"], ["", "aba"]),
    (of("star", content=const("ab")), ["", "abab"], ["aba"]),
    (of("repeat", min=1, max=2, content=const("ab")), ["ab", "abab"], ["", "ababab"]),
    (of("repeat", min=2, max=-1, content=const("ab")), ["abab", "ab" * 5], ["ab"]),
    (
        TRIGGERED,
        ["", "text", 'a <fn=a>{"n": 1}</fn> b <fn=b>ab</fn>', "a <fn", "x</fn>"],
        ["<fn=", "<fn=c>", "<fn=b>{}", '<fn=a>{"n": 1}</fn', "a <fn=b>ab"],
    ),
    (
        {**TRIGGERED, "at_least_one": True},
        ["<fn=b>ab</fn>", "<fn=b>a</fn> and <fn=b>b</fn> then"],
        ["", "text", "text <fn=b>ab</fn>"],
    ),
    (
        {**TRIGGERED, "stop_after_first": True},
        ["", "text", "text <fn=b>ab</fn>"],
        ["<fn=b>ab</fn> more", "<fn=b>"],
    ),
    (
        {**TRIGGERED, "at_least_one": True, "stop_after_first": True},
        ["<fn=b>ab</fn>"],
        ["", "a<fn=b>ab</fn>", "<fn=b>ab</fn>a"],
    ),
    ({**TRIGGERED, "excludes": ["bad"]}, ["<fn=b>a</fn>ba"], ["bad", "bad<fn=b>a</fn>"]),
    (
        tag("<r>", TRIGGERED, "</r>"),
        ["<r></r>", "<r>a<fn=b>b</fn>c</r>"],
        ["<r>a<fn=b>b</r>", "<r>a", "<r></r>a"],
    ),
    (
        tag("<r>", {**TRIGGERED, "stop_after_first": True}, "</r>"),
        ["<r></r>", "<r>a<fn=b>b</fn></r>"],
        ["<r>a<fn=b>b</fn>", "<r>a<fn=b>b</fn>a</r>"],
    ),
    (SEPARATED, ["", "(a)", "(a), (bc)"], ["(a)(b)", "(a), ", "a"]),
    ({**SEPARATED, "separator": ""}, ["(a)(b)"], ["(a), (b)"]),
    ({**SEPARATED, "at_least_one": True}, ["(a)"], [""]),
    ({**SEPARATED, "stop_after_first": True}, ["", "(a)"], ["(a), (b)"]),
    ({**SEPARATED, "stop_after_first": True, "at_least_one": True}, ["(a)"], [""]),
]


@pytest.mark.parametrize(("form", "matching", "others"), CASES)
def test_texts_of_every_format(
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    form: dict[str, Any],
    matching: list[str],
    others: list[str],
) -> None:
    text = json.dumps({"type": "structural_tag", "format": form})
    grammar = compiled(vocabulary, "structural_tag", text)
    assert [t for t in matching if not can_write(grammar, tokenizer, t)] == []
    assert [t for t in others if can_write(grammar, tokenizer, t)] == []


def test_the_older_form(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    structures = [{"begin": "<fn=a>", "schema": NUMBER, "end": "</fn>"}]
    text = json.dumps({"structures": structures, "triggers": ["<fn="]})
    grammar = compiled(vocabulary, "structural_tag", text)
    assert can_write(grammar, tokenizer, 'So: <fn=a>{"n": 7}</fn> done')
    assert not can_write(grammar, tokenizer, "So: <fn=a>{}</fn> done")


def test_json_is_laid_out_as_the_server_says(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    text = json.dumps({"format": of("json_schema", json_schema=NUMBER)})
    grammar = compiled(vocabulary, "structural_tag", text, JsonStyle(compact=True))
    assert can_write(grammar, tokenizer, '{"n":1}')
    assert not can_write(grammar, tokenizer, '{"n": 1}')


def following(grammar: Grammar, token_ids: Iterable[int]) -> set[int]:
    matcher = grammar.matcher()
    for token_id in token_ids:
        matcher.accept(token_id)
        assert matcher.error is None
    return allowed(matcher)


@pytest.mark.parametrize("name", ["<|im_start|>", "<tool>"])
@pytest.mark.parametrize("at", ["begin", "end", "trigger"])
def test_a_special_token_stands_where_its_name_does(
    vocabulary: Vocabulary, at: str, name: str
) -> None:
    form = {
        "begin": tag(f"a{name}b", WORD, "."),
        "end": tag("a", ANY, name),
        "trigger": of("triggered_tags", triggers=[name], tags=[tag(name, WORD, ".")]),
    }[at]
    grammar = compiled(vocabulary, "structural_tag", json.dumps({"format": form}))
    before = [vocabulary.tokens.tokenize_str(c)[0] for c in {"begin": "a", "end": "ax"}.get(at, "")]
    special = set(vocabulary.special.ids.values()) - {END}
    token_id = vocabulary.special.ids[name]
    free = {vocabulary.special.ids["<tool>"]} if at != "begin" else set()
    assert following(grammar, before) & special == {token_id, *free}
    after = following(grammar, [*before, token_id])
    letter = vocabulary.tokens.tokenize_str({"begin": "b"}.get(at, "a"))[0]
    assert after & special == set()
    assert (letter in after) == (at != "end")
    assert (END in after) == (at == "end")


def test_a_token_that_texts_have_may_come_as_its_letters(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    form = of("triggered_tags", triggers=["<tool>"], tags=[tag("<tool>", WORD, ".")])
    grammar = compiled(vocabulary, "structural_tag", json.dumps({"format": form}))
    letters = [vocabulary.tokens.tokenize_str(c)[0] for c in "x<tool>"]
    assert len(set(letters)) > 3
    after = following(grammar, letters)
    assert {vocabulary.tokens.tokenize_str(c)[0] for c in "abc"} <= after
    assert vocabulary.tokens.tokenize_str("d")[0] not in after
    assert END not in after
    token_id = vocabulary.special.ids["<tool>"]
    free = compiled(vocabulary, "structural_tag", json.dumps({"format": ANY}))
    assert {token_id, END} <= following(free, [letters[0], token_id, token_id])
    other = {**ANY, "excludes": ["tool"]}
    held = compiled(vocabulary, "structural_tag", json.dumps({"format": other}))
    assert token_id not in following(held, letters[:1])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": {"type": "any_tokens"}}', "any_tokens"),
        ('{"format": {"type": "any_text", "exclude": []}}', "exclude"),
        ('{"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}}}', "end"),
        ('{"type": "json_schema"}', "its type is 'json_schema'"),
        ("{}", "neither a format nor structures"),
        (json.dumps({"format": const("")}), "a const_string is empty"),
        (json.dumps({"format": of("any_text", excludes=[""])}), "can't be excluded"),
        (json.dumps({"format": sequence(ANY, WORD)}), "must come last, or before a const_string"),
        (json.dumps({"format": of("star", content=ANY)}), "must come last"),
        (json.dumps({"format": of("repeat", min=3, max=2, content=WORD)}), "3 to 2 times"),
        (json.dumps({"format": sequence()}), "no elements"),
        (json.dumps({"format": {**TRIGGERED, "triggers": ["x"]}}), "'<fn=a>' must begin with one"),
        (json.dumps({"format": {**TRIGGERED, "triggers": ["<", "<fn"]}}), "not with 2"),
        (json.dumps({"format": {**TRIGGERED, "triggers": ["<fn", "x"]}}), "the trigger 'x'"),
        (json.dumps({"format": of("json_schema", json_schema={}, style="qwen_xml")}), "no style"),
        (json.dumps({"format": of("json_schema", json_schema=False)}), "nothing matches"),
        (json.dumps({"format": of("json_schema", json_schema={"type": "x"})}), "x"),
        (json.dumps({"format": of("regex", pattern="(")}), "structural_tag cannot be served"),
        (json.dumps({"format": of("grammar", grammar="root ::= x")}), "structural_tag cannot"),
    ],
)
def test_what_is_wrong_is_said(vocabulary: Vocabulary, text: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(vocabulary, "structural_tag", text)
    assert caught.value.http_status == 400
    assert str(caught.value).startswith("structural_tag cannot be served: ")
    assert reason in str(caught.value)


def deep(depth: int) -> str:
    text = '{"type": "optional", "content": ' * depth + '{"type": "const_string", "value": "a"}'
    return f'{{"format": {text}{"}" * depth}}}'


def test_deep_formats(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    grammar = compiled(vocabulary, "structural_tag", deep(200))
    assert can_write(grammar, tokenizer, "a")
    with pytest.raises(RequestError, match="nested too deeply"):
        compiled(vocabulary, "structural_tag", deep(4_000))


def test_which_tokens_are_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    special = vocabulary.special
    assert set(special.ids.values()) == {*tokenizer.special_ids, *special.written}
    assert special.written == {special.ids["<tool>"]}
