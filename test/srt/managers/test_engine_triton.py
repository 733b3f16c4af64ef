"""The device tower with the Triton backend, in Triton's interpreter: the tokens of torch_native."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.utils.native import triton_kernels
from srt.managers.test_engine_tokens import tower
from srt.models.hf_models import make_hf_model, save

pytestmark = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")

PROMPTS = [[5, 9, 2], list(range(3, 60)), [7] * 20]


def answers(path: str, backend: str, **flags: object) -> list[list[int]]:
    """Greedy tokens in float32 for prompts in chunks, decodes beside them, and a cached prefix."""
    with tower(path, attention_backend=backend, **flags) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt, max_new_tokens=6)
        engine.run()
        engine.send("again", PROMPTS[1] + [4, 4], max_new_tokens=3)
        engine.run()
        return [engine.output(name) for name in ("r0", "r1", "r2", "again")]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32}),
        ("llama", {"page_size": 16, "kv_segment_size": 32, "kv_backing": "segment_table"}),
        ("llama", {"kv_cache_dtype": "fp8_e4m3"}),
        ("mistral", {"page_size": 4}),
    ],
    ids=["mmap", "segment_table", "fp8", "windows"],
)
def test_tokens_are_those_of_torch_native(
    family: str, flags: dict[str, object], tmp_path: Path
) -> None:
    changes = {"sliding_window": 21} if family == "mistral" else {}
    path = save(make_hf_model(family, **changes), tmp_path)
    expected = answers(path, "torch_native", **flags)
    assert answers(path, "triton", **flags) == expected
    assert [len(tokens) for tokens in expected] == [6, 6, 6, 3]
