"""Adapters beside quantised weights: the log probabilities of merged models, within a tolerance.

Adapters stay in the types of activations; the weights' own products are those of the quantised
matrices, so the difference to numbers is what it is without adapters.
"""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, int32_buffer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.native import native_kernels
from srt.managers.test_engine_tokens import tower
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.test_fp8_checkpoints import published as fp8_checkpoint
from srt.models.hf_models import make_hf_model, save
from srt.models.lora_adapters import Factors, make_factors, merged, save_adapter

PROMPT = np.random.default_rng(4).integers(0, 160, 60).tolist()
Floats = npt.NDArray[np.float32]

needs_kernels = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")


def told(path: str, adapter: str, **flags: object) -> tuple[Floats, Floats]:
    """The prompt's log probabilities without the adapter, and with it."""
    with tower(path, lora_paths=[f"a={adapter}"], **flags) as engine:
        for rid, number in (("base", None), ("adapted", 1)):
            engine.channel.inbox.append(
                TokenizedGenerateReqInput(
                    rid=rid,
                    input_ids=memoryview(int32_buffer(PROMPT)),
                    sampling_params=SamplingParams(max_new_tokens=1, temperature=0.0),
                    return_logprob=True,
                    logprob_start_len=0,
                    lora_id=number,
                )
            )
        engine.run()
        found = {
            out.rid: np.frombuffer(out.input_logprobs.logprobs, "<f4")[1:]
            for out in engine.channel.outs
            if out.input_logprobs is not None
        }
    return found["base"], found["adapted"]


def expected(model: PreTrainedModel) -> Floats:
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    rows = range(len(PROMPT) - 1)
    return np.array([float(logits[at, PROMPT[at + 1]]) for at in rows], np.float32)


def from_gguf(folder: Path, quant: gguf.GGMLQuantizationType) -> tuple[str, PreTrainedModel]:
    """A GGUF file, and a model with the numbers that it holds."""
    base = make_hf_model("llama")
    held = write_gguf(folder / "base.gguf", base, quant)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(held[name])
    return str(folder / "base.gguf"), base


def check(
    path: str, base: PreTrainedModel, factors: Factors, folder: Path, atol: float, **flags: object
) -> None:
    plain, adapted = told(path, save_adapter(folder / "a", factors), **flags)
    want_plain, want = expected(base), expected(merged(base, factors))
    np.testing.assert_allclose(plain, want_plain, atol=atol)
    np.testing.assert_allclose(adapted, want, atol=atol)
    assert np.abs(want - want_plain).max() > 20 * atol, "the adapter changes far more"


def test_a_gguf_file_as_numbers(tmp_path: Path) -> None:
    """Its q and k rows lie in another order in the file; adapters are for the model's own."""
    path, base = from_gguf(tmp_path, gguf.GGMLQuantizationType.Q8_0)
    check(path, base, make_factors(base), tmp_path, 1e-3, quantization="none")


@needs_kernels
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_a_gguf_file_that_stays_quantised(tmp_path: Path, quant: str) -> None:
    path, base = from_gguf(tmp_path, gguf.GGMLQuantizationType[quant])
    check(path, base, make_factors(base), tmp_path, 0.15)


@needs_kernels
def test_weights_rounded_to_bytes(tmp_path: Path) -> None:
    base = make_hf_model("llama")
    path = save(copy.deepcopy(base), tmp_path / "base")
    check(path, base, make_factors(base), tmp_path, 0.15, quantization="int8")


@needs_kernels
def test_a_checkpoint_in_fp8(tmp_path: Path) -> None:
    base, path = fp8_checkpoint(tmp_path / "base", "block of 128", "llama", 1)
    check(path, base, make_factors(base), tmp_path, 2e-3)


def test_bfloat16(tmp_path: Path) -> None:
    base = make_hf_model("llama")
    path = save(copy.deepcopy(base), tmp_path / "base")
    check(path, base, make_factors(base), tmp_path, 0.15, dtype="bfloat16")
