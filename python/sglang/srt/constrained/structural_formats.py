"""The formats of a structural tag, as a client writes them in JSON.

They are a tree, by xgrammar's public documentation of `structural_tag`; the older form,
`structures` with `triggers`, is one of them. `structural_tag.py` makes a grammar of it. Pure.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec


class ConstString(msgspec.Struct, frozen=True, tag="const_string", forbid_unknown_fields=True):
    """Exactly `value`."""

    value: str


class JsonSchema(msgspec.Struct, frozen=True, tag="json_schema", forbid_unknown_fields=True):
    """JSON of a schema; other styles and `any_order` are refused."""

    json_schema: dict[str, Any] | bool
    style: str = "json"
    any_order: bool = False


class Ebnf(msgspec.Struct, frozen=True, tag="grammar", forbid_unknown_fields=True):
    """What a grammar in EBNF allows."""

    grammar: str


class Regex(msgspec.Struct, frozen=True, tag="regex", forbid_unknown_fields=True):
    """What a regular expression matches."""

    pattern: str


class AnyText(msgspec.Struct, frozen=True, tag="any_text", forbid_unknown_fields=True):
    """Anything without one of `excludes`, up to what ends it."""

    excludes: list[str] = []


class Sequence_(msgspec.Struct, frozen=True, tag="sequence", forbid_unknown_fields=True):
    """One after the other."""

    elements: list[Format]


class Or(msgspec.Struct, frozen=True, tag="or", forbid_unknown_fields=True):
    """One of them."""

    elements: list[Format]


class Optional_(msgspec.Struct, frozen=True, tag="optional", forbid_unknown_fields=True):
    """Once or not at all."""

    content: Format


class Plus(msgspec.Struct, frozen=True, tag="plus", forbid_unknown_fields=True):
    """Once or more often."""

    content: Format


class Star(msgspec.Struct, frozen=True, tag="star", forbid_unknown_fields=True):
    """Any number of times."""

    content: Format


class Repeat(msgspec.Struct, frozen=True, tag="repeat", forbid_unknown_fields=True):
    """From `min` to `max` times; `max` -1: without a limit."""

    min: int
    max: int
    content: Format


class Tag(msgspec.Struct, frozen=True, tag="tag", forbid_unknown_fields=True):
    """`begin`, the content, and one of `end`; an empty end is none."""

    begin: str
    content: Format
    end: str | list[str]

    @property
    def ends(self) -> tuple[str, ...]:
        """The ends that are not empty."""
        return tuple(e for e in ([self.end] if isinstance(self.end, str) else self.end) if e)


class TriggeredTags(msgspec.Struct, frozen=True, tag="triggered_tags", forbid_unknown_fields=True):
    """Free text in which a trigger begins one of the tags that begin with it."""

    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: list[str] = []


class TagsWithSeparator(
    msgspec.Struct, frozen=True, tag="tags_with_separator", forbid_unknown_fields=True
):
    """Tags with `separator` between them and nothing else."""

    tags: list[Tag]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = Union[
    ConstString, JsonSchema, Ebnf, Regex, AnyText, Sequence_, Or, Optional_, Plus, Star, Repeat,
    Tag, TriggeredTags, TagsWithSeparator,
]  # fmt: skip


class Structure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tag of the older form: JSON of `schema` between `begin` and `end`."""

    begin: str
    schema: dict[str, Any] | bool
    end: str


class StructuralTag(msgspec.Struct, frozen=True):
    """`format`, or `structures` with `triggers`."""

    type: str = "structural_tag"
    format: Format | None = None
    structures: list[Structure] = []
    triggers: list[str] = []


def read_tag(text: str) -> Format:
    """The format of a structural tag in JSON; ValueError, one line, says what is wrong with it."""
    try:
        return _whole(msgspec.json.decode(text, type=StructuralTag))
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None


def _whole(tag: StructuralTag) -> Format:
    if tag.type != "structural_tag":
        raise ValueError(f"its type is {tag.type!r}")
    if tag.format is not None:
        return tag.format
    if not tag.structures:
        raise ValueError("it has neither a format nor structures")
    tags = [Tag(one.begin, JsonSchema(one.schema), one.end) for one in tag.structures]
    return TriggeredTags(tag.triggers, tags)


def is_endless(form: Format) -> bool:
    """Whether it goes on until something else ends it."""
    if isinstance(form, AnyText):
        return True
    if isinstance(form, TriggeredTags):
        return not form.stop_after_first or not form.at_least_one
    if isinstance(form, Sequence_):
        return bool(form.elements) and is_endless(form.elements[-1])
    if isinstance(form, Tag):
        return not form.ends and is_endless(form.content)
    return isinstance(form, Or) and any(is_endless(one) for one in form.elements)
