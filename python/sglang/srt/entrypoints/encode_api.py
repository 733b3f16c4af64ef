"""/encode: SGLang's native API of vectors, from the fields to the reply; the Engine's, too."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.generate_api import meta_info
from sglang.srt.entrypoints.generate_request_body import (
    MULTIMODAL,
    POOLED_IMAGES,
    POOLED_LORA,
    RAW_NULL,
    GenerateCall,
    read_generate,
)
from sglang.srt.entrypoints.pooled_calls import PooledCalls
from sglang.srt.entrypoints.request_body import Fields
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal
from sglang.srt.entrypoints.token_id_reader import IdLists

_NO_NEW_TOKENS = msgspec.Raw(b'{"max_new_tokens": 0}')


class EncodeBody(msgspec.Struct, frozen=True):
    """The served fields of /encode; all but `dimensions` as those of /generate."""

    text: msgspec.Raw | str | IdLists = RAW_NULL
    input_ids: msgspec.Raw | str | IdLists = RAW_NULL
    rid: msgspec.Raw | str | IdLists = RAW_NULL
    extra_key: msgspec.Raw | str | IdLists = RAW_NULL
    cache_salt: msgspec.Raw | str | IdLists = RAW_NULL
    priority: msgspec.Raw | str | IdLists = RAW_NULL
    routed_dp_rank: msgspec.Raw | str | IdLists = RAW_NULL
    data_parallel_rank: msgspec.Raw | str | IdLists = RAW_NULL
    dimensions: Int | None = None


ENCODE_FIELDS = FieldTable(
    EncodeBody,
    accepted=(
        "model",
        "sampling_params",  # clients of SGLang send them; nothing is sampled
        "log_metrics",
        "external_trace_header",
        "received_time",
    ),
    refused={
        "input_embeds": Refusal("input embeddings are not served", ([],)),
        "image_data": POOLED_IMAGES,
        "video_data": MULTIMODAL,
        "audio_data": MULTIMODAL,
        "modalities": Refusal("pooled models take text only", ([], ["text"])),
        "lora_path": POOLED_LORA,
        "is_cross_encoder_request": Refusal("use /v1/rerank", (False,)),
    },
    refuse_unknown=True,
)


@dataclass(frozen=True)
class EncodeCall:
    """A read request; `dimensions` None: all that the model gives."""

    generate: GenerateCall
    dimensions: int | None


def read_encode(fields: Fields) -> EncodeCall:
    """Read and check the fields; RequestError 400 naming the first that cannot be served."""
    body = ENCODE_FIELDS.read(fields)
    shared = ENCODE_FIELDS.served - {"dimensions"}
    passed = {name: value for name, value in fields.items() if name in shared}
    call = read_generate({**passed, "sampling_params": _NO_NEW_TOKENS})
    return EncodeCall(call, body.dimensions)


class EncodeServer:
    """Serves read /encode requests; without state of its own."""

    def __init__(self, calls: PooledCalls, weight_version: str) -> None:
        self._calls = calls
        self._weight_version = weight_version

    async def reply(self, request: EncodeCall) -> dict[str, Any] | list[dict[str, Any]]:
        """The whole answer; a list for a batch. Raises RequestError."""
        began = time.monotonic()
        call = request.generate.call
        answers = await self._calls.run(call, request.dimensions)
        seconds = time.monotonic() - began
        results = [
            {
                "embedding": answer.vector,
                "meta_info": meta_info(rid, answer.last, seconds, self._weight_version, 0),
            }
            for rid, answer in zip(call.sequence_rids, answers, strict=True)
        ]
        return results if request.generate.replies_with_list else results[0]
