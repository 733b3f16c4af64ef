"""Vectors, classes, orders and scores over a real socket: shapes, order, and every refusal."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from sglang.srt.managers.io_struct import FinishReason, PoolingSpec
from srt.entrypoints.fake_service import LiveServer, ids_of, pooled_vector

SIZE = 16


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("model"), is_embedding=True) as server:
        yield server


def classifier_server(folder: Any, **names: str) -> LiveServer:
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": names}
    server = LiveServer(folder, config=config)
    server.service.pooled_size = len(names)
    return server


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    names = {"0": "good", "1": "bad", "2": "ugly"}
    with classifier_server(tmp_path_factory.mktemp("model"), **names) as server:
        yield server


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with classifier_server(tmp_path_factory.mktemp("model"), **{"0": "fits"}) as server:
        yield server


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_key_value_heads": 2,
    }
    with LiveServer(tmp_path_factory.mktemp("model"), config=config) as server:
        yield server


def unit(text: str, size: int = SIZE) -> np.ndarray:
    """The normalised vector of a text, which gets a first token."""
    vector = pooled_vector(ids_of("\x01" + text), SIZE)[:size]
    return vector / np.linalg.norm(vector)


# ---- /v1/embeddings


def test_the_openai_package_gets_vectors_in_order(embedder: LiveServer) -> None:
    texts = ["one", "twenty", "x"]
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="x", max_retries=0) as client:
        default = client.embeddings.create(model="tiny", input=texts)  # base64 on the wire
        plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
        short = client.embeddings.create(model="tiny", input="one", dimensions=4, user="me")
    assert [one.index for one in default.data] == [0, 1, 2]
    assert default.model == "tiny"
    for text, one, other in zip(texts, default.data, plain.data, strict=True):
        np.testing.assert_allclose(one.embedding, unit(text), rtol=1e-6)
        np.testing.assert_allclose(other.embedding, unit(text), rtol=1e-6)
    np.testing.assert_allclose(short.data[0].embedding, unit("one", 4), rtol=1e-6)
    assert (default.usage.prompt_tokens, default.usage.total_tokens) == (4 + 7 + 2, 13)


def test_the_reply_has_openais_shape(embedder: LiveServer) -> None:
    body = embedder.post("/v1/embeddings", {"input": "ab", "model": "m"}).json()
    vector = body["data"][0].pop("embedding")
    assert len(vector) == SIZE
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0}],
        "model": "m",
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "total_tokens": 3,
            "reasoning_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def test_base64_is_little_endian_float32(embedder: LiveServer) -> None:
    body = {"input": "ab", "encoding_format": "base64"}
    text = embedder.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(text), "<f4"), unit("ab"), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "count"), [("ab", 1), (["ab", "c"], 2), ([5, 6, 7], 1), ([[5], [6, 7]], 2)]
)
def test_all_forms_of_input(embedder: LiveServer, given: Any, count: int) -> None:
    embedder.service.requests.clear()
    reply = embedder.post("/v1/embeddings", {"input": given, "priority": 3, "cache_salt": "s"})
    assert len(reply.json()["data"]) == count
    requests = sorted(embedder.service.requests, key=lambda one: one.rid)
    assert len(requests) == count
    for request in requests:
        assert request.pooling == PoolingSpec("last")
        assert (request.priority, request.extra_key) == (3, "1:s")
        assert request.sampling_params.max_new_tokens == 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "'input'"),
        ({"input": ""}, "a prompt is empty"),
        ({"input": ["a", ""]}, "a prompt is empty"),
        ({"input": []}, "'input'"),
        ({"input": {"text": "x"}}, "'input'"),
        ({"input": [1, "a"]}, "'input'"),
        ({"input": [9999]}, "9999"),
        ({"input": "a", "dimensions": 17}, "[1, 16], the model's, got 17"),
        ({"input": "a", "dimensions": 0}, "'dimensions'"),
        ({"input": "a", "encoding_format": "hex"}, "'encoding_format'"),
        ({"input": "a", "lora_path": "x"}, "'lora_path'"),
        ({"input": "a", "rid": ""}, "'rid'"),
        ({"input": "a" * 512}, "(513 tokens) is longer than the model's context length (512"),
    ],
)
def test_mistakes_are_told_in_openais_shape(
    embedder: LiveServer, body: dict[str, Any], told: str
) -> None:
    reply = embedder.post("/v1/embeddings", body)
    assert reply.status_code == 400
    error = reply.json()
    assert (error["object"], error["code"], error["param"]) == ("error", 400, None)
    assert told in error["message"]


def test_a_prompt_may_fill_the_context(embedder: LiveServer) -> None:
    reply = embedder.post("/v1/embeddings", {"input": "a" * 511})
    assert reply.json()["usage"]["prompt_tokens"] == 512


def test_an_engines_abort_is_the_whole_calls_error(embedder: LiveServer) -> None:
    full = FinishReason("abort", message="The request queue is full.", status_code=503)
    embedder.service.refusals["busy"] = full
    reply = embedder.post("/v1/embeddings", {"input": ["a", "b"], "rid": "busy"})
    assert (reply.status_code, reply.json()["message"]) == (503, "The request queue is full.")
    embedder.service.refusals["gone"] = FinishReason("abort", status_code=499)
    assert embedder.post("/v1/embeddings", {"input": "a", "rid": "gone"}).status_code == 499


def test_what_is_no_number_is_an_error(
    embedder: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "srt.entrypoints.fake_service.pooled_vector",
        lambda ids, size: np.full(size, math.nan, np.float32),
    )
    reply = embedder.post("/v1/embeddings", {"input": "a"})
    assert reply.status_code == 500
    assert "not finite numbers" in reply.json()["message"]


# ---- /encode


def test_encode_answers_natively(embedder: LiveServer) -> None:
    reply = embedder.post("/encode", {"text": "ab", "rid": "r", "sampling_params": {}}).json()
    np.testing.assert_allclose(reply["embedding"], unit("ab"), rtol=1e-6)
    info = reply["meta_info"]
    assert info["id"] == "r"
    assert info["finish_reason"] == {"type": "length", "length": 0}
    assert (info["prompt_tokens"], info["completion_tokens"]) == (3, 0)
    assert info["e2e_latency"] > 0


def test_encode_takes_batches_ids_and_dimensions(embedder: LiveServer) -> None:
    replies = embedder.post("/encode", {"text": ["a", "bc"], "dimensions": 3}).json()
    for text, reply in zip(["a", "bc"], replies, strict=True):
        np.testing.assert_allclose(reply["embedding"], unit(text, 3), rtol=1e-6)
    ids = embedder.request("PUT", "/encode", json={"input_ids": [[5, 6]]}).json()
    assert [one["meta_info"]["prompt_tokens"] for one in ids] == [2]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "exactly one"),
        ({"text": "a", "dimensions": 99}, "dimensions"),
        ({"text": "a", "stream": True}, "Unknown field 'stream'"),
        ({"text": "a", "image_data": "x"}, "image_data"),
    ],
)
def test_encodes_mistakes_have_the_native_shape(
    embedder: LiveServer, body: dict[str, Any], told: str
) -> None:
    reply = embedder.post("/encode", body)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


# ---- the wrong kind of model


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ],
)
def test_a_pooled_model_writes_nothing(
    embedder: LiveServer, path: str, body: dict[str, Any]
) -> None:
    embedder.service.requests.clear()
    reply = embedder.post(path, body)
    assert reply.status_code == 400
    assert "The model does not generate text here" in reply.text
    assert embedder.service.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/encode", {"text": "a"}),
        ("/classify", {"text": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/classify", {"input": "a"}),
    ],
)
def test_a_model_that_writes_has_no_vectors(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400
    assert "--is-embedding" in reply.text
    assert server.service.requests == []


def test_model_info_and_health(embedder: LiveServer, server: LiveServer) -> None:
    assert embedder.request("GET", "/model_info").json()["is_generation"] is False
    assert server.request("GET", "/model_info").json()["is_generation"] is True
    embedder.service.requests.clear()
    assert embedder.request("GET", "/health_generate").status_code == 200
    (probe,) = embedder.service.requests
    assert (probe.pooling, probe.sampling_params.max_new_tokens) == (PoolingSpec("last"), 0)


# ---- /v1/classify


def test_classes_and_probabilities(classifier: LiveServer) -> None:
    body = classifier.post("/v1/classify", {"input": ["a", "b"], "model": "m", "rid": "7"}).json()
    logits = pooled_vector(ids_of("\x01a"), 3).astype(float)
    probs = np.exp(logits) / np.exp(logits).sum()
    first = body["data"][0]
    np.testing.assert_allclose(first.pop("probs"), probs, rtol=1e-6)
    assert first == {"index": 0, "label": "ugly", "num_classes": 3}
    assert body["data"][1]["index"] == 1
    assert (body["id"], body["object"], body["model"]) == ("classify-7", "list", "m")
    assert body["created"] > 0
    assert body["usage"]["prompt_tokens"] == 4


def test_one_label_is_a_probability_of_its_own(reranker: LiveServer) -> None:
    data = reranker.post("/v1/classify", {"input": "a"}).json()["data"][0]
    logit = float(pooled_vector(ids_of("\x01a"), 1)[0])
    assert data["label"] == "fits"
    assert data["probs"] == [pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)]


def test_a_classifiers_vector_is_its_logits(classifier: LiveServer) -> None:
    for path in ("/encode", "/classify"):
        reply = classifier.post(path, {"text": "a"}).json()
        assert reply["embedding"] == pooled_vector(ids_of("\x01a"), 3).tolist()


def test_an_embedder_has_no_classes(embedder: LiveServer) -> None:
    reply = embedder.post("/v1/classify", {"input": "a"})
    assert reply.status_code == 400
    assert "needs a sequence classifier" in reply.json()["message"]


# ---- /v1/rerank


DOCUMENTS = ["aa", "b", "cde", "b"]


def logit_of(document: str) -> float:
    return float(pooled_vector(ids_of(f"\x01q\x02{document}"), 1)[0])


def test_a_cross_encoder_orders_documents(reranker: LiveServer) -> None:
    body = {"query": "q", "documents": DOCUMENTS}
    ranked = reranker.post("/v1/rerank", body).json()
    order = sorted(range(4), key=lambda i: -logit_of(DOCUMENTS[i]))
    assert [one["index"] for one in ranked] == order
    assert [one["score"] for one in ranked] == [logit_of(DOCUMENTS[i]) for i in order]
    assert [one["document"] for one in ranked] == [DOCUMENTS[i] for i in order]
    assert ranked[0]["meta_info"]["prompt_tokens"] == 3 + len(DOCUMENTS[order[0]])
    starts = {one.pooling for one in reranker.service.requests if one.rid.endswith("_0")}
    assert starts == {PoolingSpec("last", second_from=3)}
    top = reranker.request(
        "PUT", "/v1/rerank", json={**body, "top_n": 2, "return_documents": False}
    ).json()
    assert [one["index"] for one in top] == order[:2]
    assert [one["document"] for one in top] == [None, None]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"documents": ["a"]}, "'query'"),
        ({"query": "q"}, "'documents'"),
        ({"query": "q", "documents": ["a", ""]}, "a document is empty"),
        ({"query": "q", "documents": "a"}, "'documents'"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "'top_n'"),
        ({"query": "q", "documents": ["a"], "instruct": "x"}, "'instruct'"),
    ],
)
def test_reranks_mistakes(reranker: LiveServer, body: dict[str, Any], told: str) -> None:
    reply = reranker.post("/v1/rerank", body)
    assert (reply.status_code, reply.json()["object"]) == (400, "error")
    assert told in reply.json()["message"]


def test_other_models_do_not_rank(
    embedder: LiveServer, classifier: LiveServer, server: LiveServer
) -> None:
    for one in (embedder, classifier, server):
        reply = one.post("/v1/rerank", {"query": "q", "documents": ["a"]})
        assert reply.status_code == 400
        assert "The model does not rank" in reply.json()["message"]


def test_qwen3_reranker_is_asked(qwen: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tokenize(text: str, add_special_tokens: bool = True) -> np.ndarray:
        words = {"yes": [121], "no": [110]}
        return np.array(words.get(text, [ord(c) for c in text]), np.int32)

    monkeypatch.setattr(qwen.service, "tokenize", tokenize)
    qwen.service.requests.clear()
    body = {"query": "Where?", "documents": ["Here {x}", "b"], "instruct": "Look"}
    ranked = qwen.post("/v1/rerank", body).json()
    assert [(one["index"], one["score"]) for one in ranked] == [(0, 0.5), (1, 0.5)]
    request = min(qwen.service.requests, key=lambda one: one.rid)
    assert request.text == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
        'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
        "<|im_end|>\n<|im_start|>user\n<Instruct>: Look\n<Query>: Where?\n"
        "<Document>: Here {x}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert not request.add_special_tokens
    assert request.token_ids_logprob == (121, 110)
    assert request.sampling_params.max_new_tokens == 1


def test_a_vocabulary_without_the_answers_does_not_rank(qwen: LiveServer) -> None:
    reply = qwen.post("/v1/rerank", {"query": "q", "documents": ["a"]})
    assert reply.status_code == 400
    assert "or Qwen3-Reranker" in reply.json()["message"]


# ---- /v1/score


def test_scores_are_probabilities_of_the_labels(server: LiveServer) -> None:
    body = {"query": "Is it? ", "items": ["yes", "no"], "label_token_ids": [5, 6, 7], "model": "m"}
    reply = server.post("/v1/score", body).json()
    want = [pytest.approx(math.exp(-2.5))] * 3
    assert reply == {
        "object": "scoring",
        "scores": [want, want],
        "model": "m",
        "usage": {
            "prompt_tokens": 11 + 10,
            "completion_tokens": 0,
            "total_tokens": 21,
            "reasoning_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    sent = sorted(server.service.requests, key=lambda one: one.rid)
    assert [one.text for one in sent] == ["Is it? yes", "Is it? no"]
    assert {(one.return_logprob, one.sampling_params.max_new_tokens) for one in sent} == {(True, 1)}


def test_softmax_items_first_and_ids(server: LiveServer) -> None:
    body = {"query": "b", "items": "a", "label_token_ids": [5, 6], "item_first": True}
    reply = server.post("/v1/score", {**body, "apply_softmax": True}).json()
    assert reply["scores"] == [[0.5, 0.5]]
    assert server.service.requests[0].text == "ab"
    server.service.requests.clear()
    ids = {"query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [5]}
    assert len(server.post("/v1/score", ids).json()["scores"]) == 2
    sent = sorted(server.service.requests, key=lambda one: one.rid)
    prompts = [one.input_ids.tolist() for one in sent if one.input_ids is not None]
    assert prompts == [[5, 6, 7], [5, 6, 8, 9]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label_token_ids": []}, "'label_token_ids'"),
        ({"label_token_ids": [4096]}, "4096 is not one of the 4096 ids"),
        ({"label_token_ids": [-1]}, "'label_token_ids'"),
        ({"items": []}, "'items'"),
        ({"items": [[5]]}, "both text or both token ids"),
        ({"query": [5]}, "both text or both token ids"),
        ({"query": "", "items": [""]}, "a prompt is empty"),
        ({"query": [5], "items": [[1 << 40]]}, "no token ids"),
        ({"query": [5], "items": [[9999]]}, "query and items[0][1] is 9999"),
        ({"query": {"a": 1}}, "'query'"),
    ],
)
def test_scores_mistakes(server: LiveServer, changes: dict[str, Any], told: str) -> None:
    body = {"query": "q", "items": ["a"], "label_token_ids": [5], **changes}
    reply = server.post("/v1/score", body)
    assert reply.status_code == 400
    assert told in reply.json()["message"]
