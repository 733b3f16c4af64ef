"""Devices that can be planned for: memory, memory bandwidth and dense matrix rate as published.

Numbers are the vendors' data sheets of one device; rates are dense (without sparsity). Nothing here
was measured. A device that is not listed is planned for with --gpu-memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One device: `memory_bytes`, bytes a second, 16-bit floating point operations a second.

    A rate of None: not known, and no bound is told that needs it.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float | None
    flops_per_s: float | None
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


GB = 10**9
GIB = 1 << 30

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 80 * GB, 3.35e12, 989.5e12, "NVIDIA H100 data sheet (SXM)"),
        Device("h200", 141 * GB, 4.8e12, 989.5e12, "NVIDIA H200 data sheet (SXM)"),
        Device("b200", 180 * GB, 7.7e12, 2.25e15, "NVIDIA DGX B200 data sheet, an eighth"),
        Device("a100-80g", 80 * GB, 2.039e12, 312e12, "NVIDIA A100 data sheet (SXM 80GB)"),
        Device("a100-40g", 40 * GB, 1.555e12, 312e12, "NVIDIA A100 data sheet (SXM 40GB)"),
        Device("l40s", 48 * GB, 0.864e12, 362e12, "NVIDIA L40S data sheet"),
        Device("rtx-4090", 24 * GB, 1.008e12, 165.2e12, "NVIDIA Ada architecture paper"),
    )
}
