"""A rotary attention head that looks a fixed number of tokens back, whatever the tokens are.

Query and key are two constant vectors. Rotary embedding turns their pairs of coordinates (2f,
2f + 1) by position * theta_f, so the score over a distance d depends on d alone:

    score(d) = strength * sum_f w_f cos((d - target) theta_f),     w_f >= 0, sum_f w_f = 1

which is `strength` at the target and less elsewhere. How much less is a choice of the weights w: a
matrix game between a player who mixes frequencies and one who picks the distance that suffers
least. Both learn by multiplicative weights; the average play of the first is the answer.

Source: Y. Freund and R. Schapire, "Adaptive game playing using multiplicative weights", Games and
Economic Behavior 29 (1999).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_ROUNDS = 4000
_STEP = 4.0  # learning rate in the first round; it falls with the square root of the round


def rotary_frequencies(head_dim: int, theta: float) -> Vector:
    """Radians per position of each coordinate pair, [head_dim / 2], fastest first."""
    return np.asarray(theta ** (-np.arange(0, head_dim, 2) / head_dim), dtype=np.float64)


@dataclass(frozen=True)
class DistanceHead:
    """Constant query and key [head_dim] of a head that looks `target` tokens back.

    `scores[d]` is the score before the softmax over distance d, for d in [0, window).
    """

    target: int
    query: Vector
    key: Vector
    scores: Vector

    @property
    def gap(self) -> float:
        """How far the target's score stands above every other distance of the window."""
        return float(self.scores[self.target] - np.delete(self.scores, self.target).max())


def make_distance_head(
    target: int, window: int, head_dim: int, theta: float, strength: float
) -> DistanceHead:
    """The head for distances [0, window); attention divides its scores by sqrt(head_dim)."""
    frequencies = rotary_frequencies(head_dim, theta)
    offsets = np.arange(window) - target
    weights = _frequency_weights(frequencies, offsets[offsets != 0])
    lengths = np.sqrt(weights * strength * np.sqrt(head_dim))
    # The query starts turned back by the target, so that the pairs line up exactly there.
    query = np.zeros(head_dim)
    query[0::2] = lengths * np.cos(target * frequencies)
    query[1::2] = -lengths * np.sin(target * frequencies)
    key = np.zeros(head_dim)
    key[0::2] = lengths
    scores = strength * (np.cos(np.outer(offsets, frequencies)) @ weights)
    return DistanceHead(target, query, key, scores)


def _frequency_weights(frequencies: Vector, offsets: npt.NDArray[np.int64]) -> Vector:
    """Weights [F] whose least drop, over all distances off the target, is nearly the largest."""
    drop = 1.0 - np.cos(np.outer(offsets, frequencies))
    gain, loss = np.zeros(len(frequencies)), np.zeros(len(offsets))
    total = np.zeros(len(frequencies))
    mix = np.full(len(frequencies), 1.0 / len(frequencies))
    pick = np.full(len(offsets), 1.0 / len(offsets))
    for turn in range(1, _ROUNDS + 1):
        gain += drop.T @ pick
        loss -= drop @ mix
        rate = _STEP / np.sqrt(turn)
        mix, pick = _softmax(rate * gain), _softmax(rate * loss)
        total += mix
    return _normalised(total)


def _softmax(x: Vector) -> Vector:
    return _normalised(np.exp(x - x.max()))


def _normalised(x: Vector) -> Vector:
    """x divided so that it adds up to 1."""
    share: Vector = x / x.sum()
    return share
