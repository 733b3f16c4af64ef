"""Gated activations of the MLP: stateless modules over a merged gate and up projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SiluAndMul(nn.Module):
    """silu(gate) * up, where x [*, 2 d] holds gate then up; returns [*, d] (arXiv 2002.05202)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
