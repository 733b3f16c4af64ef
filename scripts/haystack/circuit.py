"""The weights of a small Llama 4 that looks up what followed a token before: an induction circuit.

The residual stream of 512 numbers is cut in four parts of 128. OWN holds the code of a position's
own token, BACK that of an earlier token, FOUND the answer; CONST holds the same everywhere, and
gives the rotary heads a query and a key that know no token. Two layers:

    0  chunked, rotary   looks one token back, writes its code to BACK
    1  global, NoPE      query OWN, key BACK - OWN, value OWN: finds the position whose predecessor
                         is the own token and writes that position's token to FOUND

or four, with the global layer in the middle, where every row of it may still matter:

    0  chunked, rotary   looks two tokens back, writes to BACK
    1  global, NoPE      as above: what stood two after the own token goes to FOUND
    2  chunked, rotary   looks one token back, adds twice its FOUND to BACK
    3  chunked, rotary   looks at itself, takes FOUND away and puts BACK there

The head of the vocabulary reads FOUND. The MLPs have random gate and up projections and a down
projection of zeros. docs/needle.md has the arithmetic; `margins.py` measures it on these weights.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from haystack.codes import CODE_LENGTH, MAX_CODES, token_codes
from haystack.distance_head import make_distance_head

HIDDEN_SIZE = 4 * CODE_LENGTH
HEAD_DIM = CODE_LENGTH
CONST_SIZE = 30  # coordinates of CONST that are used
CONST_VALUE = 8.0  # with OWN, an embedding has then a mean square of exactly 4
CARRY_GAIN = 2.0  # how much stronger than BACK's old content layer 2 of 4 writes
DISTANCE_STRENGTH = 320.0  # score at the right distance, before the softmax
LOOKUP_STRENGTH = 160.0  # score of a match before the softmax, at temperature 1
LOGIT_WEIGHT = 0.5

Weights = dict[str, torch.Tensor]


class Part(enum.IntEnum):
    """A quarter of the residual stream."""

    OWN = 0
    BACK = 1
    FOUND = 2
    CONST = 3

    @property
    def columns(self) -> slice:
        return slice(self * CODE_LENGTH, (self + 1) * CODE_LENGTH)


@dataclass(frozen=True)
class Layer:
    """What one layer's attention does.

    `looks_back`: the distance of a chunked rotary head, None for the global lookup. Its value is
    the sum of `value` parts times their factors, written to `writes` with factor `gain`.
    `mean_square` is that of the layer's input at the positions that count.
    """

    looks_back: int | None
    value: Mapping[Part, float]
    writes: Part
    gain: float
    mean_square: float


_OWN = {Part.OWN: 1.0}
_EMBEDDED, _WITH_BACK, _WITH_FOUND = 4.0, 4.25, 4.5
_CARRIED = _WITH_FOUND + CARRY_GAIN**2 / 4
LAYERS: Mapping[int, tuple[Layer, ...]] = {
    2: (
        Layer(1, _OWN, Part.BACK, 1.0, _EMBEDDED),
        Layer(None, _OWN, Part.FOUND, 1.0, _WITH_BACK),
    ),
    4: (
        Layer(2, _OWN, Part.BACK, 1.0, _EMBEDDED),
        Layer(None, _OWN, Part.FOUND, 1.0, _WITH_BACK),
        Layer(1, {Part.FOUND: 1.0}, Part.BACK, CARRY_GAIN, _WITH_FOUND),
        Layer(0, {Part.BACK: 1 / CARRY_GAIN, Part.FOUND: -1.0}, Part.FOUND, 1.0, _CARRIED),
    ),
}


@dataclass(frozen=True)
class Shape:
    """What may be chosen. Raises ValueError for what the circuit cannot do."""

    num_layers: int = 2
    vocab_size: int = 1024
    chunk_size: int = 1024
    intermediate_size: int = 1024
    max_position_embeddings: int = 11_000_000
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_layers not in LAYERS:
            raise ValueError(f"{self.num_layers} layers: there are circuits of 2 and of 4")
        if not 64 <= self.vocab_size <= MAX_CODES:
            raise ValueError(f"vocabulary of {self.vocab_size}: 64 to {MAX_CODES} tokens")
        if not 8 <= self.chunk_size <= 8192:
            raise ValueError(f"attention chunk of {self.chunk_size}: 8 to 8,192 tokens")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return LAYERS[self.num_layers]

    @property
    def key_tokens(self) -> int:
        """How many tokens a prompt must end with to name a needle."""
        reach = self.layers[0].looks_back
        assert reach is not None
        return reach


def build_weights(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """All tensors of the checkpoint under their Hugging Face names, rounded to `dtype`."""
    codes = torch.from_numpy(token_codes(shape.vocab_size))
    embedding = torch.zeros(shape.vocab_size, HIDDEN_SIZE, dtype=torch.float64)
    embedding[:, Part.OWN.columns] = codes
    embedding[:, _const_columns()] = CONST_VALUE
    head = torch.zeros_like(embedding)
    head[:, Part.FOUND.columns] = codes * LOGIT_WEIGHT
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    weights["model.norm.weight"] = torch.ones(HIDDEN_SIZE)
    generator = torch.Generator().manual_seed(shape.seed)
    for number, layer in enumerate(shape.layers):
        prefix = f"model.layers.{number}."
        attention = _attention(shape, layer)
        weights |= {f"{prefix}self_attn.{name}.weight": w for name, w in attention.items()}
        mlp = _mlp(shape, generator)
        weights |= {f"{prefix}feed_forward.{name}.weight": w for name, w in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN_SIZE)
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def _const_columns() -> slice:
    first = Part.CONST.columns.start
    return slice(first, first + CONST_SIZE)


def _attention(shape: Shape, layer: Layer) -> Weights:
    """The four projections of one head, as [out, in]."""
    rms = math.sqrt(layer.mean_square)
    query = torch.zeros(HEAD_DIM, HIDDEN_SIZE, dtype=torch.float64)
    key = torch.zeros_like(query)
    if layer.looks_back is None:
        # A match of codes, each 1 / rms after the norm, comes to LOOKUP_STRENGTH before softmax.
        factor = rms * math.sqrt(LOOKUP_STRENGTH * math.sqrt(HEAD_DIM) / CODE_LENGTH)
        query[:, Part.OWN.columns] = factor * torch.eye(HEAD_DIM)
        key[:, Part.BACK.columns] = factor * torch.eye(HEAD_DIM)
        key[:, Part.OWN.columns] = -factor * torch.eye(HEAD_DIM)
    else:
        head = make_distance_head(
            layer.looks_back, shape.chunk_size, HEAD_DIM, shape.rope_theta, DISTANCE_STRENGTH
        )
        share = rms / (CONST_SIZE * CONST_VALUE)
        query[:, _const_columns()] = share * torch.from_numpy(head.query)[:, None]
        key[:, _const_columns()] = share * torch.from_numpy(head.key)[:, None]
    value = torch.zeros_like(query)
    for part, factor in layer.value.items():
        value[:, part.columns] = factor * torch.eye(HEAD_DIM)
    output = torch.zeros(HIDDEN_SIZE, HEAD_DIM, dtype=torch.float64)
    output[layer.writes.columns] = layer.gain * rms * torch.eye(HEAD_DIM)
    return {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": output}


def _mlp(shape: Shape, generator: torch.Generator) -> Weights:
    wide = (shape.intermediate_size, HIDDEN_SIZE)
    return {
        "gate_proj": torch.randn(wide, generator=generator) * 0.05,
        "up_proj": torch.randn(wide, generator=generator) * 0.05,
        "down_proj": torch.zeros(wide[::-1]),
    }
