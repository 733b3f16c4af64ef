"""The GPU check without a GPU: its reports, its shapes, and every stage with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_check import __main__ as gpu_check
from gpu_check import sampling, shapes
from gpu_check.precompile import num_processes
from gpu_check.records import Journal, Record, Status, exit_code, line_of, markdown, read_journal
from gpu_check.setting import Setting
from gpu_check.stage import run as run_stage
from gpu_check.stage_scout import RANKS, Rank, extrapolated_ms, write_config
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.device import CpuRuntime

ROOT = Path(__file__).resolve().parents[2]


def run_check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("python", "scripts", "sgl-kernel/python"))
    return subprocess.run(
        [sys.executable, "-m", "gpu_check", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )


def test_a_journal_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    journal = Journal(path, 1)
    journal.note("speed", gb_per_s=12.3456)
    journal.judge("equal", False, "they differ", equal=3)
    journal.skip("other", "not here")
    Journal(path, 2).note("later")
    with path.open("a") as file:
        file.write('{"stage": 2, "name": "cut o')  # killed while it wrote
    assert [record.name for record in read_journal(path)] == ["speed", "equal", "other", "later"]
    found = read_journal(path, 1)
    assert [record.status for record in found] == [Status.OK, Status.FAILED, Status.SKIPPED]
    assert found[0].values == {"gb_per_s": 12.3456}
    assert found[1] == Record(1, "equal", Status.FAILED, {"equal": 3}, "they differ")
    assert line_of(found[0]) == "stage 1  ok      speed  gb_per_s 12.35"


def test_the_exit_status_tells_failed_from_skipped() -> None:
    ok, failed, skipped = (Record(1, "x", status) for status in Status)
    assert exit_code([ok, ok]) == 0
    assert exit_code([ok, failed, skipped]) == 1
    assert exit_code([ok, skipped]) == 3
    assert exit_code([]) == 3


def test_the_table_has_a_row_for_each_record() -> None:
    records = [
        Record(1, "a|b", Status.OK, {"ms": 1.25}),
        Record(2, "c", Status.FAILED, {}, "broke\non two lines"),
    ]
    table = markdown(records, {"device": "none"})
    assert "- device: none" in table
    assert "| 1 | a/b | ok | ms 1.25 |" in table
    assert "| 2 | c | failed | broke on two lines |" in table


def test_the_shapes_are_those_that_are_promised() -> None:
    decodes = [(one.batch, one.context) for one in shapes.decode_shapes(False)]
    assert decodes == [(1, 10_000_000), (8, 131_072), (256, 2048)]
    assert [prefix + extend for prefix, extend in shapes.extend_shapes(False)] == [32768, 1 << 20]
    assert [size >> 20 for size in shapes.handle_sizes(False, 2 << 20)] == [2, 16, 64, 256]
    full = shapes.kernel_shapes(False)
    assert {shape.heads.head_dim for shape in full} == {64, 128, 256}
    assert {shape.dtype for shape in full} >= {"bfloat16", "float32", "fp8_e4m3", "fp8_e5m2"}
    assert {shape.page_size for shape in full} == {1, 16, 64}
    assert any(shape.window for shape in full)
    assert any(shape.chunk for shape in full)
    assert any(shape.sinks for shape in full)


def test_what_is_compiled_first_has_the_kernels_of_all_stages() -> None:
    compiled = shapes.compiled_shapes(False)
    assert {one.heads for one in compiled} >= {shapes.SERVER, shapes.BENCH, shapes.CIRCUIT}
    seen = {(one.heads, one.dtype, one.page_size, one.sinks) for one in compiled}
    for shape in shapes.kernel_shapes(False):
        assert (shape.heads, shape.dtype, shape.page_size, shape.sinks) in seen, shape
    slow = [one.dtype == "float32" for one in compiled]
    assert slow == sorted(slow, reverse=True)
    assert max(max(prefix for prefix, _ in one.lengths) for one in compiled) <= 20_000
    assert [num_processes(*sizes) for sizes in ((16, 40), (4, 40), (1, 40), (64, 3))] == [
        8,
        2,
        1,
        3,
    ]


def test_the_scout_rank_has_the_published_shape(tmp_path: Path) -> None:
    config = ModelConfig.from_path(write_config(tmp_path / "scout", small=False))
    spec = kv_cache_spec(config, ParallelState(0, RANKS), "bfloat16", 64)
    assert [len(group.layers) for group in spec.groups] == [12, 36]
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=None,
        auto_segment_bytes=32 << 20,
        auto_min_slots=8192,
        granule_bytes=2 << 20,
        machine_bytes=63 * 10**9,
        budget_bytes=0,
    )
    rank = Rank(torch.nn.Identity(), spec, None, layouts, 10_000_000)  # type: ignore[arg-type]
    full, chunked = rank.tables(9_999_999)
    assert len(full.page_ids) == 156_250
    assert full.first_position == 0
    assert chunked.first_position == 9_999_999 - 9_999_999 % 8192
    assert full.page_ids[0] == layouts[0].pages_per_segment
    assert int(full.page_ids[-1]) < layouts[0].max_segments * layouts[0].pages_per_segment


def check_samplers(tmp_path: Path) -> dict[str, Record]:
    setting = Setting(CpuRuntime(), True, time.monotonic() + 100, tmp_path)
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    sampling.check_sampling(setting, Journal(path, 1))
    return {record.name: record for record in read_journal(path)}


def test_a_sampler_that_chooses_others_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of mistake shows in the kinds of requests that it touches, and nowhere else."""
    found = check_samplers(tmp_path)
    assert {record.status for record in found.values()} == {Status.OK}
    module = "sglang.srt.layers.device_sampler"
    greedy = {f"sampler {name}" for name, kind in sampling.KINDS.items() if not kind["temperature"]}
    random = {f"sampler {name}" for name in sampling.KINDS} - greedy
    assert len(greedy) == len(random) == 5

    def failed(patch: str, value: object) -> set[str]:
        with monkeypatch.context() as changed:
            changed.setattr(patch, value)
            found = check_samplers(tmp_path)
        return {name for name, one in found.items() if one.status is Status.FAILED}

    assert failed(f"{module}.uniform", lambda seed, position: 0.999) == random
    assert failed(f"{module}.add_bias_and_hide", lambda logits, edits: None) == {
        "sampler logit_bias",
        "sampler min_new_tokens",
    }
    assert failed(f"{module}.CountTable.penalise", lambda *args: None) >= {
        "sampler penalties",
        "log probabilities sampled",
    }
    late = "sglang.srt.layers.late_results.topk_without_waiting"
    assert failed(late, lambda values, k: values.topk(k, largest=False)) == {
        "log probabilities sampled",
        "log probabilities of prompts",
    }


def test_a_draw_beside_a_border_is_told_from_a_wrong_one() -> None:
    """Of four tokens with 0.1, 0.2, 0.3 and 0.4 of the probability, in the order of their ids."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()

    def distance(token: int, u: float, **fields: Any) -> float:
        return sampling.Draw(logits, SamplingParams(**fields), u, token).distance()

    assert distance(2, 0.45) == 0.0
    assert distance(1, 0.3 + 1e-6) == pytest.approx(1e-6, rel=0.1)
    assert distance(3, 0.45) == pytest.approx(0.15, rel=1e-4)
    # The most likely come first where some are left out: 3, then 2, and nothing else.
    for fields in ({"top_k": 2}, {"top_p": 0.6}):
        assert distance(3, 0.5, **fields) == 0.0
        assert distance(2, 0.5, **fields) == pytest.approx(0.4 / 0.7 - 0.5, rel=1e-4)
        assert distance(1, 0.5, **fields) == pytest.approx(0.5, rel=1e-4)
    assert distance(2, 0.1, min_p=0.6) == 0.0


def test_what_does_not_fit_is_extrapolated_on_a_line() -> None:
    assert extrapolated_ms((4_000_000, 8.0), (8_000_000, 14.0), 10_000_000) == 17.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_every_stage_is_skipped(tmp_path: Path) -> None:
    done = run_check(tmp_path, "--stage", "2")
    assert done.returncode == 3, done.stderr
    run_stage(5, tmp_path / "journal.jsonl", tmp_path, 100, dry=False)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["machine"]["device"] == "no CUDA device"
    found = read_journal(tmp_path / "journal.jsonl")
    assert [vars(record) for record in found[:1]] == report["records"]
    assert [record.stage for record in found] == [2, 5]
    assert [record.reason for record in found] == ["skipped: no CUDA device"] * 2


def test_a_stage_that_does_not_end_stops_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "describe", lambda dry: {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code = gpu_check.main(["--stage", "1", "2", "--out", str(tmp_path), "--seconds", "20"])
    assert code == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [record["stage"] for record in report["records"]] == [1, 2]
    assert report["records"][0]["reason"] == "the stage ended with status 1"


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {told}; exit 0"
    process = subprocess.Popen(["/bin/sh", "-c", script], process_group=0)
    process.wait()
    gpu_check.end_group(process)
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def assert_done(records: list[Record]) -> set[str]:
    """Nothing failed and something was checked; returns what."""
    assert [record for record in records if record.status is Status.FAILED] == []
    assert any(record.status is Status.OK for record in records)
    return {record.name for record in records}


@pytest.mark.parametrize("stage", [1, 2, 4, 5])
def test_every_stage_runs_on_a_cpu_with_tiny_sizes(stage: int, tmp_path: Path) -> None:
    """In this process; what starts servers, as its user does."""
    work = tmp_path / "work"
    work.mkdir()
    run_stage(stage, tmp_path / "journal.jsonl", work, 280, dry=True)
    names = assert_done(read_journal(tmp_path / "journal.jsonl", stage))
    if stage == 1:
        assert {"sampler greedy", "log probabilities of prompts"} <= names
        assert (work / "precompile_0.log").exists()


@pytest.mark.parametrize(("stage", "log"), [(3, "server_default.log"), (6, "needle_4k.log")])
def test_stages_with_servers_run_on_a_cpu(stage: int, log: str, tmp_path: Path) -> None:
    done = run_check(tmp_path, "--stage", str(stage), "--dry-run-cpu")
    assert_done(read_journal(tmp_path / "journal.jsonl", stage))
    assert done.returncode in (0, 3), done.stdout + done.stderr
    # What comes back of a lent machine are few files.
    files = {"gpu_check.json", "gpu_check.md", "journal.jsonl", "logs.txt"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert f"==== {log}" in (tmp_path / "logs.txt").read_text()
