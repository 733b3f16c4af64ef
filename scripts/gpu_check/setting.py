"""Where a stage runs and for how long: a GPU, or tiny sizes on a CPU so that typos can't hide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang.srt.utils.device import CpuRuntime, DeviceRuntime, make_runtime


@dataclass(frozen=True)
class Setting:
    """`is_dry`: tiny sizes on a CPU. `deadline` by time.monotonic; `folder` for files."""

    runtime: DeviceRuntime
    is_dry: bool
    deadline: float
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def flags(self) -> list[str]:
        """What a server is told to run where the stage runs."""
        return ["--device", self.device.type]

    def synchronize(self) -> None:
        self.runtime.synchronize()


def make_setting(dry: bool, seconds: float, folder: Path) -> Setting:
    """Raises ValueError when there is no GPU and the run is not dry."""
    runtime: DeviceRuntime = CpuRuntime() if dry else make_runtime("cuda")
    return Setting(runtime, dry, time.monotonic() + seconds, folder)


def time_ms(
    setting: Setting, work: Callable[[], object], *, repeats: int = 10, warm_ups: int = 3
) -> float:
    """Median milliseconds of `work`, by the device's events; by the host's clock on a CPU."""
    if setting.is_dry:
        repeats, warm_ups = 2, 1
    with setting.runtime.computing():
        for _ in range(warm_ups):
            work()
        setting.synchronize()
        times: list[float] = []
        for _ in range(repeats):
            if setting.device.type == "cuda":
                events: Any = torch.cuda.Event
                first, last = (events(enable_timing=True) for _ in range(2))
                first.record()
                work()
                last.record()
                last.synchronize()
                times.append(float(first.elapsed_time(last)))
            else:
                began = time.perf_counter()
                work()
                times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)
