"""The shapes that are checked and measured: full lists for a GPU, tiny ones for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Heads of one rank's layer."""

    name: str
    num_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionShape:
    """One comparison with float64: lengths are (prefix, extend) of each request."""

    name: str
    heads: Heads
    lengths: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    page_size: int = 64
    window: int | None = None
    chunk: int | None = None
    logit_cap: float = 0.0
    sinks: bool = False
    scattered: bool = True


@dataclass(frozen=True)
class DecodeShape:
    """One decode step to be timed: `batch` requests of `context` tokens."""

    batch: int
    context: int


@dataclass(frozen=True)
class CodesShape:
    """`rows` times a quantised weight [outputs, inputs]; layouts are those of quantized.py."""

    layout: str
    rows: int
    outputs: int
    inputs: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        size = f"{self.rows} x {self.outputs} x {self.inputs}"
        return f"{self.layout} {size} {self.dtype}"


@dataclass(frozen=True)
class ExpertsShape:
    """`rows` through `chosen` of quantised experts."""

    layout: str
    rows: int
    experts: int
    chosen: int
    hidden: int
    width: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        size = f"{self.rows} x {self.chosen} of {self.experts} x {self.hidden} x {self.width}"
        return f"{self.layout} {size} {self.dtype}"


SCOUT_RANK = Heads("scout-tp8", 5, 1, 128)
LLAMA_8B = Heads("llama-8b", 32, 8, 128)
SMALL = Heads("small", 9, 3, 64)
WIDE = Heads("wide", 8, 4, 256)
GPT_OSS = Heads("gpt-oss", 64, 8, 64)
TINY = Heads("tiny", 4, 2, 32)
# Of the models that other stages make: the server's, bench_one_batch's and the needles'.
SERVER = Heads("server", 4, 2, 64)
BENCH = Heads("bench", 32, 8, 64)
CIRCUIT = Heads("circuit", 1, 1, 128)

DECODES = ((4096, 1), (1, 1), (65, 1), (20000, 1))
PROMPTS = ((0, 700), (1000, 130), (63, 2), (5000, 1))


def kernel_shapes(dry: bool) -> Sequence[AttentionShape]:
    """Every head, type, sight and page size that a model of ours has."""
    if dry:
        few = ((40, 1), (0, 1))
        return (
            AttentionShape("decode", TINY, few, "float32", 16),
            AttentionShape("prompt", TINY, ((0, 20), (30, 7)), "float32", 16, window=9),
            AttentionShape("chunk", TINY, few, "bfloat16", 4, chunk=8, sinks=True),
        )
    shapes = []
    for heads in (LLAMA_8B, SCOUT_RANK, SMALL, WIDE, GPT_OSS):
        for name, lengths in (("decode", DECODES), ("prompt", PROMPTS)):
            shapes.append(AttentionShape(name, heads, lengths))
    for dtype in ("float32", "float16", "fp8_e4m3", "fp8_e5m2"):
        shapes.append(AttentionShape("decode", LLAMA_8B, DECODES, dtype))
        shapes.append(AttentionShape("prompt", LLAMA_8B, PROMPTS, dtype))
    for page_size in (1, 16):
        shapes.append(AttentionShape("decode", LLAMA_8B, DECODES, page_size=page_size))
        shapes.append(AttentionShape("prompt", LLAMA_8B, PROMPTS, page_size=page_size))
    for lengths in (DECODES, PROMPTS):
        shapes.append(AttentionShape("sliding", GPT_OSS, lengths, window=128, sinks=True))
        shapes.append(AttentionShape("chunked", SCOUT_RANK, lengths, chunk=8192))
        shapes.append(AttentionShape("capped", WIDE, lengths, logit_cap=50.0))
        shapes.append(AttentionShape("contiguous", LLAMA_8B, lengths, scattered=False))
    shapes.append(AttentionShape("long", SCOUT_RANK, ((1_000_000, 1), (300_000, 64))))
    return tuple(shapes)


def compiled_shapes(dry: bool) -> Sequence[AttentionShape]:
    """What is compiled before anything is checked, what takes longest first.

    The shapes of stage 1, without those whose kernels another one has, and of the other stages'
    models.
    """
    if dry:
        return kernel_shapes(True)[:1]
    shapes = [one for one in kernel_shapes(False) if one.name not in ("long", "contiguous")]
    for lengths in (DECODES, PROMPTS):
        shapes.append(AttentionShape("server", SERVER, lengths, "float32"))
        shapes.append(AttentionShape("bench", BENCH, lengths))
        shapes.append(AttentionShape("circuit", CIRCUIT, lengths))
        shapes.append(AttentionShape("circuit", CIRCUIT, lengths, chunk=8192))
    return sorted(shapes, key=lambda one: (one.dtype != "float32", one.lengths == DECODES))


def checked_codes(dry: bool) -> Sequence[CodesShape]:
    """Every layout and type, single rows and every height of a tile; widths that fill none."""
    if dry:
        few = (("MXFP4", 1), ("FP8 in 128", 1), ("FP8 in 128 rounding inputs", 33))
        some = tuple(CodesShape(layout, rows, 35, 160) for layout, rows in few)
        return (*some, CodesShape("8 bits", 20, 35, 96, "float32"))
    layouts = ("4 bits", "4 bits with minima", "MXFP4", "4 bits by table", "8 bits", "8 bits in 16")
    shapes = [CodesShape(layout, rows, 1037, 2880) for layout in layouts for rows in (1, 3, 300)]
    shapes += [CodesShape("MXFP4", rows, 1037, 2880) for rows in (30, 60)]
    for layout in ("FP8", "FP8 in 128"):
        shapes += [CodesShape(layout, rows, 1037, 2880) for rows in (1, 3, 60, 300)]
        shapes += [CodesShape(f"{layout} rounding inputs", rows, 1037, 2880) for rows in (60, 300)]
    shapes += [CodesShape("MXFP4", rows, 1037, 2880, "float16") for rows in (3, 300)]
    return (*shapes, CodesShape("8 bits", 3, 1037, 2880, "float32"))


def checked_experts(dry: bool) -> Sequence[ExpertsShape]:
    """Pairs that are not sorted, few rows of each expert, and many."""
    if dry:
        return (ExpertsShape("MXFP4", 3, 4, 2, 64, 32),)
    calls = [("MXFP4", rows) for rows in (1, 3, 700)] + [("FP8 in 128", rows) for rows in (1, 700)]
    calls.append(("FP8 in 128 rounding inputs", 700))
    return tuple(ExpertsShape(layout, rows, 16, 4, 2880, 1440) for layout, rows in calls)


def timed_codes(dry: bool) -> Sequence[CodesShape]:
    """A decode step's products: a square one of a layer, and a wide one."""
    if dry:
        return (CodesShape("MXFP4", 1, 64, 96),)
    sides = ((4096, 4096), (28672, 8192))
    return tuple(
        CodesShape(layout, rows, *side)
        for layout in ("4 bits with minima", "MXFP4", "8 bits", "FP8 in 128")
        for side in sides
        for rows in (1, 16)
    )


def timed_experts(dry: bool) -> Sequence[ExpertsShape]:
    """Steps of gpt-oss-120b."""
    if dry:
        return (ExpertsShape("MXFP4", 1, 4, 2, 64, 32),)
    return tuple(ExpertsShape("MXFP4", rows, 128, 4, 2880, 2880) for rows in (1, 8, 64))


def decode_shapes(dry: bool) -> Sequence[DecodeShape]:
    """One very long request, some long ones, many short ones."""
    if dry:
        return (DecodeShape(1, 64), DecodeShape(3, 20))
    return (DecodeShape(1, 10_000_000), DecodeShape(8, 131_072), DecodeShape(256, 2048))


def extend_shapes(dry: bool) -> Sequence[tuple[int, int]]:
    """(prefix, extend) of a prompt's chunk: the last one of 32k and of 1M tokens."""
    if dry:
        return ((16, 8),)
    return ((32_768 - 8192, 8192), (1_048_576 - 8192, 8192))


def handle_sizes(dry: bool, granule: int) -> Sequence[int]:
    """Bytes of the driver's handles whose latency is measured."""
    if dry:
        return (granule, 2 * granule)
    return tuple(size << 20 for size in (2, 16, 64, 256))
