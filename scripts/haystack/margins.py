"""How safe the circuit is, computed from the weights as they are stored, as a function of length.

A softmax over n positions gives the right one all but n * exp(-gap) of the weight, where gap is
how far its score stands above the best wrong one. Both kinds of heads depend on little: a rotary
head on the distance (and on the norms of the rows), the lookup on which two tokens a position
holds. So all cases are tried, in float64, with roundings where a bfloat16 model rounds.
docs/needle.md explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from haystack.circuit import (
    CARRY_GAIN,
    CONST_SIZE,
    CONST_VALUE,
    HEAD_DIM,
    Layer,
    Part,
    Shape,
    Weights,
)
from haystack.distance_head import rotary_frequencies

ATTN_SCALE = 0.1
FLOOR_SCALE = 8192


def temperature(position: int) -> float:
    """What a NoPE layer multiplies its query by at a position (Llama 4's temperature tuning)."""
    return 1.0 + ATTN_SCALE * math.log(1 + (position + 1) // FLOOR_SCALE)


@dataclass(frozen=True)
class Margins:
    """Gaps of one checkpoint: score differences before the softmax, logit differences after it.

    `distance_gaps`: of each rotary head, in order, over its chunk. `lookup_gap`: of the global
    lookup at temperature 1. `logit_gap`: of the answer over any other token.
    """

    distance_gaps: tuple[float, ...]
    lookup_gap: float
    logit_gap: float
    chunk_size: int

    def distance_margin(self) -> float:
        """Nats by which the weakest rotary head beats all other positions of a chunk together."""
        return min(self.distance_gaps) - math.log(self.chunk_size)

    def lookup_margin(self, length: int) -> float:
        """Nats by which the lookup beats `length` other positions together, were all the worst."""
        return self.lookup_gap * temperature(length - 1) - math.log(length)


def measure_margins(weights: Weights, shape: Shape, position: int = 0) -> Margins:
    """The margins of `build_weights(shape)`; rotary heads as they are around `position`."""
    gaps = tuple(
        distance_gap(weights, shape, number, position)
        for number, layer in enumerate(shape.layers)
        if layer.looks_back is not None
    )
    return Margins(gaps, lookup_gap(weights, shape), logit_gap(weights, shape), shape.chunk_size)


def distance_gap(
    weights: Weights,
    shape: Shape,
    number: int,
    position: int,
    angles: torch.dtype = torch.float64,
) -> float:
    """Gap of the rotary head of layer `number` for a query in the chunk of `position`, worst query.

    The right key is taken with the largest norm that its row may have (which makes it weakest), all
    others with the smallest. `angles` is the precision in which position times frequency is
    computed; a model that uses float32 loses some of the gap far from the start.
    """
    layer = shape.layers[number]
    assert layer.looks_back is not None
    least, most = _mean_squares(shape, number)
    keys = torch.stack([_of_const(weights, number, "k_proj", ms) for ms in (most, least)])
    query = _of_const(weights, number, "q_proj", most)
    start = position // shape.chunk_size * shape.chunk_size
    places = torch.arange(start, start + shape.chunk_size)
    turned = [_rotate(key, places, shape, angles) for key in keys]
    queries = _rotate(query, places, shape, angles)
    right, others = ((queries @ one.T) / math.sqrt(HEAD_DIM) for one in turned)
    distance = places[:, None] - places[None, :]
    others = others.masked_fill((distance < 0) | (distance == layer.looks_back), -math.inf)
    rows = slice(max(layer.looks_back, 1), None)  # those that see their target and something else
    targets = right.diagonal(-layer.looks_back)[-(shape.chunk_size - max(layer.looks_back, 1)) :]
    return float((targets - others[rows].amax(1)).min())


def lookup_gap(weights: Weights, shape: Shape) -> float:
    """Gap of the global lookup at temperature 1 over all tokens, before and at every position.

    The least score of a position whose predecessor is the query's token, less the greatest score of
    any position whose predecessor is another.
    """
    number = _lookup_layer(shape)
    scale = 1.0 / math.sqrt(_mean_squares(shape, number)[0] + shape.rms_norm_eps)
    codes = weights["model.embed_tokens.weight"][:, Part.OWN.columns].double()
    normed = _bf16(codes * scale)
    prefix = f"model.layers.{number}.self_attn"
    query_weight = weights[f"{prefix}.q_proj.weight"].double()
    key_weight = weights[f"{prefix}.k_proj.weight"].double()
    queries = _bf16(normed @ query_weight[:, Part.OWN.columns].T)
    backs = normed @ key_weight[:, Part.BACK.columns].T
    owns = normed @ key_weight[:, Part.OWN.columns].T
    # Their sum is a key. Both are the same number with either sign, so it rounds to itself.
    by_back = queries @ backs.T / math.sqrt(HEAD_DIM)
    by_own = queries @ owns.T / math.sqrt(HEAD_DIM)
    same = torch.eye(len(codes), dtype=torch.bool)
    match = by_back.diagonal() + by_own.masked_fill(same, math.inf).amin(1)
    mismatch = by_back.masked_fill(same, -math.inf).amax(1) + by_own.amax(1)
    return float((match - mismatch).min())


def logit_gap(weights: Weights, shape: Shape) -> float:
    """How far the answer's logit stands above the next one, the worst over all tokens."""
    codes = weights["model.embed_tokens.weight"][:, Part.OWN.columns].double()
    head = weights["lm_head.weight"][:, Part.FOUND.columns].double()
    logits = codes @ head.T
    same = torch.eye(len(codes), dtype=torch.bool)
    answer = logits.diagonal()
    other = logits.masked_fill(same, -math.inf).amax(1)
    if shape.num_layers == 2:
        mean_square = shape.layers[-1].mean_square + 0.25
        return float((answer - other).min()) / math.sqrt(mean_square)
    # What lay in BACK before, 1 / CARRY_GAIN of the answer, is in FOUND with it; the worst is that
    # it supports one wrong token fully and opposes the answer.
    worst = (answer - other) - (answer - logits.amin(1)) / CARRY_GAIN
    mean_square = shape.layers[-1].mean_square + 1 / 4
    return float(worst.min()) / math.sqrt(mean_square)


def _lookup_layer(shape: Shape) -> int:
    return next(i for i, layer in enumerate(shape.layers) if layer.looks_back is None)


def _mean_squares(shape: Shape, number: int) -> tuple[float, float]:
    """The least and the greatest mean square of the rows that enter layer `number`."""
    layer: Layer = shape.layers[number]
    if number < 2:
        return layer.mean_square, layer.mean_square
    least = shape.layers[1].mean_square
    # Codes in one part may add up to a little more than they do on average.
    spare = 0.0 if number == 2 else 2 * CARRY_GAIN / 32
    return least, layer.mean_square + spare


def _of_const(weights: Weights, number: int, name: str, mean_square: float) -> torch.Tensor:
    """What a projection makes of CONST alone in a row of `mean_square`: [head_dim], rounded."""
    weight = weights[f"model.layers.{number}.self_attn.{name}.weight"].double()
    first = Part.CONST.columns.start
    value = _bf16(torch.tensor(CONST_VALUE / math.sqrt(mean_square), dtype=torch.float64))
    return _bf16(weight[:, first : first + CONST_SIZE].sum(1) * value)


def _rotate(
    vector: torch.Tensor, places: torch.Tensor, shape: Shape, angles: torch.dtype
) -> torch.Tensor:
    """`vector` [D] turned for every place: [P, D], rounded as a bfloat16 model does."""
    frequencies = torch.from_numpy(rotary_frequencies(HEAD_DIM, shape.rope_theta)).to(angles)
    turn = (places.to(angles)[:, None] * frequencies).double()
    even, odd = vector[0::2], vector[1::2]
    turned = torch.empty(len(places), HEAD_DIM, dtype=torch.float64)
    turned[:, 0::2] = even * turn.cos() - odd * turn.sin()
    turned[:, 1::2] = even * turn.sin() + odd * turn.cos()
    return _bf16(turned)


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()
