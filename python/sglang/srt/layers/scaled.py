"""Rows times one number, or numbers, as a native call where a tape is recorded."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import kernels_for


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x [R, D] times `factor` rounded to float32: a new tensor of its type, rounded once."""
    kernels = kernels_for(x)
    if kernels is not None and kernels.is_recording():
        made: torch.Tensor = kernels.scale(x, factor, num_threads=torch.get_num_threads())
        return made
    return x * factor


# A norm's eps beside which the mean of squares is nothing: it then divides by 2^30, which its
# factor takes back, both without rounding. So the kernel that there is adds, scales and rounds.
DROWNING_EPS, TAKEN_BACK = 2.0**60, 2.0**30


class ColumnScaling:
    """float32 x [R, D] -> a new tensor, column d times float32 `factors` [D]; on a CPU."""

    def __init__(self, factors: torch.Tensor) -> None:
        self.factors = factors
        self._weight = factors * TAKEN_BACK

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kernels = kernels_for(x)
        if kernels is not None and kernels.is_recording():
            made: torch.Tensor = kernels.rms_norm(
                x, self._weight, DROWNING_EPS, num_threads=torch.get_num_threads()
            )[0]
            return made
        return x * self.factors
