"""Heads on hidden states that draft, through the whole device tower.

What a head says is compared with its formula over transformers' states of the whole text, at every
step; what is verified is right or wrong as a test wants.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.allocation import KVPlacement
from sglang.srt.model_executor.draft_head import DraftHead, StateStore
from sglang.srt.model_executor.forward_batch_info import DraftBatch, ForwardBatch, HiddenSpan
from sglang.srt.speculative.step_costs import DraftedCosts
from srt.managers.head_formulas import Eagle, Eagle3, HeadFormula, NextTokens
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_draft_model import send_asked
from srt.managers.test_engine_drafts import send
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, DeviceTower, answer_all, tower
from srt.models.hf_models import best_next, hf_greedy, make_hf_model, save
from srt.utils.fake_device import LateRuntime

STEPS = 3


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftedCosts, "seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 0.0)


@dataclass
class Watched:
    """Compares each draft of a tower with the formula, and puts others in its place.

    `texts` are what requests say; a draft follows the one that begins as its request does, wrong
    from a random token on.
    """

    formula: HeadFormula
    texts: list[list[int]]
    num_compared: int = 0
    others: list[str] = field(default_factory=list)
    steps: dict[int, ScheduleBatch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = [self.formula.states(text) for text in self.texts]

    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def watch(self, engine: DeviceTower) -> None:
        """Remember which requests a step's drafts are for."""
        inner = engine.scheduler._make_batch

        def make(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
            made = inner(batch, placement)
            self.steps[id(made.drafting)] = batch
            return made

        engine.scheduler._make_batch = make

    def propose(
        self,
        inner: Callable[..., torch.Tensor | None],
        head: DraftHead,
        work: DraftBatch,
        input_ids: torch.Tensor,
        before: Callable[[], None],
    ) -> torch.Tensor | None:
        drafted = inner(head, work, input_ids, before)
        if drafted is None or not len(drafted):
            return drafted
        found = drafted.tolist()
        guesses: list[int] = []
        for item in self.steps[id(work)].items:
            if not item.draft:
                continue
            known = item.req.tokens.view(0, item.start + 1).tolist()
            said, found = found[: len(item.draft)], found[len(item.draft) :]
            self.num_compared += len(said)
            number = next(n for n, t in enumerate(self.texts) if t[: len(known)] == known)
            if said != self.formula.draft(known, len(said), self.states[number]):
                self.others.append(item.req.rid)
            guesses += self._guess(self.texts[number], len(known), len(said))
        changed = torch.tensor(guesses)
        input_ids.index_copy_(0, torch.from_numpy(work.places), changed)
        return changed

    def _guess(self, text: list[int], known: int, count: int) -> list[int]:
        true = [*text, *[1] * count][known : known + count]
        return [abs(t - 1) if self.dice.random() < 0.2 else t for t in true]


@dataclass(frozen=True)
class Served:
    """A model with a head, and what it answers."""

    path: str
    flags: dict[str, Any]
    formula: HeadFormula
    expected: list[list[int]]

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Watched:
        texts = [[*p, *a] for p, a in zip(PROMPTS, self.expected, strict=True)]
        watched = Watched(self.formula, texts)
        inner = DraftHead.propose
        monkeypatch.setattr(DraftHead, "propose", lambda *args: watched.propose(inner, *args))
        return watched


def make_next_tokens(folder: Path) -> Served:
    reference = make_hf_model("deepseek_v3")
    path = save(reference, folder)
    formula = NextTokens(reference)
    formula.save_behind(folder)
    return Served(path, {"speculative_algorithm": "NEXTN"}, formula, answers_of(reference))


def make_eagle(folder: Path, name: str, kind: type[Eagle]) -> Served:
    reference = make_hf_model("llama")
    path = save(reference, folder)
    head = folder / "head"
    head.mkdir()
    formula = kind(reference)
    flags = {
        "speculative_algorithm": name,
        "speculative_draft_model_path": formula.save(head),
    }
    return Served(path, flags, formula, answers_of(reference))


def answers_of(reference: PreTrainedModel) -> list[list[int]]:
    return [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "NEXTN":
        return make_next_tokens(folder)
    return make_eagle(folder, request.param, Eagle if request.param == "EAGLE" else Eagle3)


def heads(served: Served, **flags: Any) -> dict[str, Any]:
    return {
        "speculative_num_steps": STEPS,
        "page_size": 16,
        "kv_segment_size": 64,
        **served.flags,
        **flags,
    }


def of(*names: Any) -> pytest.MarkDecorator:
    """The heads that a test is for: what it asks is the same of the others."""
    return pytest.mark.parametrize("served", names, indirect=True)


@pytest.mark.parametrize(
    ("served", "flags"),
    [
        ("NEXTN", {}),
        ("EAGLE", {"chunked_prefill_size": 24, "page_size": 1}),
        ("EAGLE", {"kv_backing": "segment_table", "disable_overlap_schedule": True}),
        ("EAGLE3", {"max_total_tokens": 448}),
        ("EAGLE3", {"disable_radix_cache": True}),
        pytest.param(
            *("NEXTN", {"disable_radix_cache": True, "chunked_prefill_size": 40}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
    indirect=["served"],
)
def test_a_head_says_what_its_formula_says(
    served: Served, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    watched = served.watch(monkeypatch)
    with tower(served.path, **heads(served, **flags)) as engine:
        watched.watch(engine)
        assert answer_all(engine) == served.expected
        engine.channel.outs.clear()
        assert answer_all(engine) == served.expected
        if not flags.keys() & {"max_total_tokens", "disable_radix_cache"}:
            assert sum(out.cached_tokens for out in engine.channel.outs) > 100
        counted = engine.scheduler.counters
        assert (counted.num_retractions > 0) == ("max_total_tokens" in flags)
        assert 0.4 < counted.num_correct / counted.num_proposed < 0.9
    assert watched.num_compared > 600
    # Where prompts part behind a shared prefix, its last place was made for one that goes on
    # otherwise: three of them share 70 tokens.
    shared = set() if "disable_radix_cache" in flags else {"r3", "r4", "r5"}
    assert set(watched.others) <= shared
    assert len(watched.others) < 20


@of("EAGLE3", pytest.param("NEXTN", marks=pytest.mark.slow))
def test_two_ranks_read_the_same_states(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with rank_towers(2, served.path, **heads(served, disable_radix_cache=True)) as towers:
        said = towers.run(answer_all)
        for prompt, answer in zip(PROMPTS, said, strict=True):
            assert answer == best_next(served.formula.reference, prompt, answer)
        assert towers.first.scheduler.counters.num_proposed > 300
        towers.check()


@of("EAGLE3")
def test_a_late_device_gets_the_same_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    flags = heads(served, device="cuda", attention_backend="torch_native", kv_segment_size=256)
    with tower(served.path, runtime=LateRuntime(), **flags) as engine:
        assert answer_all(engine) == served.expected
        assert engine.scheduler.counters.num_proposed > 300


@of("EAGLE")
def test_random_requests_and_those_with_penalties_get_the_same_tokens(served: Served) -> None:
    with tower(served.path, page_size=16) as engine:
        plain = send_asked(engine)
    with tower(served.path, **heads(served)) as engine:
        assert send_asked(engine) == plain
        assert engine.scheduler.counters.num_proposed > 100


@of("EAGLE")
def test_log_probabilities_of_prompts_are_those_without_a_head(served: Served) -> None:
    """All rows of a step are computed, and those that are asked for picked."""
    told = []
    for flags in ({"page_size": 16}, heads(served)):
        with tower(served.path, chunked_prefill_size=40, **flags) as engine:
            for number in (1, 2):
                send(engine, number, PROMPTS[number], max_new_tokens=9, temperature=0.0)
                engine.channel.inbox[-1].logprob_start_len = 4 * number  # type: ignore[union-attr]
            engine.run()
            (first,) = [out for out in engine.channel.outs if out.rid == "r1"][:1]
            assert first.input_logprobs is not None
            told.append(np.frombuffer(first.input_logprobs.logprobs, "<f4"))
    assert len(told[0]) == len(told[1]) == 13
    np.testing.assert_allclose(told[0][1:], told[1][1:], atol=2e-5)


@of("EAGLE")
def test_an_answer_of_one_token_is_shared_but_for_its_last_place(served: Served) -> None:
    """Prompts are read in the step that computes them, so that others may share them."""
    with tower(served.path, **heads(served, page_size=1)) as engine:
        for _ in range(2):
            engine.send("r", PROMPTS[2], max_new_tokens=1)
            engine.run()
        assert [out.cached_tokens for out in engine.channel.outs] == [0, 129]
        assert [len(group.layers) for group in engine.memory.spec.groups] == [3, 1]


@of("EAGLE3")
def test_what_a_request_was_not_drafted_with_is_read_by_and_by(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 9.0)
    read: list[int] = []
    compute = DraftHead._compute

    def counting(self: DraftHead, batch: ForwardBatch, *args: Any) -> torch.Tensor:
        read.append(batch.num_tokens)
        return compute(self, batch, *args)

    monkeypatch.setattr(DraftHead, "_compute", counting)
    with tower(served.path, **heads(served)) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        assert engine.output("r") == served.expected[1]
        assert engine.scheduler.counters.num_proposed == 0
    assert read == [16, 32]


def test_models_and_heads_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    reference = make_hf_model("llama")
    path = save(reference, tmp_path)
    head: Eagle = Eagle3(reference)

    def refused(name: str, text: str, own: str = path, **changes: Any) -> None:
        folder = tmp_path / f"head{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        flags = {"speculative_algorithm": name}
        if name != "NEXTN":
            flags["speculative_draft_model_path"] = head.save(folder, **changes)
        with pytest.raises(ValueError, match=text) as error, tower(own, **flags):
            pass
        assert "\n" not in str(error.value)

    refused("NEXTN", "has no layer of multi-token prediction")
    refused("EAGLE3", "a head of 2 layers is not served", num_hidden_layers=2)
    refused("EAGLE3", "a head with norm_output is not served", norm_output=True)
    refused("EAGLE3", "layers 2, 1, 0 of 3", eagle_config={})
    refused("EAGLE3", "for states of 32 numbers", hidden_size=32)
    refused("EAGLE3", r"shape \(80,\) for 40 tokens", draft_vocab_size=40)
    good = head.weights["d2t"]
    for wrong, text in ((good + 2, "none of 160"), (None, "no d2t says which 80 tokens of 160")):
        head.weights.pop("d2t")
        if wrong is not None:
            head.weights["d2t"] = wrong
        refused("EAGLE3", text)
        head.weights["d2t"] = good
    refused("EAGLE", "is a head of EAGLE-3")
    head = Eagle(reference)
    del head.weights["layers.0.mlp.up_proj.weight"]
    refused("EAGLE", "LlamaForCausalLMEagle: 1 missing weight.*: layers.0.mlp.up_proj.weight")
    latent = tmp_path / "latent"
    latent.mkdir()
    refused("EAGLE", "heads draft for Llama", own=save(make_hf_model("deepseek_v3"), latent))
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    sparse = save(make_hf_model("deepseek_v32", num_nextn_predict_layers=1), chosen)
    refused("NEXTN", "of DeepseekV32ForCausalLM is not served; DeepSeek-V3's is", own=sparse)


def test_states_wait_until_they_are_taken() -> None:
    states = torch.arange(20.0).view(10, 2)
    store = StateStore()
    store.put(3, 5, states[:4])
    store.put(4, 0, states[:1])
    assert torch.equal(store.take([HiddenSpan(3, 5, 7)]), states[:2])
    store.put(3, 9, states[4:6])
    assert repr(store) == "StateStore(3 pieces)"
    store.put(3, 10, states[7:9])  # in place of one that was drafted and not taken
    taken = store.take([HiddenSpan(3, 7, 12), HiddenSpan(4, 0, 1)])
    assert torch.equal(taken, states[[2, 3, 4, 7, 8, 0]])
    assert repr(store) == "StateStore(0 pieces)"
