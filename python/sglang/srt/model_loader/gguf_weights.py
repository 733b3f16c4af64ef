"""Reads the tensors of a GGUF file under their Hugging Face names, one at a time.

The loader walks it like any other `WeightSource`. Matrices keep their codes where the native
kernels can multiply with them; everything else becomes numbers. Files of Llama and its nearest
store rows of q and k so that rotary pairs are neighbours; they are put back into halves here, as
our rotation wants them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from sglang.srt.configs.gguf_file import (
    GGUFTensorInfo,
    read_gguf_bytes,
    read_gguf_header,
    read_gguf_rows,
)
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.gguf_blocks import BlockCodes, is_served, take_apart
from sglang.srt.layers.quantization.matrix import QuantizedWeight
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_loader.weight_files import WeightIterator, WeightSource

_BLOCK_FLOATS = 1 << 22  # rows are dequantised in blocks of about 16 MiB in float32

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GATED = {"ffn_gate_inp": "mlp.gate"}
_SHARED_EXPERTS = {
    **_GATED,
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Where families call things otherwise, by model_type.
_FAMILY_NAMES = {
    "gemma2": {**_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"},
    "gemma3_text": {**_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"},
    "olmo2": _POST_NORMS,
    "olmo3": _POST_NORMS,
    "exaone4": _POST_NORMS,
    "seed_oss": {"post_attention_norm": "post_attention_layernorm"},
    "glm4": {
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        "ffn_up": "mlp.gate_up_proj",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "qwen3_moe": _GATED,
    "mixtral": _GATED,
    "minimax_m2": _GATED,
    "olmoe": _GATED,
    "qwen2_moe": {**_GATED, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    "glm4_moe": {**_SHARED_EXPERTS, "post_attention_norm": "post_attention_layernorm"},
    "dots1": _SHARED_EXPERTS,
    "ernie4_5_moe": _SHARED_EXPERTS,
    "granitemoeshared": _SHARED_EXPERTS,
    "gpt_oss": {"post_attention_norm": "post_attention_layernorm"},
    "deepseek_v2": {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        **_SHARED_EXPERTS,
    },
}
_MLP_NAMES = {"llama4_text": "feed_forward"}  # others say mlp
_CHOICE_BIAS = {"exp_probs_b": "mlp.gate.e_score_correction_bias"}
_WHOLE_NAMES = {  # without what kind it is
    "gpt_oss": {"attn_sinks": "self_attn.sinks"},
    "deepseek_v2": _CHOICE_BIAS,
    "glm4_moe": _CHOICE_BIAS,
    "dots1": _CHOICE_BIAS,
    "ernie4_5_moe": _CHOICE_BIAS,
    "minimax_m2": _CHOICE_BIAS,
}
# The two parts of one weight: what makes keys of a latent, [H, C, N], and what makes values of it,
# [H, V, C].
_KEYS_PART, _VALUES_PART, _BOTH_PARTS = ".attn_k_b.", ".attn_v_b.", ".attn_kv_b."
_SHARED_GATE = ".ffn_gate_inp_shexp."
# ModelConfig has read them.
_NOT_WEIGHTS = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
# Whose rows of q and k are reordered.
_REORDERED = frozenset(
    {"llama", "mistral", "mixtral", "granite", "granitemoeshared", "smollm3", "arcee"}
)
_NORMS_PLUS_ONE = ("gemma2", "gemma3_text")  # whose norms are stored as the factors that they are
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_weight_name(name: str, model_type: str = "") -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    `model_type` is that of `ModelConfig`. A name that its tables lack comes back as it is, so that
    an error can name it.
    """
    match = _LAYER_TENSOR.fullmatch(name)
    if match is not None:
        layer, part, kind = match.groups()
        whole = _WHOLE_NAMES.get(model_type, {}).get(part)
        if whole is not None:
            return f"model.layers.{layer}.{whole}"
        inside = _FAMILY_NAMES.get(model_type, {}).get(part) or _LAYER_NAMES.get(part)
        if inside is not None:
            head, dot, rest = inside.partition(".")
            head = _MLP_NAMES.get(model_type, head) if head == "mlp" else head
            return f"model.layers.{layer}.{head}{dot}{rest}.{kind}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else name


def gguf_weights(
    config: ModelConfig, dtype: torch.dtype, kernels: ModuleType | None = None
) -> WeightSource:
    """All weights of the file at `config.path`.

    With `kernels`, the package sgl_kernel, matrices in types that it multiplies with come as its
    `QuantizedWeight`; all else comes in `dtype`. Raises ValueError for a damaged file; walking it
    also for a quantisation type that the gguf package can't dequantise.
    """
    header = read_gguf_header(config.path)
    infos = [
        info
        for name, info in header.tensors.items()
        if name not in _NOT_WEIGHTS and not config.is_draft_weight(_layer_of(name))
    ]
    count = sum(_VALUES_PART not in info.name for info in infos)
    return WeightSource(_walk(header.path, infos, config, dtype, kernels), count)


def _layer_of(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.attn_q.weight`, whatever is in the layer."""
    return f"model.layers.{name.removeprefix('blk.')}" if name.startswith("blk.") else name


def _walk(
    path: Path,
    infos: list[GGUFTensorInfo],
    config: ModelConfig,
    dtype: torch.dtype,
    kernels: ModuleType | None,
) -> WeightIterator:
    heads_of = {}
    if config.model_type in _REORDERED:
        heads_of = {".attn_q.": config.num_heads, ".attn_k.": config.num_kv_heads}
    named = {info.name: info for info in infos}
    for info in infos:
        if _KEYS_PART in info.name or _VALUES_PART in info.name:
            if _KEYS_PART in info.name:
                yield _joined(path, info, named, config, dtype)
            continue
        order = None
        for part, heads in heads_of.items():
            if part in info.name:
                order = _unpermuted(info.shape[0], heads, info.name)
        hf_name = hf_weight_name(info.name, config.model_type)
        tensor: LoadedWeight
        # Of three dimensions the first are experts, whose outputs are one below another.
        if kernels is not None and len(info.shape) in (2, 3) and _is_kept(info):
            kept = take_apart(info.quant_type.name, read_gguf_bytes(path, info))
            tensor = quantized_weight(kernels, kept)
            yield hf_name, tensor if order is None else tensor.take(order)
            continue
        tensor = _dequantize(path, info, dtype)
        if _SHARED_GATE in info.name and tensor.dim() == 1:  # a matrix of one row
            tensor = tensor.unsqueeze(0)
        if config.model_type in _NORMS_PLUS_ONE and info.name.endswith("norm.weight"):
            tensor = _dequantize(path, info, torch.float32) - 1
        yield hf_name, tensor if order is None else tensor[order]


def _joined(
    path: Path,
    keys: GGUFTensorInfo,
    named: Mapping[str, GGUFTensorInfo],
    config: ModelConfig,
    dtype: torch.dtype,
) -> tuple[str, torch.Tensor]:
    """The weight between latents and heads as one, of its two parts; ValueError without both."""
    values = named.get(keys.name.replace(_KEYS_PART, _VALUES_PART))
    if values is None:
        raise ValueError(f"tensor {keys.name} comes without {_VALUES_PART.strip('.')}")
    parts = [_dequantize(path, info, dtype) for info in (keys, values)]
    whole = torch.cat((parts[0].transpose(1, 2), parts[1]), 1).flatten(0, 1)
    return hf_weight_name(keys.name.replace(_KEYS_PART, _BOTH_PARTS), config.model_type), whole


def _is_kept(info: GGUFTensorInfo) -> bool:
    return is_served(info.quant_type.name, info.shape[-1])


def quantized_weight(kernels: ModuleType, kept: BlockCodes) -> QuantizedWeight:
    """Codes as the weight that `kernels`, the package sgl_kernel, multiplies with."""
    mins = None if kept.mins is None else torch.from_numpy(kept.mins)
    codes = torch.from_numpy(kept.codes)
    if kept.group is not None:
        codes = codes.view(torch.float8_e4m3fn)
    scales = torch.from_numpy(kept.scales)
    weight: QuantizedWeight = kernels.QuantizedWeight(
        codes, scales, mins, kept.gain, kept.values, kept.group
    )
    return weight


def _dequantize(path: Path, info: GGUFTensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`, dequantised by blocks of rows: a large one never exists in float32."""
    tensor = torch.empty(info.shape, dtype=dtype)
    rows = tensor.view(-1, info.shape[-1])
    step = max(1, _BLOCK_FLOATS // info.shape[-1])
    for first in range(0, rows.shape[0], step):
        block = rows[first : first + step]
        block.copy_(torch.from_numpy(read_gguf_rows(path, info, first, block.shape[0])))
    return tensor


def _unpermuted(num_rows: int, num_heads: int, name: str) -> torch.Tensor:
    """Where the file has each row (or bias entry): of each head's halves, int64 [num_rows].

    In the file the rows of a head are interleaved pairs of its two halves.
    """
    if num_rows % (2 * num_heads):
        raise ValueError(f"tensor {name}: {num_rows} rows are not {num_heads} heads")
    pairs = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return pairs.transpose(1, 2).reshape(-1)
