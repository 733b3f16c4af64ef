"""The memory benchmarks run at small sizes and report what they should; no figure is judged."""

from __future__ import annotations

import importlib
import json
import random

import numpy as np
import pytest

import bench_timeline
import soak
from bench_common import Report, Row, in_turns, make_spec, percentile


def report_of(script: str, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    importlib.import_module(script).main(["--repeats", "1", *argv])
    told: dict[str, object] = json.loads(capsys.readouterr().out)
    assert told["machine"]["cores"] >= 1  # type: ignore[index]
    return told


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("bench_start", ["--tokens", "70000", "--static-bytes", "40000000"]),
        ("bench_allocator", ["--tokens", "65536", "--batch", "8", "--decodes", "4096"]),
        ("bench_bookkeeping", ["--tokens", "30000", "--chunk", "1000"]),
        ("bench_radix", ["--tokens", "20000", "--keys", "200", "--families", "5"]),
        ("bench_idle", ["--requests", "6", "--batch", "3"]),
        ("bench_tables", ["--rows", "4", "--context", "100000"]),
        ("bench_disk", ["--segments", "2", "--slots", "64"]),
    ],
)
def test_a_script_reports_all_its_figures(
    script: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = report_of(script, capsys, *argv)
    rows = told["rows"]
    assert isinstance(rows, list)
    assert rows
    for row in rows:
        assert row["segmented"] is not None
        assert (row["met"] is None) == (row["goal"] == "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("bench_growth", ["--batch", "2", "--steps", "20"]),
        ("bench_serving", ["--concurrency", "2", "--new-tokens", "4"]),
    ],
)
def test_a_script_with_the_real_model_reports(
    script: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = report_of(script, capsys, *argv)["rows"]
    assert isinstance(rows, list)
    assert all(row["segmented"] > 0 and row["static"] > 0 for row in rows)


def test_the_pool_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--tokens", "70000", "--static-bytes", "40000000"]
    (note,) = report_of("bench_start", capsys, *argv)["notes"]  # type: ignore[misc]
    assert "static at 23,040 B/token" in note
    assert "1,736 tokens" in note


@pytest.mark.slow
def test_a_short_soak_leaves_nothing_behind() -> None:
    told = soak.soak(5.0, 60, seed=7)
    assert told["requests"] >= 240
    assert sum(told["ends"].values()) == told["requests"]
    assert told["idle_bytes"][:2] == [0, 0]


def test_the_soak_notices_a_second_final_answer() -> None:
    pool = soak.Pool(1, 0, False, random.Random(1))
    pool.run_epoch(0, 3)
    sent = pool._traffic(1, 3)
    pool._finish()
    pool.harness.channel.outs.append(pool.harness.channel.outs[-1])
    with pytest.raises(soak.SoakError, match="final answers"):
        pool._check_answers(sent)
    lease = pool.memory.open(np.zeros(4, np.int32), max_prefix=0)
    with pytest.raises(soak.SoakError, match="not empty"):
        pool._pass_idle_time()
    pool.memory.close(lease, None, 0)
    pool.memory.close_pool()


def test_ways_are_called_in_turns() -> None:
    called: list[str] = []

    def way(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = in_turns(3, {name: lambda name=name: way(name) for name in "ab"})
    assert "".join(called) == "abbaab"
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10), (10, 1), (0.1, 1)]
)
def test_percentiles_are_values_that_were_measured(percent: float, value: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == value


def test_a_report_as_a_table() -> None:
    report = Report("x", {"n": 3})
    report.rows.append(Row("time", 2.0, 4.0, "ms", "< 3 ms", True))
    report.rows.append(Row("weight", 1234.5, None, "B", "< 1 B", False))
    report.notes.append("a note.")
    text = report.as_markdown()
    assert "| time | 2 | 4 | 0.5 | ms | < 3 ms | yes |" in text
    assert "| weight | 1,234 | - | - | B | < 1 B | **no** |" in text
    assert "Settings: n 3." in text
    assert "Note: a note." in text


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [2, 512, 23_040])
def test_a_spec_costs_what_was_asked(width: int, groups: int) -> None:
    assert make_spec(width, 16, groups).bytes_per_token == width * groups


def test_the_timeline_is_drawn_from_its_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib", exc_type=ImportError)
    keys = ("mapped_bytes", "resident_bytes", "used_bytes", "cached_bytes")
    samples = [
        {"seconds": i, "budget_bytes": 9e6, **dict.fromkeys(keys, i * 1e6)} for i in range(5)
    ]
    source, target = tmp_path / "t.json", tmp_path / "t.png"
    marks = [{"seconds": 1.0, "label": "burst"}]
    source.write_text(json.dumps({"machine": {}, "marks": marks, "samples": samples}))
    bench_timeline.main(["--from", str(source), "--png", str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
