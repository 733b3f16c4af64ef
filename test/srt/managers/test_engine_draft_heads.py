"""Heads on hidden states that draft, through the whole device tower.

What a head says is compared with its formula over transformers' states of the whole text, at every
step; what is verified is right or wrong as a test wants.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.allocation import KVPlacement
from sglang.srt.model_executor.draft_head import DraftHead, StateStore
from sglang.srt.model_executor.forward_batch_info import DraftBatch, ForwardBatch, HiddenSpan
from sglang.srt.speculative.step_costs import DraftedCosts
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_draft_model import send_asked
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, DeviceTower, answer_all, tower
from srt.models.hf_models import best_next, hf_greedy, make_hf_model, save
from srt.utils.fake_device import LateRuntime

STEPS = 3
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftedCosts, "seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 0.0)


@dataclass
class NextTokens:
    """A random layer of multi-token prediction behind a model, by its formula."""

    reference: PreTrainedModel
    weights: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        model: Any = self.reference.model
        hidden = self.reference.config.hidden_size
        self.layer = copy.deepcopy(model.layers[-1])
        shapes = {name: tensor.shape for name, tensor in self.layer.state_dict().items()}
        shapes |= {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes["eh_proj.weight"] = torch.Size((hidden, 2 * hidden))
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            scale = 1.2 / shape[-1] ** 0.5
            self.weights[name] = noise * scale if len(shape) > 1 else 1.0 + 0.2 * noise
        own = {name: self.weights[name] for name in self.layer.state_dict()}
        self.layer.load_state_dict(own)

    def save_behind(self, folder: Path) -> None:
        """Into the checkpoint of the model, with the copies that published ones have."""
        number = self.reference.config.num_hidden_layers
        file = folder / "model.safetensors"
        tensors = load_file(file)
        # Published files hold one matrix for each expert.
        own = {f"model.layers.{number}.{name}": t for name, t in self._published().items()}
        copies = {
            "embed_tokens": "model.embed_tokens.weight",
            "shared_head.head": "lm_head.weight",
        }
        for name, source in copies.items():
            own[f"model.layers.{number}.{name}.weight"] = tensors[source].clone()
        save_file({**tensors, **own}, file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))

    def _published(self) -> Weights:
        found: Weights = {}
        for name, tensor in self.weights.items():
            parent, _, leaf = name.rpartition(".experts.")
            if leaf == "gate_up_proj":
                for expert, both in enumerate(tensor):
                    for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                        found[f"{parent}.experts.{expert}.{part}_proj.weight"] = half.clone()
            elif leaf == "down_proj":
                for expert, one in enumerate(tensor):
                    found[f"{parent}.experts.{expert}.down_proj.weight"] = one.clone()
            else:
                found[name] = tensor
        return found

    @torch.no_grad()
    def states(self, text: list[int]) -> torch.Tensor:
        """The model's states of a text."""
        model: Any = self.reference.model
        found: torch.Tensor = model(torch.tensor([text])).last_hidden_state
        return found

    @torch.no_grad()
    def draft(self, tokens: list[int], count: int, states: torch.Tensor) -> list[int]:
        """What follows `tokens`, by the formula over the `states` of a text that begins so."""
        states = states[:, : len(tokens) - 1]
        said = list(tokens)
        for _ in range(count):
            made = self._made(states, torch.tensor([said[1:]]))
            said.append(int(self.reference.lm_head(made[0, -1]).argmax()))
            states = torch.cat((states, made[:, -1:]), 1)
        return said[len(tokens) :]

    def _made(self, states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        model: Any = self.reference.model
        embedded = model.embed_tokens(following)
        joined = torch.cat((self._norm(embedded, "enorm"), self._norm(states, "hnorm")), -1)
        x = joined @ self.weights["eh_proj.weight"].T
        length = x.shape[1]
        places = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        turns = model.rotary_emb(x, places)
        out = self.layer(x, attention_mask=mask, position_ids=places, position_embeddings=turns)
        out = out[0] if isinstance(out, tuple) else out
        return self._norm(out, "shared_head.norm")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.reference.config.rms_norm_eps
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return scaled * self.weights[f"{name}.weight"]


@dataclass
class Watched:
    """Compares each draft of a tower with the formula, and puts others in its place.

    `texts` are what requests say; a draft follows the one that begins as its request does, wrong
    from a random token on.
    """

    formula: NextTokens
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
    path: str
    formula: NextTokens
    expected: list[list[int]]

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Watched:
        texts = [[*p, *a] for p, a in zip(PROMPTS, self.expected, strict=True)]
        watched = Watched(self.formula, texts)
        inner = DraftHead.propose
        monkeypatch.setattr(DraftHead, "propose", lambda *args: watched.propose(inner, *args))
        return watched


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    reference = make_hf_model("deepseek_v3")
    folder = tmp_path_factory.mktemp("mtp")
    path = save(reference, folder)
    formula = NextTokens(reference)
    formula.save_behind(folder)
    return Served(path, formula, [hf_greedy(reference, p, NEW_TOKENS) for p in PROMPTS])


def heads(**flags: Any) -> dict[str, Any]:
    return {
        "speculative_algorithm": "NEXTN",
        "speculative_num_steps": STEPS,
        "page_size": 16,
        "kv_segment_size": 64,
        **flags,
    }


FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_prefill_size": 24, "page_size": 1},
    {"kv_backing": "segment_table", "disable_overlap_schedule": True},
    {"disable_radix_cache": True},
    {"max_total_tokens": 448},
)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_layer_of_multi_token_prediction_says_what_its_formula_says(
    served: Served, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    watched = served.watch(monkeypatch)
    with tower(served.path, **heads(**flags)) as engine:
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


def test_two_ranks_read_the_same_states(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with rank_towers(2, served.path, **heads(disable_radix_cache=True)) as towers:
        said = towers.run(answer_all)
        for prompt, answer in zip(PROMPTS, said, strict=True):
            assert answer == best_next(served.formula.reference, prompt, answer)
        assert towers.first.scheduler.counters.num_proposed > 300
        towers.check()


def test_a_late_device_gets_the_same_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    flags = heads(device="cuda", attention_backend="torch_native", kv_segment_size=256)
    with tower(served.path, runtime=LateRuntime(), **flags) as engine:
        assert answer_all(engine) == served.expected
        assert engine.scheduler.counters.num_proposed > 300


def test_random_requests_and_those_with_penalties_get_the_same_tokens(served: Served) -> None:
    with tower(served.path, page_size=16) as engine:
        plain = send_asked(engine)
    with tower(served.path, **heads()) as engine:
        assert send_asked(engine) == plain
        assert engine.scheduler.counters.num_proposed > 100


def test_an_answer_of_one_token_is_shared_but_for_its_last_place(served: Served) -> None:
    """Prompts are read in the step that computes them, so that others may share them."""
    with tower(served.path, **heads(page_size=1)) as engine:
        for _ in range(2):
            engine.send("r", PROMPTS[2], max_new_tokens=1)
            engine.run()
        assert [out.cached_tokens for out in engine.channel.outs] == [0, 129]
        (group, behind) = engine.memory.spec.groups
        assert (len(group.layers), len(behind.layers)) == (3, 1)


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
    with tower(served.path, **heads()) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        assert engine.output("r") == served.expected[1]
        assert engine.scheduler.counters.num_proposed == 0
    assert read == [16, 32]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"speculative_draft_model_path": "d"}, "heads of another checkpoint are not served"),
        ({}, "has no layer of multi-token prediction"),
    ],
)
def test_models_without_a_head_are_refused(
    flags: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    with pytest.raises(ValueError, match=text), tower(path, **heads(**flags)):
        pass


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
