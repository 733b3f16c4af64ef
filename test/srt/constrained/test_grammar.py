"""Grammars over small vocabularies: what may follow, where texts end, what is refused."""

from __future__ import annotations

import json
import random

import pytest

from sglang.srt.constrained.grammar import (
    Grammar,
    JsonStyle,
    Vocabulary,
    check_style,
)
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import (
    END,
    allowed,
    can_write,
    compiled,
    golden_tokenizer,
    vocabulary_of,
)

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), request.param)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer)


def test_every_token_has_the_bytes_that_the_detokenizer_shows(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    for token_id in range(tokenizer.vocab_size):
        if token_id not in tokenizer.special_ids:
            shown = tokenizer.token_bytes(token_id)
            if shown == b"\xff":
                continue  # in no text; the library marks special tokens with it
            assert vocabulary.tokens.decode_bytes([token_id]) == shown, token_id


def test_special_tokens_spell_nothing(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    anything = compiled(vocabulary, "regex", "(.|\n)*")
    may = allowed(anything.matcher())
    assert may & tokenizer.special_ids == {END}
    assert len(may) > tokenizer.vocab_size // 2


@pytest.mark.parametrize(
    ("kind", "text", "matching", "others"),
    [
        ("regex", "(Paris|London)", ["Paris", "London"], ["Par", "Berlin", "Paris "]),
        ("regex", r"[a-c]{2}\d+", ["ab1", "cc12345"], ["a1", "abc1", "ab"]),
        ("regex", "é+日本", ["é日本", "ééé日本"], ["é日", "e日本"]),
        ("json_schema", PERSON, ['{"name": "Bo", "age": 7}'], ['{"name": "Bo"}', '{"age": 7}']),
        ("json_schema", PERSON, ['{"name":\n"B\\n", "age":150}'], ['{"name": "B", "age": 151}']),
        ("json_schema", '{"type": "object"}', ['{"a": [1, null, {"b": "c"}]}', "{}"], ["[]", "1"]),
        ("json_schema", '{"enum": ["x", 5]}', ['"x"', "5"], ['"y"', "55"]),
        (
            "ebnf",
            'root ::= (expr "=" term)+\nexpr ::= term ([-+] term)*\nterm ::= [0-9]+',
            ["1=1", "12+3=15"],
            ["1+=2", "a=1"],
        ),
        ("ebnf", '%llguidance {}\nstart: "a" /[0-9]+/', ["a1"], ["a", "1"]),
    ],
)
def test_a_grammar_allows_its_texts_and_no_other(
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    kind: str,
    text: str,
    matching: list[str],
    others: list[str],
) -> None:
    grammar = compiled(vocabulary, kind, text)
    for example in matching:
        assert can_write(grammar, tokenizer, example), example
    for example in others:
        assert not can_write(grammar, tokenizer, example), example


def test_whatever_is_chosen_is_json_of_the_schema(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    """Walks by chance; none of those that end is anything but the schema's JSON."""
    grammar = compiled(vocabulary, "json_schema", PERSON)
    ended = 0
    for seed in range(40):
        chance = random.Random(seed)
        matcher, ids = grammar.matcher(), []
        for _ in range(60):
            may = allowed(matcher)
            token = chance.choice(sorted(may))
            if chance.random() < 0.8:  # towards an end
                token = min(may, key=lambda i: (i != END, _hurry(tokenizer.token_bytes(i)), i))
            matcher.accept(token)
            assert matcher.error is None
            if token == END:
                break
            ids.append(token)
        else:
            continue
        ended += 1
        read = json.loads(b"".join(tokenizer.token_bytes(i) for i in ids).decode())
        assert list(read) == ["name", "age"]
        assert isinstance(read["name"], str)
        assert isinstance(read["age"], int)
        assert read["age"] <= 150
    assert ended > 5


def _hurry(piece: bytes) -> int:
    """How little a piece does to bring JSON to an end."""
    return min((place for place, mark in enumerate(b'"},:0') if mark in piece), default=9)


def test_a_complete_text_can_only_end(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    matcher = compiled(vocabulary, "regex", "a").matcher()
    matcher.accept(token_of(tokenizer, "a"))
    assert allowed(matcher) == {END}
    matcher.accept(END)
    assert matcher.hidden() is None  # what a step in flight samples is nobody's
    matcher.accept(7)
    assert matcher.error is None


def test_unwanted_tokens_are_hidden_while_others_are_left(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    matcher = compiled(vocabulary, "regex", "a{1,2}").matcher()
    matcher.accept(token_of(tokenizer, "a"))
    assert END in allowed(matcher)
    assert END not in allowed(matcher, stops=(END,))
    assert END not in allowed(matcher, stops=())  # ignore_eos: it ends the text all the same
    matcher.accept(token_of(tokenizer, "a"))
    assert allowed(matcher, stops=(END,)) == {END}  # the grammar is stronger


def test_a_token_that_is_not_allowed_is_an_error(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    matcher = compiled(vocabulary, "regex", "a").matcher()
    matcher.accept(token_of(tokenizer, "b"))
    assert matcher.error is not None
    assert matcher.hidden() is None


def test_matchers_of_one_grammar_are_apart(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    grammar: Grammar = compiled(vocabulary, "regex", "[ab]c")
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(token_of(tokenizer, "a"))
    assert token_of(tokenizer, "b") in allowed(second)
    assert token_of(tokenizer, "b") not in allowed(first)
    third = grammar.matcher()
    third.replay([token_of(tokenizer, "a")])
    assert allowed(third) == allowed(first)


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    """A model may have more rows of logits than its tokenizer has tokens, or fewer."""
    size = tokenizer.vocab_size
    for vocab_size in (size + 77, size - 5):
        matcher = compiled(vocabulary_of(tokenizer, vocab_size), "regex", "(.|\n)*").matcher()
        hidden = matcher.hidden()
        assert hidden is not None
        assert len(hidden) == vocab_size
        assert hidden[size:].all()


def test_json_may_be_compact_or_laid_out_by_a_pattern(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    spaced, tight = '{"name": "B", "age": 1}', '{"name":"B","age":1}'
    wide = '{"name":  "B",  "age":  1}'
    styles = {JsonStyle(): (True, True, True), JsonStyle(compact=True): (False, True, False)}
    styles[JsonStyle(whitespace_pattern=" ?")] = (True, True, False)
    for style, expected in styles.items():
        grammar = compiled(vocabulary, "json_schema", PERSON, style)
        found = tuple(can_write(grammar, tokenizer, text) for text in (spaced, tight, wide))
        assert found == expected, style


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "(a", "regex cannot be served: .*unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("json_schema", '{"type": "thing"}', "json_schema cannot be served: Invalid type: thing"),
        ("json_schema", '{"type": "object", "dependentRequired": {}}', "dependentRequired"),
        ("json_schema", '{"$ref": "http://127.0.0.1/schema.json"}', "json_schema cannot be served"),
        ("json_schema", '{"a":' * 200 + "1" + "}" * 200, "json_schema cannot be served"),
        ("ebnf", 'root ::= "a" other', "ebnf cannot be served: .*other"),
        ("ebnf", 'main ::= "a"', "No 'root' rule"),
        ("ebnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "ebnf cannot be served"),
        ("regex", "[^\\s\\S]", "regex cannot be served"),
    ],
)
def test_what_cannot_be_served_is_said(
    vocabulary: Vocabulary, kind: str, text: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        compiled(vocabulary, kind, text)
    assert caught.value.http_status == 400
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


def test_a_text_that_needs_too_much_ends_with_an_error(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    """The library's own bounds hold: after "a", two thousand rules may go on."""
    number = 2100
    rules = "\n".join(f'r{i}: "b" r{i}|"c"' for i in range(number))
    branches = "|".join(f"r{i}" for i in range(number))
    matcher = compiled(
        vocabulary, "ebnf", f'%llguidance {{}}\nstart: "a" ({branches})\n{rules}'
    ).matcher()
    assert allowed(matcher)
    matcher.accept(token_of(tokenizer, "a"))
    assert matcher.hidden() is None
    assert matcher.error is not None
    assert "max is 2000" in matcher.error


def test_a_whitespace_pattern_is_checked_at_start() -> None:
    check_style(JsonStyle())
    check_style(JsonStyle(whitespace_pattern="[ \n]{0,2}"))
    with pytest.raises(ValueError, match=r"--constrained-json-whitespace-pattern: .*unclosed"):
        check_style(JsonStyle(whitespace_pattern="( "))


def test_a_tokenizer_that_nobody_can_read_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be served with this tokenizer"):
        Vocabulary(VocabularyReq('{"version": "1.0"}', 10, (END,)), 10)


def token_of(tokenizer: Tokenizer, text: str) -> int:
    """The id of the token that spells exactly `text`."""
    spelling = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == text.encode()]
    return spelling[0]
