"""A regular expression as an automaton that reads a text once, however the expression is made.

The patterns are clients', so nothing may go back in the text: with a backtracking engine a pattern
of ten characters keeps a process busy for hours. The syntax is that of Python's `re`, whose parser
is used; what needs going back (look-around, references to groups, atomic groups) is refused.
Called by stop_regex.py.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# Not in the documentation of `re`, but what `re.compile` itself is made of.
_parser: Any = import_module("re._parser")
_words: Any = import_module("re._constants")

MAX_PATTERN_CHARS = 1024
# Of one pattern, its repeats written out. A character costs at most one look at each.
MAX_NODES = 500

Test = Callable[[str], bool]


class Kind(enum.Enum):
    """What a node does."""

    MATCH = enum.auto()
    CHAR = enum.auto()  # takes one character that passes its test
    SPLIT = enum.auto()  # goes on with each of `targets`
    TEXT_START = enum.auto()
    LINE_START = enum.auto()
    BORDER = enum.auto()  # between a character of words and another one, or the text's ends
    NO_BORDER = enum.auto()


@dataclass(slots=True)
class Node:
    """One state. `test` is set for CHAR only; `known` is what it said of characters so far."""

    kind: Kind
    targets: tuple[int, ...] = ()
    test: Test | None = None
    known: dict[str, bool] = field(default_factory=dict)

    def takes(self, char: str) -> bool:
        """Whether a CHAR takes this character."""
        answer = self.known.get(char)
        if answer is None:
            assert self.test is not None
            answer = self.known[char] = self.test(char)
        return answer


@dataclass(frozen=True)
class Program:
    """Nodes, of which 0 is the match and `start` where a match begins."""

    nodes: tuple[Node, ...]
    start: int


def is_word(char: str) -> bool:
    """Whether `re` counts a character among those of words; "" (none) is not."""
    return char.isalnum() or char == "_"


def compile_program(pattern: str) -> Program:
    """Turn a pattern into its automaton.

    Raises ValueError with a sentence for the client: wrong syntax, something that is not served,
    too long, or a pattern that an empty text matches.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(
            f"it has {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are served"
        )
    try:
        tree = _parser.parse(pattern)
        builder = _Builder()
        start = builder.sequence(tree, 0, tree.state.flags)
    except (re.error, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    program = Program(tuple(builder.nodes), start)
    if _may_be_empty(program):
        raise ValueError("it matches an empty text")
    return program


def _may_be_empty(program: Program) -> bool:
    """Whether a match may need no character, whatever stands around it."""
    seen: set[int] = set()
    waiting = [program.start]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        node = program.nodes[at]
        if node.kind is Kind.MATCH:
            return True
        if node.kind is not Kind.CHAR:
            waiting.extend(node.targets)
    return False


class _Builder:
    """Writes nodes from a pattern's end to its beginning, so that each knows what follows it."""

    def __init__(self) -> None:
        self.nodes = [Node(Kind.MATCH)]

    def _add(self, kind: Kind, *targets: int, test: Test | None = None) -> int:
        if len(self.nodes) >= MAX_NODES:
            raise ValueError(f"with its repeats written out it has more than {MAX_NODES} parts")
        self.nodes.append(Node(kind, targets, test))
        return len(self.nodes) - 1

    def sequence(self, items: Any, after: int, flags: int) -> int:
        """The first node of `items`, of which `after` follows the last one."""
        for word, value in reversed(list(items)):
            after = self._item(word, value, after, flags)
        return after

    def _item(self, word: Any, value: Any, after: int, flags: int) -> int:
        if word in (_words.MAX_REPEAT, _words.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, after, flags)
        if word is _words.BRANCH:
            branches = [self.sequence(branch, after, flags) for branch in value[1]]
            return self._add(Kind.SPLIT, *branches)
        if word is _words.SUBPATTERN:
            _, added, removed, inner = value
            return self.sequence(inner, after, (flags | added) & ~removed)
        if word is _words.AT:
            return self._anchor(value, after, flags)
        test = _test_of(word, value, flags)
        if test is None:
            raise ValueError("look-around, references to groups and atomic groups are not served")
        return self._add(Kind.CHAR, after, test=test)

    def _repeat(self, least: int, most: int, inner: Any, after: int, flags: int) -> int:
        if most == _words.MAXREPEAT:
            loop = self._add(Kind.SPLIT)
            body = self.sequence(inner, loop, flags)
            self.nodes[loop].targets = (body, after)
            after = loop
        else:
            end = after
            for _ in range(most - least):
                after = self._add(Kind.SPLIT, self.sequence(inner, after, flags), end)
        for _ in range(least):
            before = len(self.nodes)
            after = self.sequence(inner, after, flags)
            if len(self.nodes) == before:  # an empty group: so are all its repeats
                break
        return after

    def _anchor(self, word: Any, after: int, flags: int) -> int:
        if word in (_words.AT_END, _words.AT_END_STRING):
            # The text so far always ends here, so this says nothing at a match's end.
            if after != 0:
                raise ValueError("$ and \\Z are served at a pattern's end only")
            return after
        if word is _words.AT_BEGINNING and flags & re.MULTILINE:
            return self._add(Kind.LINE_START, after)
        kinds = {
            _words.AT_BEGINNING: Kind.TEXT_START,
            _words.AT_BEGINNING_STRING: Kind.TEXT_START,
            _words.AT_BOUNDARY: Kind.BORDER,
            _words.AT_NON_BOUNDARY: Kind.NO_BORDER,
        }
        return self._add(kinds[word], after)


def _test_of(word: Any, value: Any, flags: int) -> Test | None:
    """The test of what takes one character; None for what does not."""
    if word is _words.ANY:
        return bool if flags & re.DOTALL else (lambda char: char != "\n")
    if word is _words.IN:
        parts = list(value)
        negated = parts[0][0] is _words.NEGATE
        tests = [_class_test(kind, part, flags) for kind, part in parts[negated:]]
        wanted = _any_case(lambda char: any(test(char) for test in tests), flags)
        return (lambda char: not wanted(char)) if negated else wanted
    if word in (_words.LITERAL, _words.NOT_LITERAL):
        literal = _any_case(_class_test(_words.LITERAL, value, flags), flags)
        return (lambda char: not literal(char)) if word is _words.NOT_LITERAL else literal
    return None


def _any_case(test: Test, flags: int) -> Test:
    if not flags & re.IGNORECASE:
        return test
    return lambda char: test(char) or test(char.lower()) or test(char.upper())


def _class_test(word: Any, value: Any, flags: int) -> Test:
    """The test of one part of a character class."""
    if word is _words.LITERAL:
        literal = chr(value)
        return lambda char: char == literal
    if word is _words.RANGE:
        low, high = map(chr, value)
        # Upper and lower case of some characters are several.
        return lambda char: len(char) == 1 and low <= char <= high
    name = value.name.removeprefix("CATEGORY_")
    tests: dict[str, Test] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": is_word}
    test = tests[name.removeprefix("NOT_")]
    if flags & re.ASCII:
        inner = test
        test = lambda char: char.isascii() and inner(char)  # noqa: E731
    return (lambda char: not test(char)) if name.startswith("NOT_") else test
