"""Sharper attention at far positions, for layers whose queries and keys do not turn.

Source: arXiv 2501.19399 and the published configuration of Llama 4.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.model_traits import TemperatureConfig
from sglang.srt.utils.native import kernels_for

# Up to so many rows one native call is faster than PyTorch's scales and product.
_FEW_ROWS = 64


class AttentionTemperature(nn.Module):
    """Scales queries by 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale)).

    Computed in float64 and rounded once, so that it is right at any position. One module serves
    all layers: the scales of the last batch are kept.
    """

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.config = config
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, positions: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """q [T, H*D] scaled, in its own dtype; positions int64 [T]."""
        kernels = kernels_for(q)
        if kernels is not None and (len(q) <= _FEW_ROWS or kernels.is_recording()):
            out: torch.Tensor = kernels.scale_by_position(
                q,
                positions,
                attn_scale=self.config.attn_scale,
                floor_scale=self.config.floor_scale,
                num_threads=torch.get_num_threads(),
            )
            return out
        return (q * self.scales(positions)).to(q.dtype)

    def scales(self, positions: torch.Tensor) -> torch.Tensor:
        """Float32 [T, 1]; the last answer is kept for the very same tensor of positions."""
        if self._last is not None and self._last[0] is positions:
            return self._last[1]
        config = self.config
        steps = torch.floor((positions.double() + 1) / config.floor_scale)
        scales = (1 + config.attn_scale * torch.log1p(steps)).float().unsqueeze(-1)
        self._last = (positions, scales)
        return scales
