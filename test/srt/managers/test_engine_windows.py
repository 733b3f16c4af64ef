"""Models with sliding windows in recycled memory: the same tokens as transformers.

Windows are far shorter than the sequences, prompts several chunks long, and prefix hits fall on
all sides of page and window borders.
"""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedModel

from sglang.srt.environ import Environ
from sglang.srt.errors import InvariantError
from srt.managers.test_engine_tokens import DeviceTower, tower
from srt.models.hf_models import VOCAB, best_next, make_hf_model, save

WINDOW = 24
PAGE = 8
NEW_TOKENS = 12
FLAGS: dict[str, object] = {"page_size": PAGE, "kv_segment_size": 64, "chunked_prefill_size": 32}
MIXED = {"use_sliding_window": True, "max_window_layers": 1}
CASES: dict[str, dict[str, object]] = {"mistral": {}, "qwen2": MIXED, "qwen3": MIXED}
BASE: list[int] = np.random.default_rng(11).integers(0, VOCAB, 200).tolist()

Model = tuple[PreTrainedModel, str]


@pytest.fixture(scope="module", params=sorted(CASES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = make_hf_model(request.param, sliding_window=WINDOW, **CASES[request.param])
    return reference, save(reference, tmp_path_factory.mktemp(request.param))


def is_greedy(
    reference: PreTrainedModel, prompt: list[int], output: list[int], count: int = NEW_TOKENS
) -> bool:
    """Whether an output is transformers', all `count` tokens of it."""
    return len(output) == count and output == best_next(reference, prompt, output)


def ask(engine: DeviceTower, rid: str, prompt: list[int]) -> tuple[list[int], int]:
    """The answer and the tokens of the prompt that came from the cache."""
    engine.send(rid, prompt, max_new_tokens=NEW_TOKENS)
    engine.run()
    cached = [out.cached_tokens for out in engine.channel.outs if out.rid == rid]
    return engine.output(rid), cached[0]


def test_groups_follow_the_layers(model: Model) -> None:
    reference, path = model
    with tower(path, **FLAGS) as engine:
        groups = engine.memory.memory_object()["groups"]
        assert isinstance(groups, list)
        heads = 2 * 16 * 2 * 4  # kv heads, width, K and V, float32
        mixed = reference.config.model_type != "mistral"
        kinds = [("full", 1, heads), ("sliding", 2, 2 * heads)]
        assert [(g["kind"], g["num_layers"], g["bytes_per_token"]) for g in groups] == (
            kinds if mixed else [("sliding", 3, 3 * heads)]
        )
        limits = engine.scheduler._limits
        bound = (WINDOW + 32 + PAGE) // PAGE
        assert limits.window_pages == ((None, bound) if mixed else (bound,))
        assert engine.memory.capacity_tokens >= limits.context_length


def test_a_long_sequence_in_few_window_pages(model: Model) -> None:
    reference, path = model
    with tower(path, **FLAGS, disable_radix_cache=True) as engine:
        prompts = [BASE, BASE[50:130], BASE[7:20]]
        for number, prompt in enumerate(prompts):
            engine.send(f"r{number}", prompt, max_new_tokens=40)
        engine.run()
        for number, prompt in enumerate(prompts):
            assert is_greedy(reference, prompt, engine.output(f"r{number}"), 40)
        window = engine.memory.allocators[-1].index
        assert window.num_used == 0
        # Three requests of (window + chunk + page) / 8 pages, and one step more in flight.
        assert window.num_segments - 1 <= -(-3 * (8 + 4) // 8)


def test_prefix_hits_around_borders(model: Model) -> None:
    """Prompts that end at every offset around a border, then go on from there."""
    reference, path = model
    with tower(path, **FLAGS) as engine:
        for length in range(PAGE * 9 - 2, PAGE * 11 + 2):
            prompt = BASE[:length]
            answer, _ = ask(engine, f"first{length}", prompt)
            assert is_greedy(reference, prompt, answer)
            again, cached = ask(engine, f"again{length}", prompt)
            assert again == answer
            assert cached == (length - 1) // PAGE * PAGE, "a repeat hits at full length"
            longer = prompt + answer + [length % VOCAB, 5]
            turn, cached = ask(engine, f"turn{length}", longer)
            assert is_greedy(reference, longer, turn)
            assert cached == (length + NEW_TOKENS - 1) // PAGE * PAGE
            engine.memory.audit()


def test_a_prefix_whose_window_is_gone_is_computed_again(model: Model) -> None:
    reference, path = model
    with tower(path, **FLAGS) as engine:
        ask(engine, "long", BASE)
        # The window at the prompt's end is held from position 168 on: enough for 192, not for 184.
        for shared, usable in ((151, 0), (191, 0), (192, 192), (199, 192)):
            prompt = [*BASE[:shared], 1, 2, 3]
            answer, cached = ask(engine, f"fork{shared}", prompt)
            assert is_greedy(reference, prompt, answer)
            assert cached == usable
        engine.memory.audit()


def test_the_canary_watches_a_real_model_and_fires_when_told_to(model: Model) -> None:
    reference, path = model
    prompts = [BASE, BASE[:130], BASE[7:90]]
    with tower(path, **FLAGS, kv_canary="full") as engine:
        for number, prompt in enumerate(prompts):
            engine.send(f"r{number}", prompt, max_new_tokens=NEW_TOKENS)
        engine.run()
        for number, prompt in enumerate(prompts):
            assert is_greedy(reference, prompt, engine.output(f"r{number}"))
        num_groups = engine.memory.spec.num_groups
    for group in range(num_groups):
        damaged = DeviceTower(
            path, environ=Environ(kv_canary_perturb=f"byte:{group}@5"), **FLAGS, kv_canary="full"
        )
        damaged.send("r", BASE, max_new_tokens=NEW_TOKENS)
        with pytest.raises(InvariantError, match=f"^canary: group {group}, .*other bytes"):
            damaged.run()
        damaged.parts.worker.close()
        damaged.memory.close_pool()


def test_damage_without_a_canary_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="set --kv-canary"):
        DeviceTower(model[1], environ=Environ(kv_canary_perturb="mark:0@1"), **FLAGS)
