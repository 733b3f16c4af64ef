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
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "granitemoeshared": gguf.MODEL_ARCH.GRANITE_MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "cohere2": gguf.MODEL_ARCH.COHERE2,
    "cohere": gguf.MODEL_ARCH.COMMAND_R,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "exaone4": gguf.MODEL_ARCH.EXAONE4,
    "seed_oss": gguf.MODEL_ARCH.SEED_OSS,
    "arcee": gguf.MODEL_ARCH.ARCEE,
}
_NORMS_PLUS_ONE = (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3)
_REORDERED = (
    gguf.MODEL_ARCH.LLAMA,
    gguf.MODEL_ARCH.GRANITE,
    gguf.MODEL_ARCH.GRANITE_MOE,
    gguf.MODEL_ARCH.SMOLLM3,
    gguf.MODEL_ARCH.ARCEE,
)
_INPUTS_FIRST = ("llama4_text", "gpt_oss")  # in transformers' experts
_PLAIN_MIXTURES = frozenset(
    {"qwen3_moe", "llama4_text", "gpt_oss", "mixtral", "qwen2_moe", "ernie4_5_moe"}
    | {"minimax_m2", "olmoe", "granitemoeshared"}
)
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
    splits_latents: bool = False,
) -> dict[str, torch.Tensor]:
    """Write `model`; matrices in `quant`, vectors in float32.

    `metadata` adds or replaces keys (with `{arch}.` spelled out). `splits_latents` as newer files
    of latent attention do. Returns what the file holds under Hugging Face names:
    dequantised, before the permutation.
    """
    config = model.config
    arch = ARCHS[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_metadata(writer, config, metadata or {})
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    held: dict[str, torch.Tensor] = {}
    state = stacked_experts(model)
    if splits_latents:
        state = _with_split_latents(state, config)
    for name, tensor in state.items():
        if name in leave_out or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        values = tensor.float().numpy()
        heads = None
        if arch in _REORDERED:
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads = next((n for part, n in heads.items() if part in name), None)
        stored = values if heads is None else permute(values, heads)
        if name.endswith(("e_score_correction_bias", "shared_expert_gate.weight")):
            values = stored = values.reshape(-1)
        if arch in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
            stored = values + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias", ""))
        if name.endswith("e_score_correction_bias"):
            gguf_name = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
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
        # gpt-oss alternates gates and ups.
        whole = tensor if is_bias or kind not in _INPUTS_FIRST else tensor.transpose(1, 2)
        parts = (whole,)
        if leaf == "gate_up_proj":
            parts = (whole[:, ::2], whole[:, 1::2]) if kind == "gpt_oss" else whole.chunk(2, 1)
        for part, values in zip(_MERGED[leaf], parts, strict=True):
            state[f"{head}.experts.{part}.{'bias' if is_bias else 'weight'}"] = values.contiguous()
    return _granites_apart(state) if kind == "granitemoeshared" else state


def _granites_apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names that the package's map knows, and a shared expert's gate and up apart."""
    made = {}
    for name, tensor in state.items():
        name = name.replace(".block_sparse_moe.router.", ".mlp.gate.")
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(
            ".shared_mlp.", ".mlp.shared_experts."
        )
        if "input_linear" not in name:
            made[name.replace("output_linear", "down_proj")] = tensor
            continue
        for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
            made[name.replace("input_linear", part)] = half.contiguous()
    return made


def _with_split_latents(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Each weight between latents and heads as its two parts, that of keys turned round."""
    made = {}
    for name, tensor in state.items():
        if "kv_b_proj" not in name:
            made[name] = tensor
            continue
        heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        made[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2).contiguous()
        made[name.replace("kv_b_proj", "v_b_proj")] = values.contiguous()
    return made


def latent_metadata(config: Any, *, splits_latents: bool) -> dict[str, Any]:
    """Keys of latent attention, of the older age or the newer."""
    rope = config.rope_parameters
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    values: dict[str, Any] = {
        "attention.head_count_kv": 1 if splits_latents else config.num_attention_heads,
        "attention.key_length": width,
        "attention.value_length": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    if splits_latents:
        values |= {
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": width,
            "attention.value_length_mla": config.v_head_dim,
        }
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast", 32.0)),
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    return {f"deepseek2.{key}": value for key, value in values.items()}


def _write_metadata(writer: gguf.GGUFWriter, config: Any, changes: dict[str, Any]) -> None:
    arch = writer.arch
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
    }
    if config.model_type in ("mistral", "gpt_oss", "mixtral") and config.sliding_window is not None:
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


def _expert_metadata(config: Any) -> dict[str, Any]:
    kind = config.model_type
    if kind in ("glm4_moe", "dots1"):
        return _grouped_metadata(config)
    if kind not in _PLAIN_MIXTURES:
        return {}
    experts = "num_experts" if hasattr(config, "num_experts") else "num_local_experts"
    values: dict[str, Any] = {
        "expert_count": getattr(config, experts),
        "expert_used_count": config.num_experts_per_tok,
    }
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    values["expert_feed_forward_length"] = width
    if kind == "llama4_text":
        values["feed_forward_length"] = config.intermediate_size_mlp
        values["interleave_moe_layer_step"] = config.interleave_moe_layer_step
    if kind == "minimax_m2":
        values["expert_gating_func"] = 2
        values["rope.dimension_count"] = config.head_dim // 2
    return values


def _grouped_metadata(config: Any) -> dict[str, Any]:
    """Of experts that are chosen as DeepSeek-V3's; GLM's files count layers that predict tokens."""
    values = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    if config.model_type == "glm4_moe":
        values["block_count"] = config.num_hidden_layers + 1
        values["nextn_predict_layers"] = 1
        values["rope.dimension_count"] = config.head_dim // 2
    return values
