"""Mixtures of experts for a few rows: who goes where, and all chosen experts in one call.

The experts' matrices are read as a checkpoint's loader left them, numbers or codes, those of each
chosen expert once. Meant for decode steps, which wait for that; the many rows that a prompt has for
each expert are better multiplied by blocked products.

Legend: R rows, E experts, K chosen by a row, H hidden width, I an expert's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from sgl_kernel.library import (
    DTYPES,
    ExpertMatrixFields,
    ExpertsCall,
    Isa,
    KernelError,
    Op,
    RouteCall,
    allowed_isa,
    has_byte_dots,
)
from sgl_kernel.quantized import QuantizedWeight
from sgl_kernel.rows import Gate
from sgl_kernel.tape import empty, make


class RouteKind(IntEnum):
    """How the chosen scores become weights, as csrc/api.h numbers it.

    SOFTMAX: their shares among all experts. CHOSEN: their softmax alone, which adds up to 1.
    SIGMOID: each one's own sigmoid.
    """

    SOFTMAX = 0
    CHOSEN = 1
    SIGMOID = 2


def route(
    scores: torch.Tensor, num_chosen: int, kind: RouteKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K highest of scores [R, E], the highest first: int64 [R, K], and their float32 weights.

    Of equal scores the first place counts; NaN is the highest. Raises KernelError for what is not
    served.
    """
    rows, num_experts = scores.shape
    if scores.dtype not in DTYPES or scores.stride(1) != 1 or not 1 <= num_chosen <= num_experts:
        raise KernelError(f"{num_chosen} of {scores.dtype} {list(scores.shape)} are not served")
    experts = empty((rows, num_chosen), torch.int64)
    weights = empty((rows, num_chosen), torch.float32)
    call = RouteCall(
        scores.data_ptr(), experts.data_ptr(), weights.data_ptr(), scores.stride(0), rows,
        num_experts, num_chosen, DTYPES[scores.dtype], kind,
    )  # fmt: skip
    make(Op.ROUTE, call, scores)
    return experts, weights


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One matrix of every expert: expert e's outputs are rows [e * stride + first, ... + count).

    `weight` is numbers or a `QuantizedWeight` of such rows, [rows, inputs]. `bias` [E, count], its
    rows at any stride, or None.
    """

    weight: torch.Tensor | QuantizedWeight
    stride: int
    first: int
    count: int
    bias: torch.Tensor | None = None

    @property
    def inputs(self) -> int:
        """Inputs of each output."""
        return int(self.weight.shape[1])

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """All tensors."""
        if isinstance(self.weight, torch.Tensor):
            return self.weight, self.bias
        return self.weight.codes, self.weight.scales, self.weight.mins, self.bias

    def fields(self, dtype: torch.dtype, num_experts: int) -> ExpertMatrixFields:
        """What native code gets. Raises KernelError for what doesn't fit inputs of `dtype`."""
        weight, bias = self.weight, self.bias
        if self.first < 0 or self.first + self.count > self.stride:
            raise KernelError(f"outputs {self.first}+{self.count} are not within {self.stride}")
        if weight.shape[0] < num_experts * self.stride:
            raise KernelError(f"{weight.shape[0]} rows are less than {num_experts} experts")
        fields = ExpertMatrixFields(expert=self.stride)
        if bias is not None:
            if bias.dtype != dtype or bias.shape != (num_experts, self.count):
                raise KernelError(f"bias must be {dtype} {[num_experts, self.count]}")
            if bias.stride(1) != 1:
                raise KernelError("rows of the bias must be contiguous")
            fields.bias, fields.bias_expert = bias.data_ptr(), bias.stride(0)
        if isinstance(weight, torch.Tensor):
            if weight.dtype != dtype or weight.stride(1) != 1:
                raise KernelError(f"numbers must be {dtype} with contiguous rows")
            fields.weight, fields.row = weight[self.first :].data_ptr(), weight.stride(0)
            return fields
        own = weight.rows(self.first, weight.shape[0])
        fields.weight, fields.row = own.codes.data_ptr(), own.codes.stride(0)
        fields.scales, fields.scale_row = own.scales.data_ptr(), own.scales.stride(0)
        fields.mins = None if own.mins is None else own.mins.data_ptr()
        fields.group, fields.gain, fields.bits = own.group, own.gain, own.bits
        fields.has_values, fields.values = own.named_values
        fields.is_fp8 = own.is_fp8
        return fields


class Mixture:
    """All experts of one layer, for rows of `dtype`; holds the tensors.

    `scale_inputs`: a row's weight multiplies what its expert gets, not what it gives. Raises
    KernelError for matrices that don't fit together, gates of numbers with ups of codes or the
    other way round, and types that are not served.
    """

    def __init__(
        self,
        gate: ExpertMatrix,
        up: ExpertMatrix,
        down: ExpertMatrix,
        num_experts: int,
        opening: Gate,
        *,
        scale_inputs: bool = False,
        dtype: torch.dtype,
    ) -> None:
        if dtype not in DTYPES:
            raise KernelError(f"experts of {dtype} are not served")
        fit = gate.count == up.count == down.inputs and gate.inputs == up.inputs == down.count
        if not fit:
            raise KernelError("the matrices of gate, up and down don't fit together")
        if isinstance(gate.weight, torch.Tensor) != isinstance(up.weight, torch.Tensor):
            raise KernelError("gates and ups must both be numbers or both be codes")
        self.num_experts, self.hidden, self.width = num_experts, gate.inputs, gate.count
        self.dtype = dtype
        self._opening, self._scale_inputs = opening, scale_inputs
        self._fields = tuple(part.fields(dtype, num_experts) for part in (gate, up, down))
        self._parts = (*gate.parts, *up.parts, *down.parts)

    def __call__(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        *,
        added: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        num_threads: int = 1,
        isa: Isa | None = None,
        round_inputs: bool = False,
    ) -> torch.Tensor:
        """x [R, H] through its experts: the weighted sum [R, H], plus `added` [R, H].

        `experts` is int64 [R, K], distinct in a row, `weights` float32 [R, K]; both contiguous.
        Summed in float32 by ascending expert and rounded once to `out_dtype`, the type of x (None)
        or float32. `isa` lowers the instructions used, `round_inputs` is that of
        `QuantizedWeight.multiply` for codes. Raises KernelError for what is not served.
        """
        rows, chosen = experts.shape
        for one in (x,) if added is None else (x, added):
            if one.dtype != self.dtype or one.shape != (rows, self.hidden) or one.stride(1) != 1:
                raise KernelError(f"rows must be {self.dtype} {[rows, self.hidden]}")
        if experts.dtype != torch.int64 or not experts.is_contiguous():
            raise KernelError("experts must be contiguous int64")
        if weights.dtype != torch.float32 or weights.shape != experts.shape:
            raise KernelError(f"weights must be float32 {list(experts.shape)}")
        if not weights.is_contiguous() or not chosen:
            raise KernelError("weights must be contiguous, and not none")
        if round_inputs and not has_byte_dots(isa):
            raise KernelError("rounded inputs are not served without dot products of bytes")
        out = empty((rows, self.hidden), out_dtype or x.dtype)
        if out.dtype not in (x.dtype, torch.float32):
            raise KernelError(f"sums of {x.dtype} are not served as {out.dtype}")
        if not rows:
            return out
        call = ExpertsCall(
            x.data_ptr(), None if added is None else added.data_ptr(), out.data_ptr(),
            experts.data_ptr(), weights.data_ptr(), *self._fields,
            x.stride(0), 0 if added is None else added.stride(0), self.hidden,
            rows, chosen, self.num_experts, self.hidden, self.width,
            DTYPES[x.dtype], DTYPES[out.dtype], self._opening.kind,
            self._opening.alpha, self._opening.limit,
            self._scale_inputs, allowed_isa(isa), num_threads, round_inputs,
        )  # fmt: skip
        make(Op.EXPERTS, call, x, added, experts, weights, *self._parts)
        return out
