"""Human-readable counts and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.utils.sizes import format_bytes, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1_000", 1000),
        ("128k", 128_000),
        ("128K", 128_000),
        ("25.6k", 25_600),
        ("1M", 1_000_000),
        ("1.5m", 1_500_000),
        ("10M", 10_000_000),
        ("1Ki", 1024),
        ("1Mi", 1 << 20),
        (" 2 G ", 2_000_000_000),
    ],
)
def test_counts_use_powers_of_1000_unless_marked_with_i(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1024", 1024),
        ("17B", 17),
        ("512MB", 512_000_000),
        ("512M", 512_000_000),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("4Gi", 4 << 30),
        ("1.5GiB", 3 << 29),
        ("2TB", 2 * 10**12),
    ],
)
def test_bytes_take_units(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1e6", "1.2", "0.0001k", "1KB", "1x", "1 2", "1i", "1..5k", "nan", "١"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "B", "-4GiB", "4GiBs", "0.3B", "inf", "4EB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (32 << 20, "32.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 1 << 60))
def test_plain_numbers_are_themselves(number: int) -> None:
    assert parse_count(str(number)) == number
    assert parse_bytes(str(number)) == number
