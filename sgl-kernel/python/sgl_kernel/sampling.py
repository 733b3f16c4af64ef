"""Tokens drawn from rows of logits: see csrc/sample.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel.library import Isa, KernelError, SampleCall, allowed_isa, library

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def sample(
    logits: torch.Tensor,
    highest: torch.Tensor,
    tokens: torch.Tensor,
    *,
    rows: Int64Array,
    temperature: Float32Array,
    u: Float64Array,
    top_k: Int64Array,
    top_p: Float64Array,
    min_p: Float32Array,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> None:
    """Draw a token of each of some rows of float32 `logits` [B, V] into int64 `tokens` [B].

    `highest` float32 [B] are the rows' maxima, which must be finite. The arrays [n] belong to the
    distinct `rows` [n]: the temperature (above 0), a number `u` in [0, 1) that picks the token, and
    the filters, of which a `top_k` of 0 or less, a `top_p` of 1 and a `min_p` of 0 let all pass.
    Without top_k and top_p the tokens that `u` is laid over stand by id, else by weight, the
    highest first and the lowest id first of equals. A logit of -inf is never drawn. `isa` lowers
    the instructions used. Raises KernelError for other types, and arrays of other types or lengths.
    """
    batch, width = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or not width:
        raise KernelError(f"sample does not serve {logits.dtype} {list(logits.shape)}")
    if highest.dtype != torch.float32 or tokens.dtype != torch.int64:
        raise KernelError("sample wants highest in float32 and tokens in int64")
    if not (len(highest) == len(tokens) == batch and highest.is_contiguous()):
        raise KernelError("sample wants a highest and a token for each row")
    if not tokens.is_contiguous():
        raise KernelError("sample writes contiguous tokens")
    arrays: tuple[npt.NDArray[Any], ...] = (rows, temperature, u, top_k, top_p, min_p)
    kinds = (np.int64, np.float32, np.float64, np.int64, np.float64, np.float32)
    for array, kind in zip(arrays, kinds, strict=True):
        if array.dtype != kind or array.shape != rows.shape or not array.flags.c_contiguous:
            raise KernelError(f"sample wants {len(rows)} of {np.dtype(kind)}, not {array.dtype}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < batch):
        raise KernelError(f"rows are not all in [0, {batch})")
    call = SampleCall(
        logits.data_ptr(), highest.data_ptr(), tokens.data_ptr(),
        *(array.ctypes.data for array in arrays), logits.stride(0), len(rows), width,
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    if library().sgl_sample(ctypes.byref(call)):
        raise KernelError("sample does not serve these arguments")
