"""Numbers as people write them: token counts such as `1M`, bytes such as `4GiB`.

Flags, log lines and error messages use these; nothing else parses or prints a size. Suffixes
without an `i` are powers of 1000, with an `i` powers of 1024, as SGLang reads its token flags.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_PREFIXES = "kmgt"
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_count(text: str) -> int:
    """Read a whole number of things (tokens): `4096`, `128k`, `1.5M`, `1Mi`.

    Raises ValueError when the text is no number, is negative, or names a fraction of one thing.
    """
    return _parse(text, "", "a count such as 4096, 128k, 1M or 1Mi")


def parse_count_or_auto(text: str) -> int | None:
    """Read a count, or `auto` as None. Raises ValueError as `parse_count` does."""
    return None if text.strip().lower() == "auto" else parse_count(text)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: `1048576`, `512MB` (10^6), `4GiB` (2^30), `1.5G`.

    Raises ValueError when the text is no number, is negative, or names a fraction of one byte.
    """
    return _parse(text, "b", "a size such as 512MB, 4GiB or 1073741824")


def _parse(text: str, unit: str, expected: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    scale = _scale(match[2].lower(), unit) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not {expected}")
    value = Fraction(match[1].replace("_", "")) * scale
    if value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def _scale(suffix: str, unit: str) -> int | None:
    """The multiplier of a lower-case suffix, None when there is no such suffix."""
    prefix = suffix.removesuffix(unit) if unit else suffix
    if not prefix:
        return 1
    base = 1024 if prefix.endswith("i") else 1000
    letter = prefix.removesuffix("i")
    if len(letter) != 1 or letter not in _PREFIXES:
        return None
    return int(base ** (_PREFIXES.index(letter) + 1))


def format_bytes(num_bytes: int) -> str:
    """Show bytes in the largest binary unit that keeps the number at least 1: `32.0 MiB`."""
    size = float(num_bytes)
    for unit in _BINARY_UNITS[:-1]:
        if abs(size) < 1024:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_BINARY_UNITS[-1]}"
