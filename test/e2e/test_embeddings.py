"""Pooled models behind real servers and engines: the openai package, replicas, transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

import sglang
from e2e.server_process import ServerProcess, running_server
from sglang.srt.errors import RequestError
from srt.managers.test_engine_encoders import make_encoder
from srt.models.hf_models import VOCAB, make_hf_model, save
from srt.models.pooled_models import hidden_states, save_decoder, write_pooling

TEXTS = ["The capital of France is Paris.", "Rain.", "Seven dwarfs walk home over the hills."]
SHARED_FLAGS = {"dtype": "float32", "kv_memory_budget": "64MiB", "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def embedder() -> Iterator[ServerProcess]:
    """SmolLM2 pooled, in two replicas."""
    flags = ("--is-embedding", "--dp-size", "2", "--dtype", "float32", "--enable-metrics")
    with running_server(*flags, "--kv-memory-budget", "128MiB") as process:
        yield process


@pytest.fixture
def client(embedder: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_vectors_come_in_order_whatever_they_share_a_batch_with(client: openai.OpenAI) -> None:
    together = client.embeddings.create(model="m", input=TEXTS * 3)
    assert [one.index for one in together.data] == list(range(9))
    for text, one, again in zip(TEXTS, together.data, together.data[3:], strict=False):
        alone = client.embeddings.create(model="m", input=text).data[0].embedding
        assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(one.embedding, alone, atol=1e-4)
        np.testing.assert_allclose(again.embedding, alone, atol=1e-4)
    first, second = (np.array(one.embedding) for one in together.data[:2])
    assert first @ second < 0.999


def test_dimensions_and_ids(client: openai.OpenAI, embedder: ServerProcess) -> None:
    whole = np.array(client.embeddings.create(model="m", input=TEXTS[0]).data[0].embedding)
    cut = client.embeddings.create(model="m", input=TEXTS[0], dimensions=32).data[0].embedding
    np.testing.assert_allclose(cut, whole[:32] / np.linalg.norm(whole[:32]), atol=1e-5)
    ids = embedder.post("/tokenize", {"prompt": TEXTS[0]}).json()["tokens"]
    by_ids = client.embeddings.create(model="m", input=ids)
    np.testing.assert_allclose(by_ids.data[0].embedding, whole, atol=1e-4)
    assert by_ids.usage.prompt_tokens == len(ids)


def test_both_replicas_take_part_and_nothing_stays(embedder: ServerProcess) -> None:
    for rank in (0, 1):
        reply = embedder.post("/encode", {"text": TEXTS, "routed_dp_rank": rank}).json()
        assert {one["meta_info"]["dp_rank"] for one in reply} == {rank}
    states = embedder.get("/server_info").json()["internal_states"]
    assert [state["memory"]["pages"]["used"] for state in states] == [0, 0]
    assert "sglang:prompt_tokens_total" in embedder.get("/metrics").text


def test_chats_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not generate text here"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])


def test_scores_are_what_generate_says(server: ServerProcess) -> None:
    query, items = "The capital of France is", [" the city of", " a town called"]
    labels = [7042, 260, 3]
    body = {"query": query, "items": items, "label_token_ids": labels}
    scores = server.post("/v1/score", body).json()["scores"]
    for item, found in zip(items, scores, strict=True):
        reply = server.post(
            "/generate",
            {
                "text": query + item,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "token_ids_logprob": labels,
            },
        ).json()
        (entries,) = reply["meta_info"]["output_token_ids_logprobs"]
        np.testing.assert_allclose(found, np.exp([entry[0] for entry in entries]), rtol=1e-3)
    shares = server.post("/v1/score", {**body, "apply_softmax": True}).json()["scores"]
    np.testing.assert_allclose(shares, scores / np.sum(scores, 1, keepdims=True), rtol=1e-3)


def test_an_engine_pools_as_transformers_does(tmp_path: Path) -> None:
    reference = make_hf_model("qwen3")
    path = save_decoder(reference, tmp_path)
    write_pooling(tmp_path, "pooling_mode_mean_tokens")
    prompts = [list(range(1, 40)), [5], [9, 8, 7]]
    with sglang.Engine(model_path=path, **SHARED_FLAGS) as engine:
        answers = engine.encode(input_ids=prompts)
        one = engine.encode(input_ids=prompts[2], dimensions=8)
        with pytest.raises(RequestError, match="does not generate text here"):
            engine.generate(input_ids=[1])
    for prompt, answer in zip(prompts, answers, strict=True):
        mean = hidden_states(reference, prompt).mean(0)
        np.testing.assert_allclose(answer["embedding"], mean / mean.norm(), atol=1e-5)
    assert len(one["embedding"]) == 8


def test_an_engine_scores_as_transformers_does(tmp_path: Path) -> None:
    reference = make_hf_model("llama")
    path = save(reference, tmp_path)
    query, items, labels = [3, 4, 5], [[6], [7, 8]], [0, 9, VOCAB - 1]
    with sglang.Engine(model_path=path, **SHARED_FLAGS) as engine:
        scores = engine.score(query, items, labels)
        swapped = engine.score(query, items, labels, item_first=True)
        with pytest.raises(RequestError, match="--is-embedding"):
            engine.encode(input_ids=[1])
    for found, prompts in (
        (scores, [query + item for item in items]),
        (swapped, [item + query for item in items]),
    ):
        for row, prompt in zip(found, prompts, strict=True):
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt])).logits[0, -1]
            np.testing.assert_allclose(row, logits.softmax(-1)[labels], rtol=1e-4)


def test_a_cross_encoder_orders_documents_as_transformers_does(tmp_path: Path) -> None:
    reference = make_encoder("bert", num_labels=1)
    path = save(reference, tmp_path)
    words = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "?", "red", "blue"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    hf.save_pretrained(path)
    query, documents = "red ?", ["blue blue", "red", "blue red ? red", "?"]
    encoded = [hf(query, document, return_token_type_ids=True) for document in documents]
    with torch.inference_mode():
        wanted = [
            float(
                reference(
                    torch.tensor([one["input_ids"]]),
                    token_type_ids=torch.tensor([one["token_type_ids"]]),
                ).logits
            )
            for one in encoded
        ]
    order = sorted(range(4), key=lambda index: -wanted[index])
    with running_server("--model-path", path, "--dtype", "float32") as process:
        ranked = process.post("/v1/rerank", {"query": query, "documents": documents}).json()
        assert process.get("/model_info").json()["is_generation"] is False
    assert [one["index"] for one in ranked] == order
    scores = [one["score"] for one in ranked]
    np.testing.assert_allclose(scores, [wanted[index] for index in order], atol=1e-5)
    assert [one["document"] for one in ranked] == [documents[index] for index in order]
