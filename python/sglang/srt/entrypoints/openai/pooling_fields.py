"""The requests for vectors, classes, orders and scores: which fields are served and refused.

/v1/embeddings is OpenAI's, the others are SGLang's. Fields that neither knows are ignored, as at
the other OpenAI endpoints.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang.srt.entrypoints.generate_request_body import POOLED_IMAGES, POOLED_LORA, RAW_NULL
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal
from sglang.srt.entrypoints.token_id_reader import IdLists


class PoolingBody(msgspec.Struct, frozen=True, kw_only=True):
    """What all of them serve."""

    model: str = "default"
    rid: str | None = None
    priority: Int | None = None


class ClassifyBody(PoolingBody, frozen=True, kw_only=True):
    """The served fields of /v1/classify."""

    input: msgspec.Raw | str | IdLists = RAW_NULL
    extra_key: str | None = None
    cache_salt: str | None = None


class EmbeddingBody(ClassifyBody, frozen=True, kw_only=True):
    """The served fields of /v1/embeddings; `dimensions` None: all that the model gives."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = None


class RerankBody(PoolingBody, frozen=True, kw_only=True):
    """The served fields of /v1/rerank; `top_n` None: all documents come back."""

    query: str = ""
    documents: list[str] = []
    top_n: Int | None = None
    return_documents: bool = True
    instruct: str | None = None


class ScoreBody(PoolingBody, frozen=True, kw_only=True):
    """The served fields of /v1/score: `query` and `items` are both text or both token ids."""

    query: str | list[Int] = ""
    items: str | list[str | list[Int]] = []
    label_token_ids: list[Int] = []
    apply_softmax: bool = False
    item_first: bool = False


_ACCEPTED = ("user", "no_logs", "custom_labels")
_REFUSED = {
    "lora_path": POOLED_LORA,
    "image_data": POOLED_IMAGES,
    "routed_dp_rank": Refusal("send it to /encode"),
    "data_parallel_rank": Refusal("send it to /encode"),
}

EMBEDDING_FIELDS = FieldTable(
    EmbeddingBody,
    accepted=_ACCEPTED,
    refused={**_REFUSED, "input_type": Refusal("put what tells queries from texts into the input")},
    refuse_unknown=False,
)
CLASSIFY_FIELDS = FieldTable(
    ClassifyBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=False
)
RERANK_FIELDS = FieldTable(RerankBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=False)
SCORE_FIELDS = FieldTable(ScoreBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=False)
