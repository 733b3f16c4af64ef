"""The baseline: the two-layer circuit's prefill as a plain loop over torch operations, no server.

The same weights and the same arithmetic as the engine's, with what one may know beforehand: one
request, whole attention chunks in every step, a dense cache of the right size, and only K and V of
the last layer but for the last row. Two layers, one head, dense MLPs; nothing else.

Legend: T tokens of a step, C chunk, D head dim.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from haystack.circuit import HEAD_DIM, HIDDEN_SIZE, Shape, Weights
from haystack.distance_head import rotary_frequencies
from haystack.margins import temperature
from haystack.prompts import Ids

DEFAULT_STEP = 8192


@dataclass(frozen=True)
class LoopResult:
    """`first_token` is the greedy one after the prompt; `seconds` the whole prefill with it."""

    first_token: int
    seconds: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class BareLoop:
    """Two layers ready to run. Raises ValueError for other shapes and uneven steps."""

    def __init__(self, weights: Weights, shape: Shape, step: int = DEFAULT_STEP) -> None:
        if shape.num_layers != 2:
            raise ValueError("the bare loop knows the circuit of two layers only")
        if step % shape.chunk_size:
            raise ValueError(f"a step of {step} is not a multiple of chunks of {shape.chunk_size}")
        self._shape, self._step = shape, step
        self._embedding = weights["model.embed_tokens.weight"]
        self._head = weights["lm_head.weight"]
        self._first, self._last = (_Layer(weights, number) for number in range(2))
        angles = torch.outer(
            torch.arange(shape.chunk_size, dtype=torch.float64),
            torch.from_numpy(rotary_frequencies(HEAD_DIM, shape.rope_theta)),
        )
        self._turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def prefill(self, ids: Ids) -> LoopResult:
        """Compute the whole prompt and the token after it; holds 512 bytes per token meanwhile."""
        began = time.perf_counter()
        tokens = torch.from_numpy(ids)
        keys, values = torch.empty(2, len(ids), HEAD_DIM, dtype=self._embedding.dtype)
        with torch.inference_mode():
            for start in range(0, len(ids), self._step):
                x = self._chunked_layer(
                    F.embedding(tokens[start : start + self._step], self._embedding)
                )
                normed = self._norm(x)
                block = slice(start, start + len(x))
                torch.mm(normed, self._last.key.T, out=keys[block])
                torch.mm(normed, self._last.value.T, out=values[block])
            logits = self._finish(x[-1:], keys, values)
            token = int(logits.argmax())
        return LoopResult(token, time.perf_counter() - began, len(ids))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN_SIZE,), eps=self._shape.rms_norm_eps)

    def _chunked_layer(self, x: torch.Tensor) -> torch.Tensor:
        layer, chunk, num_tokens = self._first, self._shape.chunk_size, len(x)
        whole = -(-num_tokens // chunk) * chunk
        normed = F.pad(self._norm(x), (0, 0, 0, whole - num_tokens))
        packed = F.linear(normed, layer.query_key_value).view(-1, chunk, 3 * HEAD_DIM)
        q, k, v = packed.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            self._rotate(q)[:, None], self._rotate(k)[:, None], v[:, None], is_causal=True
        )
        x = x + F.linear(attended.reshape(whole, HEAD_DIM)[:num_tokens], layer.output)
        return x + layer.mlp(self._norm(x))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [blocks, C, D] turned by the positions in its chunk."""
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self._turns).flatten(-2).to(x.dtype)

    def _finish(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The last row's attention over all positions, MLP and logits: [V]."""
        layer = self._last
        query = F.linear(self._norm(x), layer.query) * temperature(len(keys) - 1)
        scores = (keys @ query.T)[:, 0].float() / math.sqrt(HEAD_DIM)
        attended = scores.softmax(0).to(values.dtype)[None] @ values
        x = x + F.linear(attended, layer.output)
        x = x + layer.mlp(self._norm(x))
        return F.linear(self._norm(x), self._head)[0]


class _Layer:
    """One layer's weights."""

    def __init__(self, weights: Weights, number: int) -> None:
        prefix = f"model.layers.{number}."
        attention = [weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo"]
        self.query, self.key, self.value, self.output = attention
        self.query_key_value = torch.cat(attention[:3])
        gate, up = (weights[f"{prefix}feed_forward.{name}_proj.weight"] for name in ("gate", "up"))
        self.gate_up = torch.cat((gate, up))
        self.down = weights[f"{prefix}feed_forward.down_proj.weight"]

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)
