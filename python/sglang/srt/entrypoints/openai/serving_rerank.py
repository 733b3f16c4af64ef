"""/v1/score and /v1/rerank: how likely tokens are after prompts, and documents by relevance.

A score is the probability of a token right after a prompt: the prompts are computed, and their
last row is sampled from once, which brings the log probabilities. Documents are ordered by what a
cross-encoder with one label says of each pair, or by how Qwen3-Reranker answers its question.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.entrypoints.generate_api import meta_info
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.model_kind import ModelKind
from sglang.srt.entrypoints.openai.pooling_fields import RerankBody, ScoreBody
from sglang.srt.entrypoints.openai.serving_base import UsageCounter, last_of
from sglang.srt.entrypoints.openai.serving_embeddings import rid_of
from sglang.srt.entrypoints.pooled_calls import PooledCalls, prompt_requests
from sglang.srt.entrypoints.sequences import Call, SequenceOutput, SequenceRunner
from sglang.srt.entrypoints.service import TextService
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.io_struct import PoolingSpec
from sglang.srt.managers.request_validation import MAX_PICKED_LOGPROBS, check_ids
from sglang.srt.sampling.sampling_params import SamplingParams

Doubles = npt.NDArray[np.float64]

# The question that Qwen3-Reranker was trained with, as its model card gives it.
_QUESTION = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
_ANSWERS = ("yes", "no")
_RERANKER_TYPE = "qwen3"

# One token is sampled, because sampling it is what its log probabilities come with.
_ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)


class RerankServing:
    """Serves read requests; one for the whole server, without state of its own."""

    def __init__(
        self,
        service: TextService,
        runner: SequenceRunner,
        calls: PooledCalls,
        kind: ModelKind,
        weight_version: str,
    ) -> None:
        self._service = service
        self._runner = runner
        self._calls = calls
        self._kind = kind
        self._weight_version = weight_version

    async def score(self, body: ScoreBody) -> dict[str, Any]:
        """The whole answer of /v1/score. Raises RequestError."""
        self._kind.need_generation()
        vocab_size = self._service.model_config.vocab_size
        labels = _labels(body, vocab_size)
        prompts = _score_prompts(body, vocab_size)
        outputs = await self._after(prompts, labels, body, adds_special_tokens=True)
        usage = UsageCounter(range(len(outputs)), cache_report=False)
        scores = []
        for index, (last, logprobs) in enumerate(outputs):
            usage.note(index, last)
            scores.append(_shares(logprobs) if body.apply_softmax else np.exp(logprobs))
        counted = usage.usage()
        counted["completion_tokens"], counted["total_tokens"] = 0, counted["prompt_tokens"]
        return {"object": "scoring", "scores": scores, "model": body.model, "usage": counted}

    async def rerank(self, body: RerankBody) -> list[dict[str, Any]]:
        """The documents of /v1/rerank, the best first, equals in their order.

        Raises RequestError, 400 for a model that does not rank.
        """
        _check_rerank(body)
        began = time.monotonic()
        ranked = await (self._ask(body) if self._kind.pooling is None else self._judge_pairs(body))
        seconds = time.monotonic() - began
        order = sorted(range(len(ranked)), key=lambda index: -ranked[index][1])
        return [
            {
                "score": ranked[index][1],
                "document": body.documents[index] if body.return_documents else None,
                "index": index,
                "meta_info": meta_info(
                    f"rerank-{index}", ranked[index][0], seconds, self._weight_version, 0
                ),
            }
            for index in order[: body.top_n]
        ]

    async def _judge_pairs(self, body: RerankBody) -> list[tuple[GenerateDelta, float]]:
        """Each document's last news and logit by a cross-encoder."""
        pooling = self._calls.pooling
        if pooling.labels is None or len(pooling.labels) != 1:
            raise RequestError(
                "The model does not rank: /v1/rerank needs a sequence classifier with one label.",
                400,
                "BadRequestError",
            )
        if body.instruct is not None:
            raise bad_field("instruct", "a cross-encoder takes a query and a document alone")
        tokenizer = self._service.tokenizer
        if tokenizer is None:
            raise RequestError("The server has no tokenizer (--skip-tokenizer-init).")
        encode_pair = tokenizer.encode_pair

        def encode_all() -> list[tuple[IdArray, int]]:
            return [encode_pair(body.query, document) for document in body.documents]

        pairs = await asyncio.to_thread(encode_all)
        rid = rid_of(body.rid)
        requests = prompt_requests([ids for ids, _ in pairs], rid, priority=body.priority)
        prompts = tuple(
            replace(request, pooling=PoolingSpec(pooling.mode, pooling.whole, start))
            for request, (_, start) in zip(requests, pairs, strict=True)
        )
        call = Call(rid, prompts)
        answers = await self._calls.run(call)
        return [(answer.last, float(answer.vector[0])) for answer in answers]

    async def _ask(self, body: RerankBody) -> list[tuple[GenerateDelta, float]]:
        """Each document's last news and how sure a causal model is of "yes" over "no"."""
        labels = []
        if self._service.model_config.model_type == _RERANKER_TYPE:
            words = [await self._service.tokenize(word, False) for word in _ANSWERS]
            labels = [int(ids[0]) for ids in words if len(ids) == 1]
        if len(labels) != len(_ANSWERS):
            raise RequestError(
                "The model does not rank: /v1/rerank needs a sequence classifier with one label, "
                "or Qwen3-Reranker.",
                400,
                "BadRequestError",
            )
        prompts = [
            _QUESTION.format(
                instruct=_INSTRUCT if body.instruct is None else body.instruct,
                query=body.query,
                document=document,
            )
            for document in body.documents
        ]
        outputs = await self._after(prompts, labels, body, adds_special_tokens=False)
        return [(last, float(_shares(logprobs)[0])) for last, logprobs in outputs]

    async def _after(
        self,
        prompts: Sequence[str | IdArray],
        labels: Sequence[int],
        body: ScoreBody | RerankBody,
        *,
        adds_special_tokens: bool,
    ) -> list[tuple[GenerateDelta, Doubles]]:
        """Of every prompt its last news and log probabilities [labels] of what comes after it."""
        rid = rid_of(body.rid)
        requests = tuple(
            GenerateRequest(
                rid=rid if len(prompts) == 1 else f"{rid}_{i}",
                text=prompt if isinstance(prompt, str) else None,
                input_ids=None if isinstance(prompt, str) else prompt,
                sampling_params=_ONE_TOKEN,
                stream=False,
                return_logprob=True,
                token_ids_logprob=tuple(labels),
                priority=body.priority,
                add_special_tokens=adds_special_tokens,
            )
            for i, prompt in enumerate(prompts)
        )
        outputs = await self._runner.collect(Call(rid, requests))
        return [(last_of(output), _picked(output)) for output in outputs]


def _picked(output: SequenceOutput) -> Doubles:
    found = output.output_logprobs
    if found is None or found.num_rows == 0:
        raise RequestError("The request was aborted and has no answer.", 499)
    logprobs = np.frombuffer(found.picked_logprobs, "<f4")[: len(found.picked_ids) // 4]
    return logprobs.astype(np.float64)


def _shares(logprobs: Doubles) -> Doubles:
    """The labels' probabilities with respect to each other; equal where all are impossible."""
    highest = logprobs.max()
    if highest == -np.inf:
        return np.full_like(logprobs, 1 / len(logprobs))
    shares: Doubles = np.exp(logprobs - highest)
    shares /= shares.sum()
    return shares


def _labels(body: ScoreBody, vocab_size: int) -> list[int]:
    labels = body.label_token_ids
    if not 1 <= len(labels) <= MAX_PICKED_LOGPROBS:
        raise bad_field(
            "label_token_ids", f"it must name 1 to {MAX_PICKED_LOGPROBS} ids, got {len(labels)}"
        )
    for label in labels:
        if not 0 <= label < vocab_size:
            raise bad_field("label_token_ids", f"{label} is not one of the {vocab_size} ids")
    return labels


def _score_prompts(body: ScoreBody, vocab_size: int) -> list[str | IdArray]:
    """The query and each item as one prompt, in the order that is wanted."""
    items: Sequence[str | list[int]] = [body.items] if isinstance(body.items, str) else body.items
    if not items:
        raise bad_field("items", "there are none")
    prompts: list[str | IdArray] = []
    for number, item in enumerate(items):
        if isinstance(body.query, str) and isinstance(item, str):
            text = item + body.query if body.item_first else body.query + item
            if not text:
                raise bad_field("items", "a prompt is empty")
            prompts.append(text)
        elif not isinstance(body.query, str) and not isinstance(item, str):
            joined = item + body.query if body.item_first else body.query + item
            if joined and not -(1 << 31) <= min(joined) <= max(joined) < 1 << 31:
                raise bad_field("items", f"item {number} or the query has no token ids")
            ids = np.array(joined, np.int32)
            check_ids(ids, vocab_size, f"query and items[{number}]")
            prompts.append(ids)
        else:
            raise bad_field("items", "the query and the items must be both text or both token ids")
    return prompts


def _check_rerank(body: RerankBody) -> None:
    if not body.query:
        raise bad_field("query", "it is missing or empty")
    if not body.documents:
        raise bad_field("documents", "there are none")
    if not all(body.documents):
        raise bad_field("documents", "a document is empty")
    if body.top_n is not None and body.top_n < 1:
        raise bad_field("top_n", f"it must be at least 1, got {body.top_n}")
