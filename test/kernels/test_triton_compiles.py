"""The kernels compiled for an H100: whether it does, and into what. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 227 << 10  # of an H100's multiprocessor that one block may have


def compile_all(cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_triton.py")
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-W", "error", script, json.dumps(cases)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
UNEVEN = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
LATENT: dict[str, Any] = {"dim": 576, "v_dim": 512, "latent": True, "keys": 32}
VALUES = [1.0, 2.0, 0.03, 16.0, 700.0]
CODES: dict[str, Any] = {"kernel": "quantized", "values": E2M1}
EVERYDAY: dict[str, dict[str, Any]] = {
    "decode": {"rows": 16, "segmented": True},
    "prompts": {"rows": 128},
    "merge": {"kernel": "merge"},
    "latent decode": {**LATENT, "rows": 16},
    "bytes": {"rows": 16, "kv": "float8_e4m3fn"},
    "single rows of codes": {**CODES, "name": "rows", "rows": 16},
    "codes": CODES,
    "tall codes": {**CODES, "rows": 128, "splits": 1},
    "codes of experts": {**CODES, "name": "grouped"},
    "count attention": {"kernel": "count", "name": "attention", "values": VALUES},
    "count merge": {"kernel": "count", "name": "merge", "values": VALUES},
    # The products of experts serve every number of tokens.
    "count grouped": {"kernel": "count", "name": "grouped", "values": [1, 8, 16, 17, 4096]},
    # And so do those of codes, whatever a table's words are.
    **{
        f"count {name}": {"kernel": "count", "name": name, "values": [1, 8, 0, -129, 0x7F000010]}
        for name in ("quantized", "grouped quantized")
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each of EVERYDAY, all of them compiled in one process."""
    found = compile_all(list(EVERYDAY.values()), tmp_path_factory.mktemp("cache"))
    return dict(zip(EVERYDAY, found, strict=True))


def test_decode_and_prompts(made: dict[str, dict[str, Any]]) -> None:
    """K and V come 16 bytes at a time beside the arithmetic, and tensor cores multiply."""
    decode, prompts, merge = (made[name] for name in ("decode", "prompts", "merge"))
    for one in (decode, prompts, merge):
        assert one["shared_bytes"] <= SHARED_BYTES
        assert one["stack_bytes"] == 0
    assert decode["instructions"]["cp.async.cg.shared.global"] >= 48
    assert decode["instructions"]["mma.sync"]
    assert prompts["instructions"]["cp.async.cg.shared.global"] >= 24
    assert prompts["instructions"]["wgmma.mma_async"]
    # Fetches that a block may leave open: a page's id (and addresses), K and V of the next one.
    assert max(decode["on_their_way"]) >= 5
    assert max(prompts["on_their_way"]) >= 3


def test_rows_of_latent_attention(made: dict[str, dict[str, Any]]) -> None:
    """Rows of 512 + 64 numbers: they fit."""
    decode = made["latent decode"]
    assert decode["shared_bytes"] <= SHARED_BYTES
    assert decode["instructions"]["cp.async.cg.shared.global"] >= 64
    assert decode["stack_bytes"] == 0
    assert decode["instructions"]["mma.sync"]


@pytest.mark.slow
def test_prompts_of_latent_attention(tmp_path: Path) -> None:
    """What doesn't fit registers is a few numbers."""
    (prompts,) = compile_all([{**LATENT, "rows": 64}], tmp_path)
    assert prompts["shared_bytes"] <= SHARED_BYTES
    assert prompts["instructions"]["cp.async.cg.shared.global"] >= 64
    assert prompts["stack_bytes"] <= 256
    assert prompts["instructions"]["wgmma.mma_async"]


def test_what_differs_from_call_to_call_is_no_part_of_what_is_compiled(
    made: dict[str, dict[str, Any]],
) -> None:
    """Layers have scales of their own: one kernel serves them all."""
    counts = [one["kernels"] for name, one in made.items() if name.startswith("count ")]
    assert counts == [1] * 5


def test_bytes_are_widened_in_pairs(made: dict[str, dict[str, Any]]) -> None:
    """From float16 to bfloat16 there is an instruction for one number only, of a slower unit."""
    kinds = made["bytes"]["instructions"]
    assert kinds["cvt.rn.bf16x2.f32"] >= 64
    assert "cvt.bf16.f16" not in kinds
    assert "cvt.rn.bf16.f16" not in kinds


def test_quantised_products(made: dict[str, dict[str, Any]]) -> None:
    """Codes come 16 bytes at a time beside the arithmetic, and become numbers in registers."""
    single = made["single rows of codes"]
    assert single["stack_bytes"] == 0
    assert single["instructions"]["cp.async.cg.shared.global"] >= 8
    assert max(single["on_their_way"]) >= 6
    for one in (made["codes"], made["tall codes"], made["codes of experts"]):
        assert one["shared_bytes"] <= SHARED_BYTES
        assert one["stack_bytes"] == 0
        kinds = one["instructions"]
        assert kinds["wgmma.mma_async"] >= 4
        assert kinds["cp.async.cg.shared.global"] >= 12
        assert max(one["on_their_way"]) >= 3


def test_products_of_fp8(tmp_path: Path) -> None:
    """With bfloat16 rows on a GPU without FP8, and with rows of it where tensor cores have some."""
    fp8: dict[str, Any] = {"kernel": "quantized", "fp8": True, "group": 128, "rows": 128}
    fp8 |= {"splits": 1}
    older, rounded = compile_all([{**fp8, "sm": 80}, {**fp8, "rounded": True}], tmp_path)
    for made in (older, rounded):
        assert made["shared_bytes"] <= (160 << 10)
    assert older["instructions"]["mma.sync"]
    assert rounded["instructions"]["wgmma.mma_async"]
    assert rounded["instructions"]["cp.async.cg.shared.global"] >= 8
    assert "cvt.rn.bf16.f16" not in older["instructions"]
    assert rounded["stack_bytes"] == older["stack_bytes"] == 0


@pytest.mark.slow
def test_every_quantised_kernel(tmp_path: Path) -> None:
    """No more than registers hold, whatever codes stand for."""
    kinds: list[dict[str, Any]] = [
        {"bits": 4},
        {"bits": 4, "mins": True},
        {"bits": 4, "values": E2M1},
        {"bits": 4, "values": UNEVEN, "mins": True},
        {"bits": 8},
        {"bits": 8, "mins": True},
        {"bits": 8, "group": 16},
        {"fp8": True, "group": 0},
        {"fp8": True, "group": 128},
    ]
    cases: list[dict[str, Any]] = []
    for kind in kinds:
        for rows in (16, 32, 64, 128):
            for name in ("linear", "grouped"):
                cases.append({**kind, "name": name, "rows": rows, "splits": 1})
        cases.append({**kind, "rows": 16, "splits": 16})
        cases += [{**kind, "name": "rows", "rows": outputs} for outputs in (8, 16)]
        cases.append({**kind, "name": "dequantize"})
        cases.append({**kind, "rows": 64, "dtype": "float16"})
    cases += [{**kinds[2], "name": "grouped", "rows": rows, "scales": True} for rows in (16, 128)]
    for group in (0, 128):
        more = {"fp8": True, "group": group}
        for rows in (64, 128):
            for name in ("linear", "grouped"):
                cases.append({**more, "name": name, "rows": rows, "splits": 1, "rounded": True})
        cases.append({**more, "name": "round"})
    cases += [{"name": "sum", "splits": splits} for splits in (2, 16)]
    for name in ("linear", "rows", "grouped", "dequantize", "sum"):
        cases.append({"name": name, "rows": 16, "splits": 1, "bare": True})
    made_of = compile_all([{"kernel": "quantized", **case} for case in cases], tmp_path)
    for case, made in zip(cases, made_of, strict=True):
        print(case, made)
        assert made["shared_bytes"] <= SHARED_BYTES, case
        assert made["stack_bytes"] == 0, case
        if case.get("name", "linear") in ("linear", "grouped"):
            assert made["instructions"]["wgmma.mma_async"], case


@pytest.mark.slow
def test_stores(tmp_path: Path) -> None:
    """No more than registers hold, and whole words are written."""
    cases: list[dict[str, Any]] = [
        {"kernel": "store", "kv": kv, "segmented": segmented, "interleaved": interleaved}
        for kv in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        for segmented in (False, True)
        for interleaved in (False, True)
    ]
    for case, made in zip(cases, compile_all(cases, tmp_path), strict=True):
        print(case, made)
        assert made["stack_bytes"] == 0, case
        assert any(".v2" in name or ".v4" in name for name in made["instructions"]), case


@pytest.mark.slow
def test_rows_and_grouped_products(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"kernel": "grouped", "rows": rows, "columns": columns, "scales": scales}
        for rows, columns in ((16, 64), (64, 128), (128, 128))
        for scales in (False, True)
    ]
    cases += [{"kernel": "rows", "name": name} for name in ("norm", "gate", "route", "sum")]
    for case, made in zip(cases, compile_all(cases, tmp_path), strict=True):
        print(case, made)
        assert made["shared_bytes"] <= SHARED_BYTES, case
        assert made["stack_bytes"] == 0, case
        kinds = made["instructions"]
        if case["kernel"] == "grouped":
            assert kinds["mma.sync" if case["rows"] == 16 else "wgmma.mma_async"], case


@pytest.mark.slow
def test_every_kind(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"rows": rows, "segmented": segmented, "page_size": page_size}
        for rows in (16, 128)
        for segmented in (False, True)
        for page_size in (1, 16, 64)
    ]
    for rows in (16, 128):
        cases += [{"rows": rows, "kv": kind} for kind in ("float8_e4m3fn", "float8_e5m2")]
        cases += [{"rows": rows, "kv": "float16", "q": "float16", "dim": 64}]
        cases += [{"rows": rows, "dim": 96, "v_dim": 80, "sight": 1, "capped": True, "sinks": True}]
        cases += [{"rows": rows, "dim": 80, "sight": 2}]
    for rows in (16, 64):
        cases += [{"rows": rows, "keys": 32, "dim": 256}]
        cases += [{"rows": rows, "keys": 32, "dim": 256, "kv": "float8_e4m3fn"}]
        cases += [{"rows": rows, "keys": 32, "kv": "float32", "q": "float32"}]
    for case, made in zip(cases, compile_all(cases, tmp_path), strict=True):
        print(case, made)
        assert made["shared_bytes"] <= SHARED_BYTES, case
        assert max(made["on_their_way"]) >= 3, case
        # Exact products of float32 are no tensor core's, and spill; they are for comparisons.
        assert made["stack_bytes"] == 0 or case.get("q") == "float32", case
