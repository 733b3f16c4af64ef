"""Writes tiny GGUF files from transformers models, as the public converters do.

Tensor names come from the gguf package's own map and quantised bytes from its quantiser, so that
what is read back is judged by something else than the code under test.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "llama4_text": gguf.MODEL_ARCH.LLAMA4,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}
# Experts of a layer in a model's own state: what becomes of a merged tensor's halves.
_MERGED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def permute(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Halves of each head interleaved into pairs, as llama files store q and k."""
    half = rows.shape[0] // num_heads // 2
    heads = rows.reshape(num_heads, 2, half, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, npt.NDArray[np.float32]] | None = None,
    leave_out: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Write `model`; matrices in `quant`, vectors in float32.

    `metadata` adds or replaces keys (with `{arch}.` spelled out). Returns what the file holds
    under Hugging Face names: dequantised, before the permutation.
    """
    config = model.config
    arch = ARCHS[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_metadata(writer, config, metadata or {})
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    held: dict[str, torch.Tensor] = {}
    for name, tensor in stacked_experts(model).items():
        if name in leave_out or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        values = tensor.float().numpy()
        heads = None
        if arch is gguf.MODEL_ARCH.LLAMA:
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads = next((n for part, n in heads.items() if part in name), None)
        stored = values if heads is None else permute(values, heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias", ""))
        if name.endswith("sinks"):
            gguf_name += ".weight"
        if values.ndim == 1 or name.endswith("bias") or "ffn_gate_inp" in gguf_name:
            writer.add_tensor(gguf_name, stored)
            held[name] = torch.from_numpy(values)
            continue
        packed = gguf.quants.quantize(stored, quant)
        writer.add_tensor(gguf_name, packed, raw_dtype=quant)
        # Quantisation works along a row, so permuting rows first or last is the same.
        unquantised = gguf.quants.dequantize(gguf.quants.quantize(values, quant), quant)
        held[name] = torch.from_numpy(np.ascontiguousarray(unquantised))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def stacked_experts(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state, its experts' merged tensors as gate, up and down [E, out, in]."""
    kind = model.config.model_type
    state = {}
    for name, tensor in model.state_dict().items():
        head, found, leaf = name.rpartition(".experts.")
        if not found:
            state[name] = tensor
            continue
        leaf, is_bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        # Qwen3-MoE keeps outputs first; gpt-oss alternates gates and ups.
        whole = tensor if is_bias or kind == "qwen3_moe" else tensor.transpose(1, 2)
        parts = (whole,)
        if leaf == "gate_up_proj":
            parts = (whole[:, ::2], whole[:, 1::2]) if kind == "gpt_oss" else whole.chunk(2, 1)
        for part, values in zip(_MERGED[leaf], parts, strict=True):
            state[f"{head}.experts.{part}.{'bias' if is_bias else 'weight'}"] = values.contiguous()
    return state


def _write_metadata(writer: gguf.GGUFWriter, config: Any, changes: dict[str, Any]) -> None:
    arch = writer.arch
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    values: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
    }
    if config.model_type in ("mistral", "gpt_oss") and config.sliding_window is not None:
        values[f"{arch}.attention.sliding_window"] = config.sliding_window
    values |= {f"{arch}.{key}": value for key, value in _expert_metadata(config).items()}
    for key, value in {**values, **changes}.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _expert_metadata(config: Any) -> dict[str, int]:
    kind = config.model_type
    if kind not in ("qwen3_moe", "llama4_text", "gpt_oss"):
        return {}
    values = {
        "expert_count": config.num_experts if kind == "qwen3_moe" else config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
    }
    if kind == "qwen3_moe":
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "llama4_text":
        values["feed_forward_length"] = config.intermediate_size_mlp
        values["interleave_moe_layer_step"] = config.interleave_moe_layer_step
    return values
