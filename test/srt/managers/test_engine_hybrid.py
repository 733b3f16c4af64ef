"""Models with recurrent states through the whole device tower: the same tokens as transformers.

Most layers keep a state, the others all tokens. Chunks end inside pages, pages inside the chunks of
the delta rule, and prefix hits fall on every offset around page borders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import (
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import ControlReq, TokenizedGenerateReqInput, int32_buffer
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import DeviceTower, tower
from srt.managers.test_engine_windows import ask
from srt.models.hf_models import HYBRID_FAMILIES, VOCAB, best_next, make_hf_model, save

NEW_TOKENS = 40
PAGE = 8
FLAGS: dict[str, object] = {"page_size": PAGE, "kv_segment_size": 64, "chunked_prefill_size": 32}
PROMPTS: list[list[int]] = [
    np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (1, 15, 16, 17, 67, 130)
]
BASE: list[int] = np.random.default_rng(29).integers(0, VOCAB, 200).tolist()

Model = tuple[PreTrainedModel, str]


def made(family: str, folder: Path) -> Model:
    reference = make_hf_model(family)
    return reference, save(reference, folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))


def answer_all(engine: DeviceTower, count: int = NEW_TOKENS) -> list[list[int]]:
    for number, prompt in enumerate(PROMPTS):
        engine.send(f"r{number}", prompt, max_new_tokens=count)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(len(PROMPTS))]


def assert_greedy(reference: PreTrainedModel, outputs: list[list[int]]) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len(output) == NEW_TOKENS
        assert output == best_next(reference, prompt, output)
    assert min(len(set(output)) for output in outputs) > 8


@pytest.mark.parametrize("family", sorted(HYBRID_FAMILIES))
def test_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    reference, path = made(family, tmp_path)
    with tower(path, page_size=16, kv_segment_size=64, chunked_prefill_size=37) as engine:
        assert_greedy(reference, answer_all(engine))
        groups = engine.memory.memory_object()["groups"]
        assert isinstance(groups, list)
        full, state = (1, 3) if family == "qwen3_next" else (1, 2)
        assert [(g["kind"], g["num_layers"]) for g in groups] == [("full", full), ("state", state)]


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 17},
        {"page_size": 64, "kv_segment_size": 64, "disable_radix_cache": True},
        {"page_size": 16, "kv_segment_size": 64, "kv_backing": "segment_table"},
        {"kv_segment_size": 64, "kv_backing": "static", "disable_overlap_schedule": True},
        {**FLAGS, "attention_backend": "torch_native", "kv_canary": "full"},
    ],
    ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()),
)
def test_tokens_from_any_pool(model: Model, flags: dict[str, object]) -> None:
    with tower(model[1], **flags) as engine:
        assert_greedy(model[0], answer_all(engine))


def test_prefix_hits_around_borders(model: Model) -> None:
    """Prompts that end at every offset around a border, then go on from there."""
    reference, path = model
    with tower(path, **FLAGS) as engine:
        for length in range(PAGE * 9 - 1, PAGE * 10 + 2):
            prompt = BASE[:length]
            answer, _ = ask(engine, f"first{length}", prompt)
            assert answer == best_next(reference, prompt, answer)
            again, cached = ask(engine, f"again{length}", prompt)
            assert again == answer
            assert cached == (length - 1) // PAGE * PAGE, "a repeat hits at full length"
            longer = prompt + answer + [length % VOCAB, 5]
            turn, cached = ask(engine, f"turn{length}", longer)
            assert turn == best_next(reference, longer, turn)
            assert cached == (length + len(answer) - 1) // PAGE * PAGE
            engine.memory.audit()


def test_hits_at_ends_of_chunks(model: Model) -> None:
    """Prompts that leave a longer one somewhere: they go on from the chunk's end before that."""
    reference, path = model
    with tower(path, **FLAGS) as engine:
        ask(engine, "long", BASE)
        for shared, usable in ((31, 0), (32, 32), (100, 96), (199, 192)):
            prompt = [*BASE[:shared], 1, 2, 3]
            answer, cached = ask(engine, f"fork{shared}", prompt)
            assert cached == usable
            assert answer == best_next(reference, prompt, answer)
        engine.memory.audit()


def test_retraction_under_a_tiny_budget_changes_no_token(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counting almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 48}
    with tower(model[1], **flags, kv_memory_budget="160KiB") as engine:
        assert_greedy(model[0], answer_all(engine))
        assert engine.scheduler.counters.num_retractions > 0


def test_a_request_as_long_as_the_clamp_allows_goes_through(model: Model) -> None:
    """States of its own chunks, left in the cache, make room for its tokens."""
    flags = {**FLAGS, "chunked_prefill_size": 16, "kv_memory_budget": 96 << 10}
    with tower(model[1], **flags) as engine:
        length = engine.parts.limits.context_length
        assert length == 192
        prompt = (BASE * 3)[: length - 10]
        engine.send("long", prompt, max_new_tokens=100)
        engine.run()
        output = engine.output("long")
        assert len(output) == 10
        assert output == best_next(model[0], prompt, output)
        (out,) = (out for out in engine.channel.outs if out.finish_reason is not None)
        assert out.finish_reason is not None
        assert (out.finish_reason.type, engine.scheduler.counters.num_retractions) == ("length", 0)


def test_two_ranks_share_the_heads(expert_model: Model) -> None:
    reference, path = expert_model
    with rank_towers(2, path, **FLAGS) as towers:
        assert_greedy(reference, towers.run(answer_all))


def test_ranks_that_share_tokens_keep_whole_states(model: Model) -> None:
    reference, path = model
    with rank_towers(2, path, kv_parallel_size=2, **FLAGS) as towers:
        assert_greedy(reference, towers.run(answer_all))


def test_what_was_not_used_for_long_lies_on_disk(model: Model, tmp_path: Path) -> None:
    flags = {**FLAGS, "kv_memory_budget": "96KiB", "kv_disk_path": str(tmp_path)}
    with tower(model[1], **flags, kv_disk_size=16 << 20) as engine:
        assert_greedy(model[0], answer_all(engine))
        assert sum(one.demote_count for one in engine.memory.manager.stats()) > 0


def test_what_states_rule_out_is_refused_before_anything_is_loaded(model: Model) -> None:
    for flags, message in (
        ({"speculative_algorithm": "NGRAM"}, "can't be taken back"),
        ({"max_total_tokens": 1000}, "--kv-memory-budget"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceTower(model[1], load_format="gguf", **flags)
    environ = Environ(kv_canary_perturb="mark:1@1")
    with pytest.raises(ValueError, match="the model has 1 layer groups"):
        DeviceTower(model[1], environ=environ, kv_canary="chain", **FLAGS)


def test_prompt_log_probabilities(model: Model) -> None:
    """Of every chunk, with a mate that decodes meanwhile; the same from a prefix hit."""
    prompt = PROMPTS[5]
    found = []
    with tower(model[1], **FLAGS) as engine:
        for rid in ("first", "again"):
            engine.send(f"mate-{rid}", PROMPTS[1], max_new_tokens=20)
            engine.scheduler.turn()
            engine.channel.inbox.append(
                TokenizedGenerateReqInput(
                    rid=rid,
                    input_ids=memoryview(int32_buffer(prompt)),
                    sampling_params=SamplingParams(max_new_tokens=1, temperature=0.0),
                    return_logprob=True,
                    logprob_start_len=100,
                )
            )
            engine.run()
            (out,) = [out for out in engine.channel.outs if out.rid == rid]
            assert out.input_logprobs is not None
            found.append(np.frombuffer(out.input_logprobs.logprobs, "<f4"))
        assert len(found[0]) == len(prompt) - 100
        np.testing.assert_allclose(found[0][1:], found[1][1:], atol=1e-5)


def test_a_budget_cut_and_compaction_while_requests_run(model: Model) -> None:
    reference, path = model
    with tower(path, **FLAGS) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt, max_new_tokens=NEW_TOKENS)
        for _ in range(12):
            engine.scheduler.turn()
        before = engine.memory.manager.mapped_bytes
        message = ControlReq(1, "set_kv_budget", {"budget_bytes": before // 2})
        engine.channel.inbox.append(message)
        engine.run()
        assert engine.memory.manager.mapped_bytes <= before // 2
        assert_greedy(reference, [engine.output(f"r{n}") for n in range(len(PROMPTS))])


def test_the_text_part_of_a_multimodal_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    text = make_hf_model("qwen3_5_moe")
    config = Qwen3_5MoeConfig(
        text_config=text.config.to_dict(), vision_config={**vision, "out_hidden_size": 64}
    )
    whole = Qwen3_5MoeForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    path = save(whole, tmp_path)
    with caplog.at_level("INFO"), tower(path, **FLAGS) as engine:
        engine.send("r", PROMPTS[4])
        engine.run()
        output = engine.output("r")
        assert output == best_next(text, PROMPTS[4], output)
    notes = [record.message for record in caplog.records if "vision" in record.message]
    assert len(notes) == 1
