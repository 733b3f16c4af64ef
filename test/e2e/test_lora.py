"""A server with LoRA adapters: mixed requests, loading and unloading while requests run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.server_process import ServerProcess, running_server
from srt.models.hf_models import best_next, hf_greedy, make_hf_model, save
from srt.models.lora_adapters import make_factors, merged, save_adapter

PROMPT = [5, 9, 2, 77, 31, 8, 100, 63]
LONG = 400  # tokens of an answer that is still under way when the next request comes


class Model:
    """A base model, two adapters with their directories, and what each answers."""

    def __init__(self, folder: Path) -> None:
        base = make_hf_model("llama", max_position_embeddings=1024)
        self.path = save(base, folder / "base")
        factors = [make_factors(base, rank=4, seed=seed) for seed in (1, 2)]
        self.paths = [
            save_adapter(folder / f"adapter{seed}", one) for seed, one in enumerate(factors, 1)
        ]
        self.models = [base, *(merged(base, one) for one in factors)]

    def answer(self, adapter: int, num_new: int) -> list[int]:
        return hf_greedy(self.models[adapter], PROMPT, num_new)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("lora"))


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one rank", "two ranks"],
)
def server(request: pytest.FixtureRequest, model: Model) -> Iterator[ServerProcess]:
    flags = ("--model-path", model.path, "--dtype", "float32", "--skip-tokenizer-init")
    flags += ("--kv-memory-budget", "64MiB", "--cpu-threads", "1", "--tp-size", str(request.param))
    flags += ("--lora-paths", f"one={model.paths[0]}", "--max-loras-per-batch", "2")
    with running_server(*flags, "--served-model-name", "base") as one:
        yield one


def ask(server: ServerProcess, adapter: Any, num_new: int = 12, **fields: Any) -> httpx.Response:
    params = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "lora_path": adapter, **fields}
    return server.post("/generate", body)


def test_a_batch_mixes_adapters(server: ServerProcess, model: Model) -> None:
    reply = ask(server, ["one", None, "one"], input_ids=[PROMPT] * 3)
    assert reply.status_code == 200, reply.text
    found = [one["output_ids"] for one in reply.json()]
    assert found == [model.answer(adapter, 12) for adapter in (1, 0, 1)]
    params = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    text = [
        server.post("/v1/completions", {"model": name, **params}).json()["usage"]
        for name in ("base:one", "base")
    ]
    assert [one["completion_tokens"] for one in text] == [12, 12]


def test_a_bad_adapter_leaves_the_server_as_it_was(server: ServerProcess, model: Model) -> None:
    reply = server.post("/load_lora_adapter", {"lora_name": "x", "lora_path": "/no/such"})
    assert reply.status_code == 400
    text = "/no/such is no directory (adapters are local, nothing is downloaded)"
    assert reply.json() == {
        "success": False,
        "error_message": text,
        "loaded_adapters": {"one": model.paths[0]},
    }
    reply = ask(server, "x")
    assert reply.status_code == 400
    assert "The LoRA adapter 'x' is not loaded" in reply.json()["error"]["message"]
    assert ask(server, "one").json()["output_ids"] == model.answer(1, 12)


def test_loading_and_unloading_under_running_requests(server: ServerProcess, model: Model) -> None:
    """A name that is loaded anew is its new adapter, while the old one ends its requests."""
    with ThreadPoolExecutor(4) as pool:
        began = threading.Event()
        long = pool.submit(stream, server, "one", began)
        assert began.wait(60)
        unload: Future[httpx.Response] = pool.submit(
            server.post, "/unload_lora_adapter", {"lora_name": "one"}
        )
        while ask(server, "one", 1).status_code == 200:
            pass  # the unloading has not been taken up yet
        loaded = server.post(
            "/load_lora_adapter", {"lora_name": "one", "lora_path": model.paths[1]}
        )
        assert loaded.status_code == 200, loaded.text
        assert loaded.json()["loaded_adapters"] == {"one": model.paths[1]}
        reply = ask(server, "one").json()
        assert reply["output_ids"] == model.answer(2, 12)
        assert reply["meta_info"]["cached_tokens"] == 0
        answer = long.result()
        assert best_next(model.models[1], PROMPT, answer) == answer
        assert len(answer) == LONG
        done = unload.result()
        assert (done.status_code, done.json()["success"]) == (200, True)
    cards = server.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("one", "base")]
    back = {"lora_name": "old", "lora_path": model.paths[0]}
    assert server.post("/load_lora_adapter", back).status_code == 200
    reply = ask(server, ["old", "one", None], input_ids=[PROMPT] * 3)
    found = [one["output_ids"] for one in reply.json()]
    assert found == [model.answer(adapter, 12) for adapter in (1, 2, 0)]


def stream(server: ServerProcess, adapter: str, began: threading.Event) -> list[int]:
    """The whole answer of a long request; `began` is set with its first token."""
    params = {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "lora_path": adapter, "stream": True}
    last: list[int] = []
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))["output_ids"]
                began.set()
    return last
