"""The dense families through the whole device tower: the same tokens as transformers.

Windows of 12 tokens and chunks of 17 meet pages of 16; prompts are several windows long. Decode
steps are on tapes, but for one family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.srt.model_executor.decode_tapes import DecodeTapes
from sglang.srt.utils.native import native_kernels
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import tower
from srt.managers.test_engine_windows import NEW_TOKENS as ASKED_TOKENS
from srt.managers.test_engine_windows import ask
from srt.models.hf_dense import DENSE_FAMILIES, WINDOW
from srt.models.hf_models import VOCAB, best_next, make_hf_model, save

NEW_TOKENS = 24
NOT_RECORDED = ("arcee",)  # its activation is no native call
FLAGS = {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 17}


def make_prompts(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in lengths]


@pytest.mark.parametrize("family", list(DENSE_FAMILIES))
def test_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = make_hf_model(family)
    # transformers turns a Phi's shorter prompts by other factors.
    short = () if family == "phi3" else (1, WINDOW, WINDOW + 1)
    prompts = make_prompts(*short, 70, 97)
    with tower(save(reference, tmp_path), **FLAGS) as engine:
        for number, prompt in enumerate(prompts):
            engine.send(f"r{number}", prompt, max_new_tokens=NEW_TOKENS)
            engine.scheduler.turn()
        engine.run()
        answers = [engine.output(f"r{number}") for number in range(len(prompts))]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer) == NEW_TOKENS
            assert answer == best_next(reference, prompt, answer)
        assert max(len(set(answer)) for answer in answers) > 8
        turn = prompts[-1] + answers[-1] + [5, 7]
        output, cached = ask(engine, "turn", turn)
        assert output == best_next(reference, turn, output)
        assert cached == (len(turn) - 3) // 16 * 16
        windows = engine.parts.worker.runner.model.config.layer_windows
        groups = engine.memory.memory_object()["groups"]
        kinds = [("full", windows.count(None)), ("sliding", windows.count(WINDOW))]
        assert [(group["kind"], group["num_layers"]) for group in groups] == [
            kind for kind in kinds if kind[1]
        ]
        if native_kernels() is not None:
            tapes = engine.parts.worker.runner.tapes
            assert isinstance(tapes, DecodeTapes)
            assert bool(tapes.recorded) == (family not in NOT_RECORDED)
            assert bool(tapes.refused) == (family in NOT_RECORDED)


@pytest.mark.parametrize(
    ("family", "size", "changes"),
    [
        ("cohere2", 2, {}),
        ("phi3", 2, {}),
        ("olmo3", 4, {}),
        ("cohere", 4, {"use_qk_norm": True}),
    ],
)
def test_ranks_answer_as_one(
    family: str, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Four ranks share two kv heads, of whose norms there are two copies then."""
    reference = make_hf_model(family, **changes)
    (prompt,) = make_prompts(70)
    with rank_towers(size, save(reference, tmp_path), **FLAGS) as ranks:
        answer, _ = ranks.run(lambda engine: ask(engine, "r", prompt))
    assert len(answer) == ASKED_TOKENS
    assert answer == best_next(reference, prompt, answer)


def test_long_rope_of_a_short_context(tmp_path: Path) -> None:
    """A server of at most 64 tokens turns by the short factors, as transformers does up to 64."""
    reference = make_hf_model("phi3")
    (prompt,) = make_prompts(40)
    with tower(save(reference, tmp_path), **FLAGS, context_length=64) as engine:
        engine.send("r", prompt, max_new_tokens=NEW_TOKENS)
        engine.run()
        answer = engine.output("r")
        assert len(answer) == NEW_TOKENS
        assert answer == best_next(reference, prompt, answer)
