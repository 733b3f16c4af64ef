"""The attention kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import ALL, BUSY, IDLE, LARGE, SMALL, Case, Chip, Sight, Tile
from sgl_kernel.library import KernelError
from sgl_kernel.triton import default_tiles, launch
from sgl_kernel.triton.attention import launch_sizes
from srt.crossed import crossed

ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def name_of(value: object) -> str | None:
    return {BUSY: "whole", IDLE: "split"}.get(value) if isinstance(value, Chip) else None


def check(case: Case, sight: Sight = ALL, *, chip: Chip = BUSY, **changes: object) -> None:
    lse = torch.full(case.q.shape[:2], float("nan"))
    named = {k: v for k, v in changes.items() if k in ("logit_cap", "sinks", "v_scale")}
    out = case.run(sight, chip=chip, lse=lse, **changes)  # type: ignore[arg-type]
    expected, expected_lse = case.reference(sight, **named)  # type: ignore[arg-type]
    atol = ATOL[case.q.dtype]
    unit = float(named.get("v_scale", 1.0))  # type: ignore[arg-type]
    torch.testing.assert_close(out.double() / unit, expected / unit, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=max(1e-5, atol))


@pytest.mark.parametrize(("page_size", "chip"), crossed([16, 1, 64], [IDLE, BUSY]), ids=name_of)
def test_single_queries(page_size: int, chip: Chip) -> None:
    """Pages smaller and larger than a block of keys, and lengths around their borders."""
    check(Case([(0, 1), (15, 1), (64, 1), (130, 1)], page_size=page_size), chip=chip)


@pytest.mark.parametrize(("page_size", "chip"), crossed([16, 1, 64], [IDLE, BUSY]), ids=name_of)
def test_prompts(page_size: int, chip: Chip) -> None:
    """Chunks behind prefixes, beside single queries.

    A tile of 32 rows holds 10 queries: both prompts end in a second tile, the longer one passes a
    border of every page size, and its first tile does not see the last of its parts.
    """
    check(Case([(0, 13), (55, 11), (7, 1), (16, 2)], page_size=page_size), chip=chip)


@pytest.mark.parametrize(
    ("shape", "memory"),
    crossed(
        [
            (8, (48, 32), torch.float32),  # one program
            (6, (40, 24), torch.float32),  # three, of two heads each; nothing is a power of two
            (32, (40, 32), torch.bfloat16),  # two, of sixteen
            (4, (20, 16), torch.float8_e4m3fn),
        ],
        [(None, BUSY), (2, IDLE), (None, IDLE), (2, BUSY)],
    ),
)
def test_values_within_keys(
    shape: tuple[int, tuple[int, int], torch.dtype], memory: tuple[int | None, Chip]
) -> None:
    """Latent attention: all query heads read one row, whose first numbers are values."""
    (heads, widths, dtype), (segment_pages, chip) = shape, memory
    case = Case(
        [(0, 13), (55, 3), (7, 1)],
        (heads, 1),
        (widths[0], widths[0]),
        dtype,
        value_dim=widths[1],
        segment_pages=segment_pages,
    )
    check(case, chip=chip)


def test_values_that_are_not_within_keys() -> None:
    lengths = [(0, 3)]
    for case in (
        Case(lengths, (4, 1), (32, 32), value_dim=32),
        Case(lengths, (4, 2), (32, 32), value_dim=16),
    ):
        with pytest.raises(KernelError, match="are no values within one head's keys of 32"):
            case.run()
    case = Case(lengths, (4, 1), (32, 32), value_dim=16)
    case.planes[1] = case.planes[1].clone()
    with pytest.raises(KernelError, match="16 are no values"):
        case.run()


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((4, 1), (64, 64)),
        ((3, 1), (80, 80)),
        ((5, 1), (96, 128)),
        ((2, 2), (128, 96)),
        ((1, 1), (256, 256)),
        ((16, 1), (16, 24)),
    ],
)
def test_heads_of_any_width(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    extend = min(14, LARGE.rows // (heads[0] // heads[1]) + 1)  # more than a tile, where it can
    for dtype in (torch.float32, torch.bfloat16):
        check(Case([(40, 1), (9, extend)], heads=heads, dims=dims, dtype=dtype), chip=IDLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_dtype", [None, torch.float32])
def test_narrow_numbers(dtype: torch.dtype, q_dtype: torch.dtype | None) -> None:
    """Scores are products of what the cache holds; wider queries are rounded to it."""
    case = Case([(70, 1), (20, 11)], dtype=dtype, q_dtype=q_dtype)
    case.q = case.q.to(dtype).to(case.q.dtype)
    out = case.run(chip=IDLE)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.double(), case.reference()[0], rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize(
    ("dtype", "other"),
    crossed(
        [torch.float8_e4m3fn, torch.float8_e5m2],
        [
            (torch.float32, None),
            (torch.bfloat16, 2),
            (torch.bfloat16, None),
            (torch.float32, 2),
        ],
        each=2,
    ),
)
def test_fp8(dtype: torch.dtype, other: tuple[torch.dtype, int | None]) -> None:
    q_dtype, segment_pages = other
    case = Case([(70, 1), (20, 11)], dtype=dtype, q_dtype=q_dtype, segment_pages=segment_pages)
    check(case, chip=IDLE)


@pytest.mark.parametrize(("segment_pages", "chip"), crossed([None, 2], [IDLE, BUSY]), ids=name_of)
def test_scales_of_values(segment_pages: int | None, chip: Chip) -> None:
    """Results times a number, whoever writes them; log-sum-exps and sinks are not touched."""
    sinks = torch.linspace(-2.0, 6.0, 6)
    for q_dtype, changes in (
        (torch.float32, {"v_scale": 0.03}),
        (torch.float32, {"v_scale": 700.0, "sinks": sinks}),
        (torch.bfloat16, {"v_scale": 700.0, "sinks": sinks}),
    ):
        case = Case(
            [(70, 1), (20, 11)],
            dtype=torch.float8_e4m3fn,
            q_dtype=q_dtype,
            segment_pages=segment_pages,
        )
        check(case, chip=chip, **changes)


@pytest.mark.parametrize(("span", "chip"), crossed([7, 1, 16, 40], [IDLE, BUSY]), ids=name_of)
def test_windows_and_chunks(span: int, chip: Chip) -> None:
    """Tiles that lie across a border of chunks, windows shorter and longer than a block.

    Queries 28 to 37 and 38 to 42 are a tile each: the borders at 32 and 40 lie inside them.
    """
    for sight in (Sight(window=span), Sight(chunk=span)):
        check(Case([(60, 1), (28, 15), (0, 9)]), sight, chip=chip)


def test_what_a_window_passed_is_not_read() -> None:
    """Dropped heads: the table begins at a position above 0, at any place within a block."""
    for page_size, dropped in ((4, [5, 3]), (16, [2, 1]), (64, [1, 1])):
        lengths = [(page_size * dropped[0] + 12, 1), (page_size * dropped[1] + 30, 11)]
        case = Case(lengths, page_size=page_size, dropped=dropped)
        check(case, Sight(window=11), chip=IDLE)


@pytest.mark.parametrize("chip", [BUSY, IDLE], ids=["whole", "split"])
def test_caps_and_sinks(chip: Chip) -> None:
    sinks = torch.linspace(-2.0, 6.0, 6)
    lengths = [(60, 1), (25, 11)]
    check(Case(lengths), chip=chip, sinks=sinks)
    check(Case(lengths), chip=chip, logit_cap=2.0)
    check(Case(lengths), Sight(window=9), chip=chip, logit_cap=2.0, sinks=sinks.bfloat16().float())


@pytest.mark.parametrize(("page_size", "segment_pages"), crossed([16, 1, 32], [1, 3]))
def test_segments_at_unrelated_addresses(page_size: int, segment_pages: int) -> None:
    case = Case([(70, 1), (20, 11), (0, 5)], page_size=page_size, segment_pages=segment_pages)
    check(case, chip=IDLE)
    check(case, Sight(window=20))


def test_tiles_as_they_are_used() -> None:
    small, large = default_tiles(64, 64, 3, torch.bfloat16)
    assert (small, large) == (Tile(16, 64), Tile(128, 64))
    check(
        Case(
            [(300, 1), (100, 90)], heads=(3, 1), dims=(64, 64), dtype=torch.bfloat16, page_size=64
        ),
        small=small,
        large=large,
    )


@pytest.mark.parametrize(
    ("width", "dtype"), [(128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)]
)
def test_tiles_fit_shared_memory(width: int, dtype: torch.dtype) -> None:
    """Q, a block of K and V, another on its way, and nothing else, in 227 KiB."""
    for tile in default_tiles(width, width, 8, dtype):
        sizes = launch_sizes(tile, width, dtype, segmented=False)
        blocks = (sizes["num_stages"] - 1) // 2
        assert blocks == 2
        assert (tile.rows + 2 * blocks * tile.keys) * width * dtype.itemsize <= 227 << 10


def test_the_bound_of_one_sum_holds_on_a_busy_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_kernel.triton.work.MAX_PART_KEYS", 32)
    case = Case([(100, 1), (90, 7)])
    check(case)


def test_what_is_not_served_is_refused() -> None:
    case = Case([(20, 1)])
    case.planes[0] = case.planes[0].bfloat16()
    with pytest.raises(KernelError, match="different kinds"):
        case.run()
    case = Case([(20, 1)])
    case.q = case.q.to(torch.float64)
    with pytest.raises(KernelError, match="float64"):
        case.run()
    with pytest.raises(KernelError, match="keep no order"):
        Case([(20, 1)]).run(scale=-0.125)


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        Case([(20, 1)]).run(small=SMALL, large=LARGE)


def test_the_package_does_without_the_native_library(tmp_path: Path) -> None:
    source = Path(launch.__file__).parents[1]
    for file in (*source.glob("*.py"), *source.glob("triton/**/*.py")):
        target = tmp_path / "sgl_kernel" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sgl_kernel.triton as t\n"
    code += "print(t.__file__, callable(t.paged_attention))"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(tmp_path / "sgl_kernel/triton/__init__.py"), "True"]
