"""Tiny random models of several families over one vocabulary of bytes, and a plain engine of each.

A plain engine computes one request at a time: no cache, no drafts, no overlap, all memory at start.
What it answers is what everybody else has to answer.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import (
    FinishReason,
    LogprobArrays,
    TokenizedGenerateReqInput,
    TokenOut,
    VocabularyReq,
    int32_buffer,
)
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.scheduler_harness import LazyFuture
from srt.managers.test_engine_tokens import DeviceTower
from srt.models.hf_models import LITE, make_hf_model, save
from srt.models.lora_adapters import ALL, make_factors, save_adapter

Floats = npt.NDArray[np.float32]

VOCAB = 264
END = 256  # ends a text
CONTEXT = 512
PLAIN_TOP = 4  # log probabilities that are kept of a plain answer, to see near ties
MIXED = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 24}
# What is changed of each family's tiny model, and which projections its adapters change.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", {}, ALL),
    "mistral": ("mistral", {"sliding_window": 20}, ALL),
    "qwen3": ("qwen3", MIXED, ALL),
    "gemma3": ("gemma3", {}, ALL),
    "llama4": ("llama4", {}, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "gpt_oss": ("gpt_oss", {}, ("q_proj", "v_proj")),
    "deepseek_v2": ("deepseek_v2", LITE, ()),
    "deepseek_v3": ("deepseek_v3", {}, ()),
    "deepseek_v32": ("deepseek_v32", {}, ()),
    "cohere2": ("cohere2", {}, ALL),
    "olmo3": ("olmo3", {}, ALL),
    "glm4_moe": ("glm4_moe", {}, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "qwen3_5": ("qwen3_5", {}, ()),
    "qwen3_next": ("qwen3_next", {}, ()),
}
STATEFUL = frozenset({"qwen3_5", "qwen3_next"})  # families whose layers have recurrent states


@dataclass(frozen=True)
class Ask:
    """One request, as a value; `params` are fields of `SamplingParams`, adapter 0 is none."""

    prompt: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]
    adapter: int = 0
    logprobs: bool = False
    start: int = 0
    top: int = 0
    picked: tuple[int, ...] = ()

    def message(self, rid: str, **fields: Any) -> TokenizedGenerateReqInput:
        """The request as the scheduler takes it; `fields` say nothing of what is answered."""
        values: dict[str, Any] = {
            "return_logprob": self.logprobs,
            "logprob_start_len": self.start,
            "top_logprobs_num": self.top,
            "token_ids_logprob": int32_buffer(list(self.picked)),
            "lora_id": self.adapter or None,
        }
        return TokenizedGenerateReqInput(
            rid=rid,
            input_ids=memoryview(int32_buffer(self.prompt)),
            sampling_params=SamplingParams(**dict(self.params)),
            **{**values, **fields},
        )


@dataclass
class Answer:
    """All that was told of one request, put together."""

    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    given: list[LogprobArrays] = field(default_factory=list)
    prompt: LogprobArrays | None = None

    @classmethod
    def of(cls, outs: list[TokenOut]) -> Answer:
        """Of a request's news in order. Raises AssertionError for news after its one end."""
        made = cls()
        for out in outs:
            assert made.reason is None, f"{out.rid}: news after its end"
            made.ids += np.frombuffer(out.output_ids, "<i4").tolist()
            assert out.completion_tokens == len(made.ids), f"{out.rid}: completion_tokens differ"
            made.reason = out.finish_reason
            if out.output_logprobs is not None:
                made.given.append(out.output_logprobs)
            if out.input_logprobs is not None:
                assert made.prompt is None, f"{out.rid}: two prompts' log probabilities"
                made.prompt = out.input_logprobs
        return made

    def numbers(self) -> dict[str, Floats]:
        """Log probabilities of the generated tokens: their own, the largest, the picked ones."""
        return {
            "own": _joined([part.logprobs for part in self.given]),
            "top": _joined([part.top_logprobs for part in self.given]),
            "picked": _joined([part.picked_logprobs for part in self.given]),
        }


def _joined(parts: list[bytes]) -> Floats:
    return np.frombuffer(b"".join(parts), "<f4")


class InlineWorker:
    """A worker without its threads: a step is computed when its result is asked for, at the latest.

    Quicker, the same every time, and whoever reuses what a step still reads is found out.
    """

    def __init__(self, worker: Any, *, lazy: bool) -> None:
        self._worker, self._lazy = worker, lazy

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        worker = self._worker
        future: Future[GenerationBatchResult] = LazyFuture(
            lambda: worker._finish(worker._launch(forward_batch, info))
        )
        if not self._lazy:
            future.result()
        return future


class World:
    """One family: its model and adapters on disk, and its plain engine, started when asked."""

    def __init__(self, name: str, folder: Path) -> None:
        family, changes, targets = FAMILIES[name]
        self.name = name
        base = make_hf_model(family, vocab_size=VOCAB, max_position_embeddings=CONTEXT, **changes)
        self.path = save(base, folder / name)
        self.adapters: list[str] = []
        for number, rank in ((1, 4), (2, 2), (3, 3)) if targets else ():
            # Every adapter changes something else.
            factors = make_factors(base, targets[(number - 1) % 2 :: 2], rank=rank, seed=number)
            where = folder / f"{name}-lora{number}"
            self.adapters.append(save_adapter(where, factors, rank=rank, alpha=2.0 * rank))
        self._answers: dict[str, Answer] = {}  # by the request's repr

    @cached_property
    def flags(self) -> dict[str, Any]:
        """Flags that every engine of this family needs."""
        if not self.adapters:
            return {}
        refs = [f"a{number}={path}" for number, path in enumerate(self.adapters, 1)]
        return {"lora_paths": refs, "lora_target_modules": ["all"], "max_lora_rank": 4}

    @cached_property
    def _plain(self) -> DeviceTower:
        tower = DeviceTower(
            self.path,
            kv_backing="static",
            kv_memory_budget="8MiB",
            kv_segment_size=256,
            page_size=16,
            chunked_prefill_size=-1,
            disable_radix_cache=True,
            disable_overlap_schedule=True,
            max_running_requests=1,
            max_queued_requests=4,
            **self.flags,
        )
        tower.scheduler._worker = InlineWorker(tower.parts.worker, lazy=False)
        tower.channel.inbox.append(vocabulary())
        return tower

    def start(self) -> None:
        """Start the plain engine, if it does not run."""
        assert self._plain.memory.capacity_tokens >= CONTEXT

    def answer(self, ask: Ask) -> Answer:
        """What the plain engine says; `PLAIN_TOP` log probabilities of each token are there."""
        found = self._answers.get(repr(ask))
        if found is None:
            message = ask.message("r")
            message.return_logprob = True
            message.top_logprobs_num = max(ask.top, PLAIN_TOP)
            if not ask.logprobs:
                message.logprob_start_len = len(ask.prompt)
            tower = self._plain
            tower.channel.outs.clear()
            tower.channel.inbox.append(message)
            while tower.channel.inbox or tower.scheduler.busy:
                tower.scheduler.turn()
                wait_for_grammars(tower)
            found = self._answers[repr(ask)] = Answer.of(tower.channel.outs)
        return found

    def close(self) -> None:
        """Give the plain engine's memory back."""
        if "_plain" in self.__dict__:
            self._plain.parts.worker.close()
            self._plain.memory.close_pool()


class Worlds:
    """Families by name, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, World] = {}

    def of(self, name: str) -> World:
        if name not in self._made:
            self._made[name] = World(name, self.folder)
        return self._made[name]

    def close(self) -> None:
        for world in self._made.values():
            world.close()


def vocabulary() -> VocabularyReq:
    """Tokens that are bytes, and the one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    assert json.loads(made.to_str())["added_tokens"][0]["id"] == END
    return VocabularyReq(made.to_str(), VOCAB, (END,))


def wait_for_grammars(tower: DeviceTower) -> None:
    """Compilations are waited for, not polled."""
    for entry in list(tower.parts.grammars._waiting.values()):
        entry.future.exception()
