"""Structural tags as a grammar of the library: text that is free, with parts in it that are not.

Pure, but for the library's translators of schemas, regular expressions and EBNF. Only `grammar.py`
calls it.

What has no end of its own (`any_text`, `triggered_tags`) is one lazy lexeme together with what ends
it: the library commits to the first of those that can end. So a part is compiled together with the
strings that end it, and says whether it has taken them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.constrained.structural_formats import (
    AnyText,
    ConstString,
    Ebnf,
    Format,
    JsonSchema,
    Optional_,
    Or,
    Plus,
    Regex,
    Repeat,
    Sequence_,
    Star,
    Tag,
    TagsWithSeparator,
    TriggeredTags,
    is_endless,
    read_tag,
)

_TEXT, _SOME_TEXT = "/(?s:.*)/", "/(?s:.+)/"
_UNENDED = "any_text and triggered_tags must come last, or before a const_string or a tag"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens that the library does not take for text: their ids by name, and which of them a
    tokenizer shows in texts all the same (`<tool_call>` of many vocabularies, say)."""

    ids: Mapping[str, int]
    written: frozenset[int]


NO_SPECIAL_TOKENS = SpecialTokens({}, frozenset())


@dataclass(frozen=True, slots=True)
class _Part:
    """An expression of the grammar; `took_end`: one of the ends that were given is part of it."""

    body: str
    took_end: bool = False


def lark_of(text: str, special: SpecialTokens, json_options: Mapping[str, Any]) -> str:
    """The grammar, in the library's variant of Lark, of a structural tag in JSON.

    Where a string has the name of a special token it means the token; its letters, too, if it is
    one that texts have. `json_options` go to the library with every schema. Raises ValueError
    saying what is wrong with the tag or not served of it.
    """
    try:
        return _Writer(special, json_options).grammar(read_tag(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(self, special: SpecialTokens, json_options: Mapping[str, Any]) -> None:
        self._special = special
        names = sorted(special.ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._json_options = dict(json_options)
        self._lines: list[str] = []

    def grammar(self, form: Format) -> str:
        start = self._compile(form, ()).body
        return "\n".join(("%llguidance {}", f"start: {start}", *self._lines, ""))

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """The string, in which special tokens are tokens; "" is nothing."""
        parts, at = [], 0
        for found in self._names.finditer(text):
            parts.append(_quoted(text[at : found.start()]))
            token_id, at = self._special.ids[found[0]], found.end()
            token = f"<[{token_id}]>"
            is_written = token_id in self._special.written
            parts.append(f"({token} | {_quoted(found[0])})" if is_written else token)
        parts.append(_quoted(text[at:]))
        return " ".join(part for part in parts if part)

    def _either(self, texts: Sequence[str]) -> str:
        return _alternatives([self._literal(text) for text in texts])

    def _text(
        self, excludes: Sequence[str], ends: Sequence[str], others: Sequence[str] = ()
    ) -> _Part:
        """Free text, with what ends it when something does; it has none of `others` either."""
        first = {end: self._first_token(end) for end in (*ends, *others)}
        tokens = [
            token_id
            for name, token_id in self._special.ids.items()
            if token_id in self._special.written.difference(first.values())
            and not any(one in name for one in excludes)
        ]
        text, some = self._free(excludes)
        # Text is not repeated: two pieces of it could be what is excluded.
        free = f"({some}? <[{','.join(map(str, sorted(tokens)))}]>)* " if tokens else ""
        if not ends:
            return _Part(self._rule(free + text))
        parts = []
        led = [self._literal(end) for end in ends if first[end] is not None]
        if led:
            parts.append(f"{self._rule(free + text)} {_alternatives(led)}")
        spelled = [end for end in ends if first[end] in {None, *self._special.written}]
        if spelled:
            stop = self._terminal(" | ".join(map(_quoted, spelled)))
            parts.append(free + self._rule(f"{text} {stop}", lazy=True))
        return _Part(_alternatives(parts), took_end=True)

    def _free(self, excludes: Sequence[str]) -> tuple[str, str]:
        """Text without the excluded strings, and the same but not empty."""
        if any(not one for one in excludes):
            raise ValueError("an empty string can't be excluded")
        if not excludes:
            return _TEXT, _SOME_TEXT
        listed = " | ".join(map(_quoted, excludes))
        inside = self._terminal(f"{_TEXT} ({listed}) {_TEXT}")
        return (
            self._terminal(f"{_TEXT} & ~{inside}"),
            self._terminal(f"{_SOME_TEXT} & ~{inside}"),
        )

    def _first_token(self, text: str) -> int | None:
        """The special token that a string begins with; None: it is text."""
        found = self._names.search(text)
        if found is None:
            return None
        if found.start():
            raise ValueError(f"{text!r} ends free text, so it can't have {found[0]} in its middle")
        return self._special.ids[found[0]]

    def _compile(self, form: Format, ends: Sequence[str]) -> _Part:
        if isinstance(form, ConstString):
            if not form.value:
                raise ValueError("a const_string is empty")
            return _Part(self._literal(form.value))
        if isinstance(form, JsonSchema):
            return _Part(self._schema(form))
        if isinstance(form, Ebnf):
            return _Part(_nested(form.grammar))
        if isinstance(form, Regex):
            return _Part(self._rule(_pattern(form.pattern)))
        if isinstance(form, AnyText):
            return self._text(form.excludes, ends)
        if isinstance(form, Tag):
            return self._tag(form, ends)
        if isinstance(form, TriggeredTags):
            return self._triggered(form, ends)
        if isinstance(form, TagsWithSeparator):
            return _Part(self._separated(form))
        if isinstance(form, Sequence_):
            return self._sequence(form.elements, ends)
        if isinstance(form, Or):
            return self._or(form.elements, ends)
        return _Part(self._repeated(form))

    def _schema(self, form: JsonSchema) -> str:
        if form.style != "json" or form.any_order:
            raise ValueError("a json_schema can have no style but json, and no any_order")
        if form.json_schema is False:
            raise ValueError("nothing matches the json_schema false")
        schema = dict(form.json_schema) if isinstance(form.json_schema, dict) else {}
        if self._json_options:
            own = schema.get("x-guidance")
            schema["x-guidance"] = {**(own if isinstance(own, dict) else {}), **self._json_options}
        return self._rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def _tag(self, form: Tag, outer: Sequence[str], *, begun: str = "") -> _Part:
        """`begun`: how much of its begin stands there already."""
        begin = self._literal(form.begin.removeprefix(begun))
        content = self._compile(form.content, form.ends or outer)
        body = " ".join(part for part in (begin, content.body) if part)
        if not form.ends:
            return _Part(body, content.took_end)
        return _Part(body if content.took_end else f"{body} {self._either(form.ends)}")

    def _triggered(self, form: TriggeredTags, ends: Sequence[str]) -> _Part:
        led: dict[str, list[str]] = {trigger: [] for trigger in form.triggers}
        for tag in form.tags:
            found = [t for t in led if t and tag.begin.startswith(t)]
            if len(found) != 1:
                raise ValueError(
                    f"the tag {tag.begin!r} must begin with one trigger, not with {len(found)}"
                )
            led[found[0]].append(self._tag(tag, (), begun=found[0]).body)
        for trigger, rests in led.items():
            if not rests:
                raise ValueError(f"no tag begins with the trigger {trigger!r}")
        if not led:
            raise ValueError("triggered_tags without triggers")
        bare = _alternatives(
            [f"{self._literal(t)} {_alternatives(rests)}" for t, rests in led.items()]
        )
        if form.at_least_one and form.stop_after_first:
            return _Part(self._rule(bare))
        after_text = _alternatives(
            [
                f"{self._text(form.excludes, (t,), form.triggers).body} {_alternatives(rests)}"
                for t, rests in led.items()
            ]
        )
        led_tag = self._rule(after_text)
        tail = self._text(form.excludes, ends, form.triggers)
        if form.stop_after_first:
            stop = f" {self._either(ends)}" if tail.took_end else ""
            return _Part(_alternatives([f"{led_tag}{stop}", tail.body]), tail.took_end)
        first = f"{self._rule(bare)} " if form.at_least_one else ""
        return _Part(f"{first}{led_tag}* {tail.body}", tail.took_end)

    def _separated(self, form: TagsWithSeparator) -> str:
        if not form.tags:
            raise ValueError("tags_with_separator without tags")
        one = self._rule(_alternatives([self._tag(tag, ()).body for tag in form.tags]))
        if form.stop_after_first:
            return one if form.at_least_one else f"{one}?"
        between = self._literal(form.separator)
        all_of_them = f"{one} ({between} {one})*" if between else f"{one}+"
        return f"({all_of_them})" if form.at_least_one else f"({all_of_them})?"

    def _sequence(self, elements: Sequence[Format], ends: Sequence[str]) -> _Part:
        if not elements:
            raise ValueError("a sequence has no elements")
        bodies: list[str] = []
        begun = ""
        for number, form in enumerate(elements):
            is_last = number == len(elements) - 1
            after = ends
            if not is_last:
                after = (_first_string(elements[number + 1]),) if is_endless(form) else ()
            part = self._element(form, after, begun)
            bodies.append(part.body)
            if is_last:
                return _Part(" ".join(body for body in bodies if body), part.took_end)
            begun = after[0] if part.took_end else ""
        raise AssertionError("unreachable")

    def _element(self, form: Format, ends: Sequence[str], begun: str) -> _Part:
        """An element whose first string `begun` has ended the free text before it ("": none)."""
        if not begun:
            return self._compile(form, ends)
        if isinstance(form, Tag):
            return self._tag(form, ends, begun=begun)
        return _Part("")  # a const_string

    def _or(self, elements: Sequence[Format], ends: Sequence[str]) -> _Part:
        if not elements:
            raise ValueError("an or has no elements")
        parts = [self._compile(form, ends) for form in elements]
        if not any(part.took_end for part in parts):
            return _Part(_alternatives([part.body for part in parts]))
        stop = self._either(ends)
        bodies = [part.body if part.took_end else f"{part.body} {stop}" for part in parts]
        return _Part(_alternatives(bodies), took_end=True)

    def _repeated(self, form: Optional_ | Plus | Star | Repeat) -> str:
        if is_endless(form.content):
            raise ValueError(_UNENDED)
        one = self._rule(self._compile(form.content, ()).body)
        if not isinstance(form, Repeat):
            return one + {Optional_: "?", Plus: "+", Star: "*"}[type(form)]
        if form.min < 0 or (form.max != -1 and form.max < max(1, form.min)):
            raise ValueError(f"nothing is repeated {form.min} to {form.max} times")
        return f"{one}{{{form.min},{'' if form.max == -1 else form.max}}}"


def _first_string(form: Format) -> str:
    """What a part that follows free text begins with; ValueError where that is not one string."""
    first = ""
    if isinstance(form, ConstString):
        first = form.value
    elif isinstance(form, Tag):
        first = form.begin
    if not first:
        raise ValueError(_UNENDED)
    return first


def _alternatives(bodies: Sequence[str]) -> str:
    return bodies[0] if len(bodies) == 1 else f"({' | '.join(bodies)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _pattern(pattern: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern)}/"


def _nested(grammar: str) -> str:
    from llguidance import grammar_from

    written = str(grammar_from("ebnf", grammar)).replace("%llguidance {}", "", 1)
    return f"%lark {{\n{written}\n}}"
