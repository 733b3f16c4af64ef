"""GGUF metadata told in the shape of a Hugging Face config.json.

`ModelConfig.from_path` calls this, so that everything behind it knows one shape. It speaks of
hyperparameters only: weights are model_loader's, tokenizer tables the tokenizer's.

Source: the public GGUF specification (key names) and the gguf package (`gguf.Keys`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sglang.srt.configs.gguf_dense import (
    DENSE,
    LONG_ROPE_TENSORS,
    PARTIAL,
    READ_KEYS,
    dense_fields,
    long_rope_fields,
)
from sglang.srt.configs.gguf_experts import MIXTURES, expert_fields
from sglang.srt.configs.gguf_file import GGUFHeader, read_gguf_header, read_gguf_rows
from sglang.srt.configs.gguf_latent import (
    LATENT,
    latent_expert_fields,
    latent_fields,
    latent_yarn_fields,
)

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "llama4": ("Llama4ForCausalLM", "llama4_text"),
    "gpt-oss": ("GptOssForCausalLM", "gpt_oss"),
    "deepseek2": ("DeepseekV2ForCausalLM", "deepseek_v2"),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "glm4moe": ("Glm4MoeForCausalLM", "glm4_moe"),
    "dots1": ("Dots1ForCausalLM", "dots1"),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
    "minimax-m2": ("MiniMaxM2ForCausalLM", "minimax_m2"),
    "olmoe": ("OlmoeForCausalLM", "olmoe"),
    "granitemoe": ("GraniteMoeSharedForCausalLM", "granitemoeshared"),
    **DENSE,
}
_MIXTRAL = ("MixtralForCausalLM", "mixtral")  # a llama with experts
_PARTIAL_MIXTURES = frozenset({"glm4moe", "minimax-m2"})  # of whose heads a part turns
# Features that other families store under the same architecture name and that change the answer.
_REFUSED_UNLESS_ZERO = (
    "attention.clamp_kqv",
    "attention.scale",
    "attention.max_alibi_bias",
    "attention.temperature_length",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)


def gguf_to_hf_config(path: str | Path) -> tuple[dict[str, Any], tuple[float, ...] | None]:
    """Read `path` into (config in Hugging Face's shape, rope frequency divisors or None).

    A `llama` file with a sliding window is a Mistral, one with experts a Mixtral. Raises
    ValueError for a damaged file, an architecture that is not supported, or a feature that would
    change the answer.
    """
    header = read_gguf_header(path)
    values = header.metadata
    name = values.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"unsupported architecture {name!r} in a GGUF file; "
            f"supported: {', '.join(_ARCHITECTURES)} (llama includes Mistral and Mixtral)"
        )
    if int(values.get("split.count", 0)) > 1:
        raise ValueError("split GGUF files are not supported; merge them into one file")
    reader = _Reader(header, str(name))
    reader.refuse_other_features()
    raw = reader.shape_fields()
    turned = raw["head_dim"]
    if name in LATENT:
        raw |= latent_fields(reader.get, reader.need)
        raw |= latent_expert_fields(reader.get, reader.need, header.tensors)
        turned = raw["qk_rope_head_dim"]
    if name in DENSE or name in READ_KEYS:
        raw |= dense_fields(str(name), header, reader.get, raw)
    raw |= reader.rope_fields(turned)
    raw |= reader.token_ids()
    if reader.is_mixture:
        raw |= expert_fields(reader.name, reader.get, reader.need, header.tensors)
    raw["torch_dtype"] = _widest_dtype(header)
    return raw, _freq_factors(header, int(reader.get("rope.dimension_count", turned)))


class _Reader:
    """Looks up `{architecture}.{key}` with checks; never keeps anything."""

    def __init__(self, header: GGUFHeader, name: str) -> None:
        self.header = header
        self.name = name

    @property
    def is_mixture(self) -> bool:
        """Whether its experts are `expert_fields`."""
        return self.name in MIXTURES or (self.name == "llama" and bool(self.get("expert_count", 0)))

    def get(self, key: str, default: Any = None) -> Any:
        """A scalar; an array per layer counts where all its entries are equal."""
        value = self.header.metadata.get(f"{self.name}.{key}", default)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise ValueError(f"{self.name}.{key} differs between layers, which is unsupported")
            value = value[0].item()
        return value

    def need(self, key: str) -> int:
        value = self.get(key)
        if value is None:
            raise ValueError(f"the GGUF file lacks {self.name}.{key}")
        return int(value)

    def refuse_other_features(self) -> None:
        for key in _REFUSED_UNLESS_ZERO:
            if key not in READ_KEYS.get(self.name, ()) and self.get(key, 0):
                raise ValueError(f"{self.name}.{key} is not supported")
        if not self.is_mixture and self.name not in LATENT and self.get("expert_count", 0):
            raise ValueError(f"{self.name}.expert_count is not supported")
        for tensor in self.header.tensors:
            if tensor in LONG_ROPE_TENSORS and self.name != "phi3":
                raise ValueError(f"tensor {tensor} (longrope) is not supported")

    def shape_fields(self) -> dict[str, Any]:
        tensors = self.header.tensors
        is_mixtral = self.name == "llama" and self.is_mixture
        architecture, model_type = _MIXTRAL if is_mixtral else _ARCHITECTURES[self.name]
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise ValueError("the GGUF file lacks tensor token_embd.weight")
        hidden, heads = self.need("embedding_length"), self.need("attention.head_count")
        head_dim = self.get("attention.key_length")
        if head_dim is None:
            if heads < 1 or hidden % heads:
                raise ValueError(f"embedding_length {hidden} is not a multiple of {heads} heads")
            head_dim = hidden // heads
        value_dim = int(self.get("attention.value_length", head_dim))
        if value_dim != head_dim and self.name not in LATENT:
            raise ValueError("keys and values of different width are not supported")
        raw: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self.need("feed_forward_length"),
            "num_hidden_layers": self.need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.get("attention.head_count_kv", heads)),
            "head_dim": int(head_dim),
            "rms_norm_eps": float(self.get("attention.layer_norm_rms_epsilon", 1e-6)),
            "max_position_embeddings": self.need("context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "attention_output_bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        }
        window = 0 if self.name in DENSE else self.get("attention.sliding_window", 0)
        if window and self.name == "llama" and not is_mixtral:
            raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        if window and self.name in ("llama", "gpt-oss"):
            raw["sliding_window"] = int(window)
        elif window:
            raise ValueError(f"{self.name}.attention.sliding_window is not supported")
        return raw

    def rope_fields(self, head_dim: int) -> dict[str, Any]:
        rotated = int(self.get("rope.dimension_count", head_dim))
        rope: dict[str, Any] = {"rope_theta": float(self.get("rope.freq_base", 10000.0))}
        if self.name in PARTIAL | _PARTIAL_MIXTURES:
            rope["partial_rotary_factor"] = rotated / head_dim
        elif rotated != head_dim:
            raise ValueError(f"rope.dimension_count {rotated} other than head_dim {head_dim}")
        long_rope = long_rope_fields(self.header, self.get)
        if long_rope:
            return {"rope_parameters": rope | long_rope}
        kind = self.get("rope.scaling.type", "none")
        factor = float(self.get("rope.scaling.factor", self.get("rope.scale_linear", 0.0)))
        if kind == "none" and self.get("rope.scale_linear"):
            kind = "linear"
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return {"rope_parameters": rope | {"rope_type": "default"}}
        if kind not in ("linear", "yarn"):
            raise ValueError(f"rope.scaling.type {kind!r} is not supported")
        rope |= {"rope_type": kind, "factor": factor}
        original = self.get("rope.scaling.original_context_length")
        if original:
            rope["original_max_position_embeddings"] = int(original)
        if kind == "yarn":
            rope |= self._yarn_fields(factor)
            if self.name in LATENT:
                rope |= latent_yarn_fields(self.get)
            if self.name == "gpt-oss":
                rope["truncate"] = False
        return {"rope_parameters": rope}

    def _yarn_fields(self, factor: float) -> dict[str, Any]:
        if self.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
            raise ValueError("rope.scaling.yarn_ext_factor is not supported")
        fields: dict[str, Any] = {
            "beta_fast": float(self.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(self.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
        extra = self.get("rope.scaling.yarn_attn_factor", self.get("rope.scaling.attn_factor"))
        if extra is not None and factor > 1.0:  # multiplies yarn's own magnitude
            fields["attention_factor"] = float(extra) * (0.1 * math.log(factor) + 1.0)
        return fields

    def token_ids(self) -> dict[str, Any]:
        """Beginning of text, and every token that ends a turn or a text."""
        values = self.header.metadata
        ends = ("eos", "eot", "eom")
        ids = [values.get(f"tokenizer.ggml.{end}_token_id") for end in ends]
        bos = values.get("tokenizer.ggml.bos_token_id")
        return {"bos_token_id": bos, "eos_token_id": [i for i in ids if i is not None] or None}


def _widest_dtype(header: GGUFHeader) -> str:
    """The type that holds every matrix without loss of note: quantised ones count as float16."""
    types = gguf.GGMLQuantizationType
    kinds = {t.quant_type for t in header.tensors.values() if len(t.shape) > 1}
    if types.F32 in kinds:
        return "float32"
    return "bfloat16" if types.BF16 in kinds else "float16"


def _freq_factors(header: GGUFHeader, head_dim: int) -> tuple[float, ...] | None:
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    values = read_gguf_rows(header.path, info, 0, 1)[0]
    if values.shape != (head_dim // 2,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"rope_freqs.weight must be {head_dim // 2} positive numbers")
    return tuple(float(v) for v in values)
