"""The construction: codes, rotary heads, margins, and the whole model in transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from haystack.checkpoint import write_checkpoint
from haystack.circuit import Part, Shape, Weights, build_weights
from haystack.codes import CODE_LENGTH, MAX_CORRELATION, token_codes
from haystack.distance_head import make_distance_head, rotary_frequencies
from haystack.margins import distance_gap, lookup_gap, measure_margins, temperature
from haystack.prompts import Haystack, Prompt, Vocabulary, make_prompt, random_needles
from haystack.tasks import placement_of

DEEP = 10_000_000


@pytest.fixture(scope="module", params=[2, 4])
def shape(request: pytest.FixtureRequest) -> Shape:
    return Shape(num_layers=request.param)


@pytest.fixture(scope="module")
def weights(shape: Shape) -> Weights:
    return build_weights(shape)


def test_codes_are_signs_with_little_in_common() -> None:
    codes = token_codes(2048)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    products = codes @ codes.T / CODE_LENGTH
    assert np.array_equal(np.diag(products), np.ones(2048))
    np.fill_diagonal(products, 0.0)
    assert np.abs(products).max() == MAX_CORRELATION
    with pytest.raises(ValueError, match="between 1 and"):
        token_codes(20_000)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_distance_head_prefers_its_distance(target: int) -> None:
    head = make_distance_head(target, 1024, 128, 500_000.0, strength=100.0)
    assert head.scores[target] == pytest.approx(100.0)
    assert head.gap > 31.0
    # The scores are those of the two vectors, turned to places that far apart.
    place, distance = 1000, 37
    turns = np.exp(1j * np.outer([place, place - distance], rotary_frequencies(128, 500_000.0)))
    query, key = (v[0::2] + 1j * v[1::2] for v in (head.query, head.key))
    score = np.sum(query * turns[0] * np.conj(key * turns[1])).real / math.sqrt(128)
    assert score == pytest.approx(head.scores[distance])


def test_margins_hold_at_any_length(shape: Shape, weights: Weights) -> None:
    margins = measure_margins(weights, shape)
    assert margins.distance_margin() > 50
    for length in (2, 1000, 8191, 64_000, 1_000_000, DEEP):
        assert margins.lookup_margin(length) > 80
    assert margins.logit_gap > 8


def test_margins_hold_deep_inside(shape: Shape, weights: Weights) -> None:
    for number, layer in enumerate(shape.layers):
        if layer.looks_back is not None:
            deep = distance_gap(weights, shape, number, DEEP)
            assert deep == pytest.approx(distance_gap(weights, shape, number, 0), abs=0.5)
            # The measure sees what float32 angles would cost there.
            assert distance_gap(weights, shape, number, DEEP, torch.float32) < deep - 5


def test_margins_see_what_is_wrong(shape: Shape, weights: Weights) -> None:
    lookup = next(i for i, one in enumerate(shape.layers) if one.looks_back is None)
    name = f"model.layers.{lookup}.self_attn.k_proj.weight"
    broken = weights[name].clone()
    broken[:, Part.BACK.columns] = 0
    assert lookup_gap(weights | {name: broken}, shape) < 0
    name = "model.layers.0.self_attn.q_proj.weight"
    forward = weights[name].clone()
    forward[1::2] *= -1  # the same distance, but ahead
    assert distance_gap(weights | {name: forward}, shape, 0, 0) < 0


def test_temperature_rises_with_the_position() -> None:
    assert temperature(0) == 1.0
    assert temperature(8191) == pytest.approx(1 + 0.1 * math.log(2))
    assert temperature(DEEP - 1) == pytest.approx(1 + 0.1 * math.log(1 + 1220))


def test_shapes_that_cannot_be() -> None:
    for wrong in ({"num_layers": 3}, {"vocab_size": 20_000}, {"chunk_size": 100_000}):
        with pytest.raises(ValueError):
            Shape(**wrong)


def prompts_for(shape: Shape, length: int) -> list[Prompt]:
    vocabulary = Vocabulary(shape.vocab_size)
    depths = (0, 40, 100)
    needles = random_needles(vocabulary, len(depths), shape.key_tokens, 8, seed=1)
    filler = Haystack(np.array(vocabulary.haystack_ids, dtype=np.int32), drawn=True)
    haystack = filler.tokens(length, seed=1)
    return [
        make_prompt(haystack, placement_of(shape), needle, length, depth)
        for needle, depth in zip(needles, depths, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_finds_every_needle(shape: Shape, dtype: torch.dtype, tmp_path: Path) -> None:
    """Several chunks; one row for each answer token, as if all before it had been generated."""
    small = Shape(num_layers=shape.num_layers, chunk_size=128)
    write_checkpoint(tmp_path, small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    gaps = []
    for prompt in prompts_for(small, 641):
        ids = torch.tensor([[*prompt.ids.tolist(), *prompt.answer[:-1]]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.ids) - 1 :].double()
        assert tuple(logits.argmax(-1).tolist()) == prompt.answer
        best = logits.topk(2).values
        gaps.append(float((best[:, 0] - best[:, 1]).min()))
    # The bound is one: what a real model shows is at least that, up to bfloat16 logits.
    assert min(gaps) > measure_margins(build_weights(small), small).logit_gap - 0.2


def test_the_tokenizer_reads_what_it_writes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Shape(vocab_size=256))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = list(range(4, 256))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert len({tokenizer.decode([i]) for i in ids}) == len(ids)
