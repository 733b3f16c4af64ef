"""/v1/embeddings and /v1/classify: prompts as text or ids, one vector or class for each."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.entrypoints.generate_request_body import new_rid, prefix_key
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.pooling_fields import ClassifyBody, EmbeddingBody
from sglang.srt.entrypoints.openai.serving_base import UsageCounter
from sglang.srt.entrypoints.pooled_calls import (
    PooledAnswer,
    PooledCalls,
    Vector,
    check_dimensions,
    prompt_requests,
)
from sglang.srt.entrypoints.sequences import Call
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray


class EmbeddingServing:
    """Serves read requests; one for the whole server, without state of its own."""

    def __init__(self, calls: PooledCalls, cache_report: bool) -> None:
        self._calls = calls
        self._cache_report = cache_report

    async def embeddings(
        self, body: EmbeddingBody, prompts: Sequence[str | IdArray]
    ) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        check_dimensions(body.dimensions, self._calls.pooling)
        rid, call = _call(body, prompts)
        del rid
        answers = await self._calls.run(call, body.dimensions)
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "embedding": _encoded(answer.vector, body.encoding_format),
                    "index": index,
                }
                for index, answer in enumerate(answers)
            ],
            "model": body.model,
            "usage": usage_of(answers, self._cache_report),
        }

    async def classify(
        self, body: ClassifyBody, prompts: Sequence[str | IdArray]
    ) -> dict[str, Any]:
        """The whole answer. Raises RequestError, 400 for a model without classes."""
        pooling = self._calls.pooling
        if pooling.labels is None:
            raise RequestError(
                "The model has no classes: /v1/classify needs a sequence classifier.",
                400,
                "BadRequestError",
            )
        rid, call = _call(body, prompts)
        answers = await self._calls.run(call)
        data = []
        for index, answer in enumerate(answers):
            probs = probabilities(answer.vector, pooling)
            data.append(
                {
                    "index": index,
                    "label": pooling.labels[int(probs.argmax())],
                    "probs": probs,
                    "num_classes": len(probs),
                }
            )
        return {
            "id": f"classify-{rid}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": usage_of(answers, self._cache_report),
        }


def probabilities(logits: Vector, pooling: PoolingConfig) -> Vector:
    """Of a classifier's logits [d]: of labels that exclude each other, or of each by itself."""
    wide = logits.astype(np.float64)
    if pooling.independent_labels:
        # Of two equal forms the one whose exponential does not overflow.
        small = np.exp(-np.abs(wide))
        each: Vector = np.where(wide >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
        return each
    shares = np.exp(wide - wide.max())
    together: Vector = (shares / shares.sum()).astype(np.float32)
    return together


def usage_of(answers: Sequence[PooledAnswer], cache_report: bool) -> dict[str, Any]:
    """OpenAI's usage object of prompts that nothing was generated for."""
    usage = UsageCounter(range(len(answers)), cache_report)
    for index, answer in enumerate(answers):
        usage.note(index, answer.last)
    return usage.usage()


def _call(body: ClassifyBody, prompts: Sequence[str | IdArray]) -> tuple[str, Call]:
    """The call's id, and the call."""
    rid = rid_of(body.rid)
    requests = prompt_requests(
        prompts,
        rid,
        priority=body.priority,
        extra_key=prefix_key(body.extra_key, body.cache_salt),
    )
    return rid, Call(rid, requests)


def rid_of(rid: str | None) -> str:
    """The client's id for its call, or a new one; RequestError 400 for an empty one."""
    if rid == "":
        raise bad_field("rid", "it is empty")
    return rid or new_rid()


def _encoded(vector: Vector, encoding_format: str) -> Vector | str:
    if encoding_format == "float":
        return vector
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
