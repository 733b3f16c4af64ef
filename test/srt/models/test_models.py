"""Our models against transformers: same weights, same logits, same greedy tokens.

References are small random models in float32. Prompts have different lengths, enter one after
another in chunks, and decode beside each other over scattered pages.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sglang.srt.configs.families import ENCODER_FAMILIES
from sglang.srt.configs.model_config import ARCHITECTURES, ModelConfig
from sglang.srt.configs.pooling_config import causal_name
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.registry import MODEL_CLASSES, resolve_model_class
from srt.crossed import crossed
from srt.model_loader.gguf_files import write_gguf
from srt.models.harness import Runner, Sequence
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
NUM_NEW = 64

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn-fields": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
}


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def runner_of(
    path: str, *, page_size: int = 16, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Runner:
    model = load_model(
        ModelConfig.from_path(path, **arguments),
        dtype=dtype,
        parallel=ParallelState(),
        show_progress=False,
    )
    num_pages = 2 * (1024 // page_size // 2) + 32
    return Runner(model, page_size=page_size, num_pages=num_pages, dtype=dtype)


def hf_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Float32 logits [len(tokens), vocab] of one pass over all tokens."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def assert_greedy_equal(
    hf: PreTrainedModel, path: str, lengths: tuple[int, ...] = (37, 5, 70), **arguments: Any
) -> None:
    texts = prompts(*lengths)
    ours = runner_of(path, **arguments).greedy(texts, NUM_NEW, chunk=13)
    assert ours == [hf_greedy(hf, text, NUM_NEW) for text in texts]
    assert len({tuple(tokens) for tokens in ours}) == len(texts)


def assert_logits_equal(hf: PreTrainedModel, path: str, num_tokens: int = 90) -> None:
    """All rows of three prompts, in two chunks each, against one pass of transformers."""
    runner = runner_of(path)
    sequences = [Sequence(text) for text in prompts(num_tokens, num_tokens - 30, 21)]
    parts = [(seq, len(seq.tokens) // 3) for seq in sequences]
    first = runner.step(parts, all_logits=True)
    parts = [(seq, len(seq.tokens) - seq.num_computed) for seq in sequences]
    second = runner.step(parts, all_logits=True)
    for seq, head, tail in zip(sequences, first, second, strict=True):
        ours, theirs = torch.cat([head, tail]), hf_logits(hf, seq.tokens)
        assert theirs.std() > 0.3  # the reference says something
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_every_architecture_of_the_configuration_has_a_class() -> None:
    assert set(MODEL_CLASSES) == {causal_name(name) for name in ARCHITECTURES} - {*ENCODER_FAMILIES}
    for name in MODEL_CLASSES:
        assert resolve_model_class(name).__name__ == name
    with pytest.raises(ValueError, match="'Gpt'; supported: LlamaForCausalLM"):
        resolve_model_class("Gpt")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_a_mixed_batch(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    texts = prompts(37, 5, 70)
    expected = [hf_greedy(hf, text, NUM_NEW) for text in texts]
    assert len({tuple(tokens) for tokens in expected}) == len(texts)
    for page_size, chunk in ((1, 13), (16, 1000), (64, 16)):
        ours = runner_of(path, page_size=page_size).greedy(texts, NUM_NEW, chunk)
        assert ours == expected, page_size


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_row(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family)
    assert_logits_equal(hf, save(hf, tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("mistral", {"head_dim": 32, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
        ("qwen3", {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
        ("llama", {"num_hidden_layers": 1}),
        ("mistral", {"sliding_window": 1}),
    ],
)
def test_variants_within_a_family(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    hf = make_hf_model(family, **changes)
    assert_logits_equal(hf, save(hf, tmp_path))


@pytest.mark.parametrize(
    ("family", "rope"), crossed(FAMILIES, ["linear", "yarn", "yarn-fields", "llama3"])
)
def test_rope_scaling_beyond_the_original_length(tmp_path: Path, rope: str, family: str) -> None:
    hf = make_hf_model(family, rope_parameters={"rope_theta": 1000.0, **ROPES[rope]})
    assert_logits_equal(hf, save(hf, tmp_path))


def test_rope_scaling_changes_the_logits() -> None:
    text = prompts(90)[0]
    plain = hf_logits(make_hf_model("llama", rope_parameters={"rope_theta": 1000.0}), text)
    for fields in ROPES.values():
        hf = make_hf_model(
            "llama", max_position_embeddings=40, rope_parameters={"rope_theta": 1000.0, **fields}
        )
        assert (hf_logits(hf, text) - plain).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_rope(tmp_path: Path, family: str) -> None:
    """Within the trained length all rows; beyond it the tokens that are generated one by one."""
    hf = make_hf_model(
        family,
        max_position_embeddings=80,
        rope_parameters={"rope_theta": 1000.0, **ROPES["dynamic"]},
    )
    path = save(hf, tmp_path)
    assert_logits_equal(hf, path, num_tokens=80)
    assert_greedy_equal(hf, path, lengths=(60, 70, 33))


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 9}),
    ("mistral", {"sliding_window": 2}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
]


@pytest.mark.parametrize(("family", "changes"), WINDOWS)
def test_windows_smaller_than_the_sequence(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    hf = make_hf_model(family, **changes)
    path = save(hf, tmp_path)
    assert_logits_equal(hf, path)
    assert_greedy_equal(hf, path, lengths=(20, 50))


@pytest.mark.parametrize(("family", "page_size"), crossed(FAMILIES, [16, 1]))
def test_a_reused_prefix_gives_the_same_tokens(tmp_path: Path, family: str, page_size: int) -> None:
    hf = make_hf_model(family)
    runner = runner_of(save(hf, tmp_path), page_size=page_size)
    first, tail = prompts(53, 10)
    runner.greedy([first], 1)
    source = Sequence(list(first))
    runner.step([(source, len(first))])
    texts = [first[:40] + tail, list(first)]
    shared = [runner.share_prefix(source, list(text)) for text in texts]
    assert [seq.num_computed for seq in shared] == {1: [40, 52], 16: [32, 48]}[page_size]
    assert runner.continue_greedily(shared, NUM_NEW) == [
        hf_greedy(hf, text, NUM_NEW) for text in texts
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_nobody_wants_are_skipped_but_cached(tmp_path: Path, family: str) -> None:
    """Only the last layer's wanted rows are computed, and later tokens still see all of it."""
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    text, other = prompts(40, 6)
    runner = runner_of(path)
    seq, short = Sequence(text), Sequence(other)
    middle, end = runner.step([(seq, 25), (short, 6)])
    assert middle.shape == (0, VOCAB)
    torch.testing.assert_close(end[0], hf_logits(hf, other)[-1], atol=1e-4, rtol=0)
    (nothing,) = runner.step([(seq, 10)])
    assert nothing.shape == (0, VOCAB)
    (last,) = runner.step([(seq, 5)])
    torch.testing.assert_close(last[0], hf_logits(hf, text)[-1], atol=1e-4, rtol=0)


def test_progress_is_ticked_by_every_layer(tmp_path: Path) -> None:
    runner = runner_of(save(make_hf_model("llama"), tmp_path))
    before = runner.progress.count
    runner.step([(Sequence([1, 2, 3]), 3)])
    assert runner.progress.count - before >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits(tmp_path: Path, family: str) -> None:
    """Tolerance: 4 % of the largest float32 logit, and not far from transformers' own error.

    Where float32's two best tokens are further apart than twice that, the choice is the same.
    """
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    text = prompts(90)[0]
    exact = hf_logits(hf, text)
    theirs = hf_logits(hf.to(torch.bfloat16), text)
    runner = runner_of(path, dtype=torch.bfloat16)
    (ours,) = runner.step([(Sequence(text), len(text))], all_logits=True)
    tolerance = 0.04 * exact.abs().max()
    assert (ours - exact).abs().max() <= tolerance
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
    best = exact.topk(2, -1).values
    clear = best[:, 0] - best[:, 1] > 2 * tolerance
    assert clear.any()
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_from_a_gguf_file(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 16} if family == "mistral" else {}
    hf = make_hf_model(family, **changes)
    write_gguf(tmp_path / "m.gguf", hf)
    assert_greedy_equal(hf, str(tmp_path / "m.gguf"))


def test_gguf_frequency_factors_stand_for_llama3(tmp_path: Path) -> None:
    """Files of Llama 3.1 have no rope type, but divisors for each frequency."""
    hf = make_hf_model("llama", rope_parameters={"rope_theta": 1000.0, **ROPES["llama3"]})
    plain = 1000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    factors = (plain / hf.model.rotary_emb.inv_freq.double()).float().numpy()
    assert factors.max() == pytest.approx(8.0, rel=1e-3)
    write_gguf(tmp_path / "m.gguf", hf, extra_tensors={"rope_freqs.weight": factors})
    assert_logits_equal(hf, str(tmp_path / "m.gguf"))


def test_gguf_yarn(tmp_path: Path) -> None:
    hf = make_hf_model("qwen2", rope_parameters={"rope_theta": 1000.0, **ROPES["yarn"]})
    scaling: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    metadata = {f"qwen2.rope.scaling.{key}": value for key, value in scaling.items()}
    write_gguf(tmp_path / "m.gguf", hf, metadata=metadata)
    assert_logits_equal(hf, str(tmp_path / "m.gguf"))
