"""Compiles the kernels that take long in several processes, before anything is checked.

    python -m gpu_check.precompile PLACE OF [--dry-run-cpu]

These are attention's of all stages and those of quantised weights. A process launches every OF-th
shape once, so Triton's cache on disk has its kernels. Each takes seconds of one core to compile,
and all of them more than a stage has. What breaks here is no finding: the shape is checked later.
Run by stage 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from gpu_check.attention_batch import OnePool, make_batch, make_tables, spec_of
from gpu_check.quantized import mixture_error, product_error
from gpu_check.records import Journal
from gpu_check.setting import Setting, make_setting
from gpu_check.shapes import (
    AttentionShape,
    CodesShape,
    ExpertsShape,
    checked_codes,
    checked_experts,
    compiled_shapes,
)
from sglang.srt.layers.attention.registry import get_attention_backend

_MOST_PROCESSES = 8  # each has a context on the device, of half a GiB
_SHARE_OF_TIME = 0.6  # of the stage: what is missing then is compiled when it is checked


def num_processes(cores: int, num_shapes: int) -> int:
    """As many as there is work and cores for; one core is left to each other."""
    return max(1, min(_MOST_PROCESSES, cores // 2, num_shapes))


def compile_kernels(setting: Setting, journal: Journal) -> None:
    """Run the processes and wait for them, at most for a share of the stage's time."""
    try:
        get_attention_backend("triton", setting.device.type)
    except ValueError as error:
        journal.skip("kernels are compiled", str(error))
        return
    shapes = all_shapes(setting.is_dry)
    count = 1 if setting.is_dry else num_processes(os.cpu_count() or 1, len(shapes))
    began, deadline = time.monotonic(), time.monotonic() + _SHARE_OF_TIME * setting.seconds_left
    processes = [_start(setting, place, count) for place in range(count)]
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    journal.note(
        "kernels are compiled",
        shapes=len(shapes),
        processes=count,
        ended_well=codes.count(0),
        out_of_time=codes.count(None),
        seconds=time.monotonic() - began,
    )


def _start(setting: Setting, place: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpu_check.precompile", str(place), str(count)]
    if setting.is_dry:
        command.append("--dry-run-cpu")
    with Path(setting.folder, f"precompile_{place}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def all_shapes(dry: bool) -> Sequence[AttentionShape | CodesShape | ExpertsShape]:
    """Everything that is compiled here, what takes longest first."""
    if dry:
        return compiled_shapes(dry)
    return (*compiled_shapes(dry), *checked_codes(dry), *checked_experts(dry))


def launch(setting: Setting, shape: AttentionShape | CodesShape | ExpertsShape) -> None:
    """One layer's attention, or product, whose result nobody looks at."""
    if not isinstance(shape, AttentionShape):
        with setting.runtime.computing(), torch.inference_mode():
            if isinstance(shape, CodesShape):
                product_error(setting, shape)
            else:
                mixture_error(setting, shape)
        return
    kind = get_attention_backend("triton", setting.device.type)
    backend = kind(spec_of(shape.heads, shape.dtype, shape.page_size))
    _, num_slots = make_tables(shape.lengths, shape.page_size, scattered=shape.scattered)
    with setting.runtime.computing(), torch.inference_mode():
        pool = OnePool(num_slots, shape.heads, shape.dtype, setting.device)
        make_batch(shape, backend, pool, setting.device).attend(backend)
        setting.synchronize()


def main(place: int, count: int, dry: bool) -> int:
    """Exit status 1 when a shape broke; the others were launched all the same."""
    setting = make_setting(dry, float("inf"), Path())
    broke = 0
    for shape in all_shapes(dry)[place::count]:
        try:
            launch(setting, shape)
        except Exception:  # noqa: BLE001  told by the stage that checks the shape
            traceback.print_exc()
            broke = 1
    return broke


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), "--dry-run-cpu" in sys.argv))
