"""What one command-line flag is: the form that the parser, --help and the documents share.

`ServerArgs` describes its fields with `flag`, configs/flag_tables.py lists SGLang's other flags
with the same `FlagSpec`; server_args.py turns both into a parser. Nothing here reads a value.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_METADATA_KEY = "flag"


class FlagKind(enum.Enum):
    """What happens to a flag: it works, it is accepted with a warning, or it is refused."""

    WORKS = "works"
    ACCEPTED = "accepted without effect"
    REFUSED = "refused"


class Arity(enum.Enum):
    """How many values follow the flag; the values are argparse's `nargs` (SWITCH: none)."""

    SWITCH = "switch"
    ONE = "one"
    OPTIONAL = "?"
    MANY = "*"


@dataclass(frozen=True)
class FlagSpec:
    """One flag.

    `help` is one sentence: what it does, or why it is accepted or refused. `parse` turns the
    text into a value and raises ValueError. `choices` () means any value. `default_text` is
    shown instead of `default`. `minimum` and `maximum` bound a number, `above` and `below` do
    so strictly (None: no bound), and `also` are values allowed outside the bounds. `noops` are
    values of a refused flag that ask for nothing but what is the case anyway, so they pass.
    """

    name: str
    help: str
    kind: FlagKind = FlagKind.WORKS
    group: str = ""
    aliases: tuple[str, ...] = ()
    arity: Arity = Arity.ONE
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    default: Any = None
    default_text: str | None = None
    metavar: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    noops: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """The Python name: `--model-path` is `model_path`."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def names(self) -> tuple[str, ...]:
        """The flag and its aliases, in the order in which help shows them."""
        return (self.name, *self.aliases)

    def check(self, value: Any) -> None:
        """Raise ValueError when a parsed value is outside the choices or bounds; None passes."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            allowed = ", ".join(self.choices)
            raise ValueError(f"{self.name} must be one of {allowed}; got {value!r}")
        for bound, words, holds in (
            (self.minimum, "at least", operator.ge),
            (self.maximum, "at most", operator.le),
            (self.above, "above", operator.gt),
            (self.below, "below", operator.lt),
        ):
            if bound is not None and not holds(value, bound) and value not in self.also:
                exceptions = "".join(f" (or {allowed:g})" for allowed in self.also)
                raise ValueError(f"{self.name} must be {words} {bound:g}{exceptions}, got {value}")

    @property
    def shown_default(self) -> str:
        """The default as help and the documents print it."""
        if self.default_text is not None:
            return self.default_text
        if self.arity is Arity.SWITCH:
            return "off"
        return "none" if self.default is None else str(self.default)


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    arity: Arity | None = None,
    aliases: tuple[str, ...] = (),
    parse: Callable[[str], Any] = str,
    choices: tuple[str, ...] = (),
    default_text: str | None = None,
    metavar: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: tuple[float, ...] = (),
) -> Any:
    """Declare a dataclass field that is also a command-line flag of the same name.

    `default` `dataclasses.MISSING` makes the flag required. `arity` None: a bool default
    makes it a switch, any other takes one value; with several the field is a tuple.
    """
    spec = FlagSpec(
        name="",
        help=help,
        group=group,
        aliases=aliases,
        arity=arity or (Arity.SWITCH if isinstance(default, bool) else Arity.ONE),
        parse=parse,
        choices=choices,
        default=None if default is dataclasses.MISSING else default,
        default_text="required" if default is dataclasses.MISSING else default_text,
        metavar=metavar,
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        also=also,
    )
    return dataclasses.field(default=default, metadata={_METADATA_KEY: spec})


def derived() -> Any:
    """Declare a dataclass field that is no flag: filled in from the flags, kept by `replace`."""
    return dataclasses.field(default=None)


def specs_of(cls: type) -> tuple[FlagSpec, ...]:
    """The flags that a dataclass declares with `flag`, in the order of its fields."""
    return tuple(
        dataclasses.replace(field.metadata[_METADATA_KEY], name="--" + field.name.replace("_", "-"))
        for field in dataclasses.fields(cls)
        if _METADATA_KEY in field.metadata
    )
