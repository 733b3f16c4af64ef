"""Tokens drawn natively, against the definition in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("sgl_kernel")
from sgl_kernel import Isa, KernelError, cpu_isa, sample

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
CLOSE = 2e-6  # what float32 weights and their sums may move a border by, of the whole
Float64Array = npt.NDArray[np.float64]

FILTERS = [
    # temperature, top_k, top_p, min_p
    (1.0, -1, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.0, -1, 1.0, 0.05),
    (0.7, 50, 1.0, 0.0),
    (0.7, 20, 0.9, 0.0),
    (0.8, -1, 0.95, 0.0),
    (2.5, -1, 0.999, 0.001),
    (1.5, 3, 0.5, 0.2),
    (1.0, 10**6, 0.01, 0.0),
    (1.0, -1, 0.9, 1.0),
]
NUMBERS = [0.0, 0.1, 0.37, 0.5, 0.8, 0.95, 0.999, 1 - 2.0**-53]


def draw(logits: torch.Tensor, filters: tuple[float, int, float, float], u: float, isa: Isa) -> int:
    temperature, top_k, top_p, min_p = filters
    tokens = torch.full((1,), -1)
    sample(
        logits[None], logits.max()[None], tokens, rows=np.zeros(1, np.int64),
        temperature=np.array([temperature], np.float32), u=np.array([u]),
        top_k=np.array([top_k]), top_p=np.array([top_p]), min_p=np.array([min_p], np.float32),
        isa=isa,
    )  # fmt: skip
    return int(tokens[0])


def bounds(
    logits: torch.Tensor, filters: tuple[float, int, float, float], slack: float
) -> tuple[npt.NDArray[np.int64], Float64Array]:
    """Tokens in the order of the draw and the sum of their probabilities, of the whole.

    `slack` lets so much more pass at the borders of top_p and of min_p.
    """
    temperature, top_k, top_p, min_p = filters
    scaled = (logits - logits.max()).double() / np.float32(temperature)
    p = scaled.softmax(-1).numpy()
    keep = p >= (np.float32(min_p) - slack) * p.max()
    if top_p < 1.0 or 0 < top_k < len(p):
        order = np.lexsort((np.arange(len(p)), -scaled.numpy()))
        before = np.cumsum(p[order]) - p[order]
        passing = (before < top_p + slack) if top_p < 1.0 else np.ones(len(p), bool)
        if top_k > 0:
            passing[top_k:] = False
        order = order[passing & keep[order]]
    else:
        order = np.flatnonzero(keep)
    return order, np.cumsum(p[order])


def check(logits: torch.Tensor, filters: tuple[float, int, float, float]) -> None:
    """Every number of NUMBERS at every level; what follows from the definition is found once."""
    order, ends = bounds(logits, filters, CLOSE)
    _, least = bounds(logits, filters, -CLOSE)
    # Tokens at the borders of the filters pass or not as rounding decides.
    gap = CLOSE + ends[-1] - (least[-1] if len(least) else 0.0)
    for u, isa in itertools.product(NUMBERS, LEVELS):
        token = draw(logits, filters, u, isa)
        place = np.flatnonzero(order == token)
        assert len(place) == 1, (token, filters, u, isa)
        assert logits[token] > -math.inf
        begin = ends[place[0] - 1] if place[0] else 0.0
        within = begin - gap <= u * ends[-1] <= ends[place[0]] + gap
        assert within, (token, filters, u, isa)


@pytest.mark.parametrize("width", [1, 5, 64, 65, 1000, 49_152])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5, 12.0])
def test_draws_follow_the_definition(width: int, scale: float) -> None:
    torch.manual_seed(width)
    logits = torch.randn(width) * scale
    logits[torch.rand(width) < 0.1] = -math.inf
    logits[width // 2] = max(float(logits.max()), 0.0)  # one at least, often equal to another
    for filters in FILTERS:
        check(logits, filters)


@pytest.mark.parametrize("isa", LEVELS)
def test_equal_tokens_stand_by_id(isa: Isa) -> None:
    logits = torch.full((300,), -1.0)
    logits[[7, 80, 81, 299]] = 2.0
    for place, token in enumerate([7, 80, 81, 299]):
        assert draw(logits, (1.0, 4, 1.0, 0.0), (place + 0.5) / 4, isa) == token
    # Of equals at the border of top_k the lowest ids pass.
    assert draw(logits, (1.0, 2, 1.0, 0.0), 0.999, isa) == 80
    assert draw(logits, (1.0, 1, 1.0, 0.0), 0.999, isa) == 7


@pytest.mark.parametrize("isa", LEVELS)
def test_frequencies(isa: Isa) -> None:
    logits = torch.randn(70)
    wanted = (logits.double() / 0.8).softmax(-1)
    n = 20_000
    tokens = torch.zeros(n, dtype=torch.int64)
    whole = logits.expand(n, 70).contiguous()
    sample(
        whole, whole.amax(-1), tokens, rows=np.arange(n), temperature=np.full(n, 0.8, np.float32),
        u=(np.arange(n) + 0.5) / n, top_k=np.full(n, -1), top_p=np.ones(n),
        min_p=np.zeros(n, np.float32), num_threads=2, isa=isa,
    )  # fmt: skip
    found = torch.bincount(tokens, minlength=70) / n
    assert (found - wanted).abs().max() < 2 / n


def test_only_the_rows_that_are_asked_for() -> None:
    logits = torch.randn(4, 33)
    tokens = torch.tensor([-1, -2, -3, -4])
    rows = np.array([3, 1])
    some = {
        "rows": rows, "temperature": np.ones(2, np.float32), "u": np.array([0.2, 0.9]),
        "top_k": np.array([5, -1]), "top_p": np.array([1.0, 1.0]),
        "min_p": np.zeros(2, np.float32),
    }  # fmt: skip
    sample(logits, logits.amax(-1), tokens, **some)
    assert tokens[[0, 2]].tolist() == [-1, -3]
    assert int(tokens[3]) == draw(logits[3], (1.0, 5, 1.0, 0.0), 0.2, cpu_isa())
    assert int(tokens[1]) == draw(logits[1], (1.0, -1, 1.0, 0.0), 0.9, cpu_isa())
    for wrong, what in (
        ({"rows": np.array([4, 1])}, "rows are not all in"),
        ({"u": np.array([0.2])}, "wants 2 of float64"),
        ({"top_p": np.ones(2, np.float32)}, "float32"),
    ):
        with pytest.raises(KernelError, match=what):
            sample(logits, logits.amax(-1), tokens, **(some | wrong))
    with pytest.raises(KernelError, match="bfloat16"):
        sample(logits.bfloat16(), logits.amax(-1), tokens, **some)
    with pytest.raises(KernelError, match="for each row"):
        sample(logits, logits.amax(-1)[:3], tokens, **some)


@pytest.mark.parametrize("isa", LEVELS)
def test_rows_that_are_broken_stay_inside_memory(isa: Isa) -> None:
    """Logits are cleaned before; this only says that nothing worse than a wrong token happens."""
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.full((130,), value)
        for filters in FILTERS:
            assert 0 <= draw(logits, filters, 0.5, isa) < 192
