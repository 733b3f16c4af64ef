"""Rotary position embedding, its scaling types, and angles that stay exact at 10M tokens.

Models make one module with `get_rope` and call it in every layer. Angles are computed in float64
for the positions of the batch: in float32 the cosine is wrong by 0.4 at position 10M, and a
table of that length would take 5 GiB. Only the last batch's cosines are kept.

Sources: rotary embedding, arXiv 2104.09864; linear interpolation, arXiv 2306.15595; dynamic NTK
and yarn, arXiv 2309.00071; LongRoPE, arXiv 2402.13753; llama3, the Llama 3.1 model card. Rotation
in halves ("neox"): dimension i turns with dimension i + D/2; interleaved, 2i with 2i + 1. Where
only a part of a head turns, the other pairs stand behind those that do and turn by nothing.

Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.layers.compiled import CompiledLayer, compiled
from sglang.srt.layers.scaled import ColumnScaling
from sglang.srt.utils.native import kernels_for


class Rotation(NamedTuple):
    """How T tokens turn: cosine and signed sine float32 [T, D], pairs as `interleaved` says."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


# Up to so many rows one native call is faster than PyTorch's ten.
_FEW_ROWS = 64


class RotaryEmbedding(CompiledLayer):
    """Rotates q and k by their positions.

    `dynamic` scaling makes a token's base depend on the length of its sequence. Here that length
    is the token's own position + 1: what was cached for a prefix is then right for whoever reuses
    it, and neither chunking, batch mates nor retraction change a result. It equals transformers
    for prompts within the trained length and for each token generated beyond; transformers turns
    the tokens of a longer prompt by the base of the whole prompt instead.
    """

    def __init__(
        self,
        head_dim: int,
        rope: RopeConfig,
        max_position: int,
        dtype: torch.dtype,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, not {head_dim}")
        self.head_dim = head_dim
        self.rope = rope
        self.max_position = max_position
        self.interleaved = interleaved
        self._dtype = dtype
        self._is_dynamic = rope.rope_type == "dynamic"
        self._num_pairs = rope.turned(head_dim) // 2  # that turn; others are not scaled either
        self._scaling: ColumnScaling | None = None  # of some dimensions, not of all
        if self._num_pairs < head_dim // 2 and rope.attention_scaling != 1.0:
            self._scaling = ColumnScaling(self._factors())
        self._inv_freq = inverse_frequencies(head_dim, rope)
        self._inv_freq_there = self._inv_freq  # where the last positions lay
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated copies of q [T, H*D] and k [T, G*D]; positions int64 [T]."""
        return self.rotate(positions, q), self.rotate(positions, k)

    def rotate(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A rotated copy of x [T, heads * D]; positions int64 [T]."""
        cos, sin = self.cos_sin(positions)
        return self._rotate(x, cos, sin)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """The rotation of int64 `positions` [T], for who turns rows himself; see `cos_sin`."""
        cos, sin = self.cos_sin(positions)
        return Rotation(cos.squeeze(1), sin.squeeze(1), self.interleaved)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine [T, 1, D] float32 of the positions [T].

        The sine's first half (or the first of each pair) is negated. The last answer is kept and
        given again while the very same tensor is asked for, as every layer of a step does; it
        must not be modified between.
        """
        if self._last is not None and self._last[0] is positions:
            return self._last[1], self._last[2]
        kernels = kernels_for()
        few = len(positions) <= _FEW_ROWS and positions.device.type == "cpu"
        if kernels is not None and few and not self._is_dynamic:
            cos, sin = kernels.angles(
                positions,
                self._inv_freq,
                scaling=self.rope.attention_scaling if self._scaling is None else 1.0,
                interleaved=self.interleaved,
            )
            if self._scaling is not None:
                cos, sin = self._scaling(cos), self._scaling(sin)
            self._last = (positions, cos.unsqueeze(1), sin.unsqueeze(1))
            return self._last[1], self._last[2]
        angles = self.angles(positions)
        scaling: float | torch.Tensor = self.rope.attention_scaling
        if self._scaling is not None:
            scaling = torch.full_like(angles[:1], self.rope.attention_scaling)
            scaling[:, self._num_pairs :] = 1.0
        half_cos = (angles.cos() * scaling).float()
        half_sin = (angles.sin() * scaling).float()
        if self.interleaved:
            cos = half_cos.repeat_interleave(2, -1).unsqueeze(1)
            sin = torch.stack((-half_sin, half_sin), -1).flatten(1).unsqueeze(1)
        else:
            cos = torch.cat((half_cos, half_cos), -1).unsqueeze(1)
            sin = torch.cat((-half_sin, half_sin), -1).unsqueeze(1)
        self._last = (positions, cos, sin)
        return cos, sin

    def _factors(self) -> torch.Tensor:
        """What cosines and sines of each dimension are multiplied by, float32 [D]."""
        pairs = torch.ones(self.head_dim // 2, device="cpu")
        pairs[: self._num_pairs] = self.rope.attention_scaling
        return pairs.repeat_interleave(2) if self.interleaved else pairs.repeat(2)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Angles in radians, float64 [T, D/2], not reduced."""
        points = positions.to(torch.float64).unsqueeze(-1)
        if not self._is_dynamic:
            if self._inv_freq_there.device != positions.device:
                self._inv_freq_there = self._inv_freq.to(positions.device)
            return points * self._inv_freq_there
        return points * _dynamic_frequencies(points + 1, self.head_dim, self.rope)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if self.compiles(x):
            made: torch.Tensor = compiled(RotaryEmbedding._turn)(self, x, cos, sin)
            return made
        kernels = kernels_for(x, cos) if x.dtype == self._dtype else None
        if kernels is not None:
            threads = torch.get_num_threads()
            turned: torch.Tensor = kernels.rotate(
                x, cos, sin, interleaved=self.interleaved, num_threads=threads
            )
            return turned
        return self._turn(x, cos, sin)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[-1] // self.head_dim, self.head_dim)
        if self.interleaved:
            swapped = heads.reshape(*heads.shape[:-1], self.head_dim // 2, 2).flip(-1).flatten(-2)
        else:
            swapped = heads.roll(self.head_dim // 2, -1)
        # The products are float32 whatever x is: one rounding instead of three.
        return torch.addcmul(heads * cos, swapped, sin).to(self._dtype).view(x.shape)


def get_rope(
    head_dim: int,
    rope: RopeConfig,
    max_position: int,
    dtype: torch.dtype,
    *,
    interleaved: bool = False,
) -> RotaryEmbedding:
    """The module for a model: q and k come out in `dtype`.

    `max_position` is the model's trained length in tokens; it bounds nothing here. Raises
    ValueError for an unknown `rope_type` or an odd `head_dim`.
    """
    return RotaryEmbedding(head_dim, rope, max_position, dtype, interleaved)


def partial_row_order(head_dim: int, turned: int) -> torch.Tensor:
    """Which row of a head of q or k stands where, int64 [D]: the pairs that turn come first.

    A checkpoint turns dimension i with i + `turned` / 2; here i turns with i + D/2. Scores are the
    same for any order that q and k have in common.
    """
    rows = torch.arange(head_dim, device="cpu")
    if turned == head_dim:
        return rows
    (first, second), (third, fourth) = rows[:turned].chunk(2), rows[turned:].chunk(2)
    return torch.cat((first, third, second, fourth))


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """Radians per token of each dimension pair, float64 [D/2]; for `dynamic` the unscaled ones."""
    if rope.partial != 1.0:
        width = rope.turned(head_dim)
        if width % 2 or not width:
            raise ValueError(f"{width} of {head_dim} dimensions of a head can't turn")
        turned = inverse_frequencies(width, replace(rope, partial=1.0))
        return F.pad(turned, (0, (head_dim - width) // 2))
    base = _powers(rope.theta, head_dim)
    match rope.rope_type:
        case "default" | "dynamic":
            scaled = base
        case "linear":
            scaled = base / rope.factor
        case "llama3":
            scaled = _llama3_frequencies(base, rope)
        case "yarn":
            scaled = _yarn_frequencies(base, head_dim, rope)
        case "longrope":
            factors = rope.long_factors if rope.is_long else rope.short_factors
            scaled = _divided(base, factors, "long_factor" if rope.is_long else "short_factor")
        case _:
            raise ValueError(f"unknown rope type {rope.rope_type!r}")
    return _divide_by_factors(scaled, rope)


def _powers(theta: float, head_dim: int) -> torch.Tensor:
    # On the CPU by name: models may be built under the meta device, and these are not weights.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    return torch.pow(torch.full_like(pairs, theta), -pairs / head_dim)


def _divide_by_factors(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    return _divided(frequencies, rope.freq_factors, "freq_factors")


def _divided(
    frequencies: torch.Tensor, values: tuple[float, ...] | None, name: str
) -> torch.Tensor:
    if values is None:
        return frequencies
    factors = torch.tensor(values, dtype=torch.float64, device=frequencies.device)
    if factors.shape[0] != frequencies.shape[-1]:
        raise ValueError(f"{name} has {factors.shape[0]} values for {frequencies.shape[-1]} pairs")
    return frequencies / factors


def _dynamic_frequencies(lengths: torch.Tensor, head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """Frequencies float64 [T, D/2] of tokens whose sequences have `lengths` float64 [T, 1]."""
    stretch = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
    # Up to the trained length the stretch is at most 1: the base stays.
    growth = stretch.clamp(min=1.0).pow(head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=lengths.device) / head_dim
    return _divide_by_factors((rope.theta * growth).pow(-exponents), rope)


def _llama3_frequencies(base: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend between."""
    turns = rope.original_max_position * base / (2 * math.pi)  # within the trained length
    span = rope.high_freq_factor - rope.low_freq_factor
    if span == 0.0:  # Llama-4-Scout: nothing to blend
        keep = (turns >= rope.low_freq_factor).double()
    else:
        keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return base * keep + base / rope.factor * (1 - keep)


def _yarn_frequencies(base: torch.Tensor, head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """Keep pairs that turn more than beta_fast times, interpolate below beta_slow, ramp between.

    The ramp runs over pair indices (arXiv 2309.00071, section 3.2), whole ones when `truncate`.
    """

    def pair_of_turns(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_of_turns(rope.beta_fast), pair_of_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    interpolate = ((pairs - low) / width).clamp(0.0, 1.0)
    return base * (1 - interpolate) + base / rope.factor * interpolate
