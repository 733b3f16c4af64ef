"""The device tower with the Triton backend, in Triton's interpreter: the tokens of torch_native."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.utils.native import triton_kernels
from srt.managers.test_engine_tokens import tower
from srt.models.hf_models import make_hf_model, save

pytestmark = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")

PROMPTS = [[5, 9, 2], list(range(3, 40)), [7] * 20]


def answers(path: str, backend: str, **flags: object) -> list[list[int]]:
    """Greedy tokens in float32 for prompts in chunks, decodes beside them, and a cached prefix."""
    with tower(path, attention_backend=backend, **flags) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt, max_new_tokens=3)
        engine.run()
        engine.send("again", PROMPTS[1] + [4, 4], max_new_tokens=2)
        engine.run()
        return [engine.output(name) for name in ("r0", "r1", "r2", "again")]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32}),
        ("llama", {"page_size": 16, "kv_segment_size": 32, "kv_backing": "segment_table"}),
        ("llama", {"kv_cache_dtype": "fp8_e4m3"}),
        ("mistral", {"page_size": 4}),
        ("deepseek_v2", {"page_size": 16, "kv_segment_size": 32, "kv_backing": "segment_table"}),
        pytest.param(
            *("deepseek_v3", {"page_size": 16, "kv_cache_dtype": "fp8_e4m3"}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mmap", "segment_table", "fp8", "windows", "latents", "latents of fp8"],
)
def test_tokens_are_those_of_torch_native(
    family: str, flags: dict[str, object], tmp_path: Path
) -> None:
    changes = {"sliding_window": 21} if family == "mistral" else {}
    path = save(make_hf_model(family, num_hidden_layers=2, **changes), tmp_path)
    expected = answers(path, "torch_native", **flags)
    assert answers(path, "triton", **flags) == expected
    assert [len(tokens) for tokens in expected] == [3, 3, 3, 2]


def first_step(path: str, **flags: object) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens of one request, and K of every layer in what stands on the first pages."""
    with tower(path, attention_backend="triton", page_size=16, **flags) as engine:
        engine.send("r", PROMPTS[1][:25], max_new_tokens=2)
        engine.run()
        pool = engine.memory.kv_pool
        layers = range(pool.spec.num_layers)
        keys = [pool.get_key_buffer(layer)[16 : 16 + 25].clone() for layer in layers]
        return engine.output("r"), keys


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "llama4"])
def test_rotation_and_store_are_one_launch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same keys as by the model's rotation; Llama 4 has a norm between the two."""
    kernels = triton_kernels()
    assert kernels is not None
    path = save(make_hf_model(family), tmp_path)
    counts = {"rotate_and_store": 0, "store_kv": 0}

    def counted(name: str) -> None:
        call = getattr(kernels, name)

        def count(*args: object, **more: object) -> object:
            counts[name] += 1
            return call(*args, **more)

        monkeypatch.setattr(kernels, name, count)

    counted("rotate_and_store")
    counted("store_kv")
    tokens, keys = first_step(path)
    layers = len(keys)
    if family == "llama4":
        assert counts == {"rotate_and_store": 0, "store_kv": 2 * layers}
    else:  # the last layer of a prompt turns fewer queries than keys
        assert counts == {"rotate_and_store": 2 * layers - 1, "store_kv": 1}
    monkeypatch.setattr(TritonAttnBackend, "rotates", False)
    others, single = first_step(path)
    assert counts["store_kv"] >= 2 * layers
    assert tokens == others
    for found, expected in zip(keys, single, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
