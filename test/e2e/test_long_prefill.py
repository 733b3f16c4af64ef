"""A prompt that takes minutes: the server stays healthy and others are served meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from e2e.server_process import running_server, wait_until

CONTEXT = 1_100_000


def tiny_model(folder: Path) -> str:
    """A two-layer Llama with one narrow head: long prompts are all attention."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("num_tokens", "health_s"),
    [
        # Beside other tests only the order of answers tells something, and not how long one takes.
        (60_000, 60.0),
        pytest.param(1_000_000, 1.0, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_health_and_others_while_a_long_prompt_is_computed(
    tmp_path: Path, num_tokens: int, health_s: float
) -> None:
    with running_server(
        "--model-path",
        tiny_model(tmp_path),
        "--load-format",
        "dummy",
        "--skip-tokenizer-init",
        "--watchdog-timeout",
        "30",
    ) as server:
        ids = np.random.default_rng(0).integers(3, 512, num_tokens).tolist()
        answer: dict[str, Any] = {}

        def ask() -> None:
            reply = httpx.post(
                f"{server.url}/generate",
                json={"input_ids": ids, "sampling_params": {"max_new_tokens": 2}},
                timeout=3600,
            )
            answer["status"], answer["body"] = reply.status_code, reply.json()

        asking = threading.Thread(target=ask)
        asking.start()
        assert wait_until(lambda: server.requests() or answer, timeout_s=60)
        looks = others = 0
        while asking.is_alive():
            # Alone on a machine the timeout is the requirement: a second, at any moment.
            assert httpx.get(f"{server.url}/health", timeout=health_s).status_code == 200
            looks += asking.is_alive()
            if looks % 20 == 1:
                reply = server.post(
                    "/generate",
                    {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3}},
                )
                assert reply.status_code == 200
                others += asking.is_alive()
            asking.join(0.05)
        assert answer["status"] == 200, answer
        assert answer["body"]["meta_info"]["prompt_tokens"] == num_tokens
        assert looks > 5, "a server that computes answers at once"
        assert others >= 1, "a short request is answered before the long one"
