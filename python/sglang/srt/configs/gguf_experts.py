"""What GGUF files say of a mixture's experts, in Hugging Face's shape.

Widths and layers are those of the tensors. Latent attention's files are read by gguf_latent, from
which come the fields of those that choose experts as DeepSeek does. `gguf_config` calls this.

Sources: the names and keys of the gguf package, and metadata of published files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.configs.gguf_file import GGUFTensorInfo
from sglang.srt.configs.gguf_latent import latent_expert_fields

# Architectures; a llama may be one, too.
MIXTURES = frozenset(
    {"qwen2moe", "qwen3moe", "llama4", "gpt-oss", "glm4moe", "dots1", "ernie4_5-moe"}
    | {"minimax-m2", "olmoe", "granitemoe"}
)
_LIKE_DEEPSEEK = frozenset({"glm4moe", "dots1"})
_WITHOUT_HEAD_NORMS = 128  # experts: of the published Llama 4 files those of so many (Maverick)
# What another model under the name may ask for, by what has it.
_GROUPS = ("expert_group_count", "expert_group_used_count")
_SHARED = "expert_shared_feed_forward_length"

_Get = Callable[[str, Any], Any]
_Need = Callable[[str], int]
_Tensors = Mapping[str, GGUFTensorInfo]


def expert_fields(name: str, get: _Get, need: _Need, tensors: _Tensors) -> dict[str, Any]:
    """What the experts of a file of architecture `name` are.

    `get` (key, default) and `need` look keys up. Llama 4 files have no keys for chunks,
    temperature, and which layers turn: those of the published models are the family's defaults.
    They normalise heads, but for the one with 128 experts. Raises ValueError for routing that
    another model under the name may ask for, and for a lack.
    """
    stacks = _widths(tensors, "ffn_gate_exps", 3)
    if not stacks:
        raise ValueError("the GGUF file lacks tensors blk.N.ffn_gate_exps.weight [E, I, H]")
    if name in _LIKE_DEEPSEEK:
        return _grouped_fields(name, get, need, tensors)
    _refuse_others(name, get)
    width = next(iter(stacks.values()))
    experts, chosen = need("expert_count"), need("expert_used_count")
    fields: dict[str, Any] = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    match name:
        case "gpt-oss" | "llama" | "minimax-m2":
            return fields | {"intermediate_size": width}
        case "olmoe":
            renormalizes = bool(get("expert_weights_norm", False))
            return {
                "num_experts": experts,
                "num_experts_per_tok": chosen,
                "intermediate_size": width,
                "norm_topk_prob": renormalizes,
            }
        case "llama4":
            return fields | {
                "intermediate_size": width,
                "intermediate_size_mlp": need("feed_forward_length"),
                "moe_layers": sorted(stacks),
                "use_qk_norm": experts != _WITHOUT_HEAD_NORMS,
            }
        case "granitemoe":
            shared = _widths(tensors, "ffn_gate_shexp", 2)
            return fields | {
                "intermediate_size": width,
                "shared_intermediate_size": next(iter(shared.values()), 0),
            }
        case "ernie4_5-moe":
            return _ernie_fields(experts, chosen, stacks, tensors)
    dense = [layer for layer in range(need("block_count")) if layer not in stacks]
    fields |= {"moe_intermediate_size": width, "mlp_only_layers": dense}
    if name == "qwen2moe":
        shared = _widths(tensors, "ffn_gate_shexp", 2)
        if not shared:
            raise ValueError("the GGUF file lacks tensors blk.N.ffn_gate_shexp.weight [I, H]")
        return fields | {
            "num_experts": experts,
            "shared_expert_intermediate_size": next(iter(shared.values())),
            "qkv_bias": "blk.0.attn_q.bias" in tensors,
            "norm_topk_prob": bool(get("expert_weights_norm", False)),
        }
    return fields | {"norm_topk_prob": bool(get("expert_weights_norm", True))}


def _widths(tensors: _Tensors, part: str, num_dims: int) -> dict[int, int]:
    """Layers that have `part`, and its width, which is the last dimension but one."""
    found = {
        int(name.split(".")[1]): info.shape
        for name, info in tensors.items()
        if name.startswith("blk.") and name.endswith(f".{part}.weight")
    }
    if any(len(shape) != num_dims for shape in found.values()):
        return {}
    return {layer: shape[-2] for layer, shape in found.items()}


def _refuse_others(name: str, get: _Get) -> None:
    has_shared = name in ("qwen2moe", "ernie4_5-moe", "granitemoe")
    unknown = _GROUPS if has_shared else (*_GROUPS, _SHARED)
    for key in unknown:
        if get(key, 0) not in (0, 1):
            raise ValueError(f"{name}.{key} is not supported")
    if get("expert_weights_scale", 0.0) not in (0.0, 1.0):
        raise ValueError(f"{name}.expert_weights_scale is not supported")


def _grouped_fields(name: str, get: _Get, need: _Need, tensors: _Tensors) -> dict[str, Any]:
    """As DeepSeek's, of layers that `block_count` counts with those that predict tokens."""
    drafts = int(get("nextn_predict_layers", 0))
    fields = latent_expert_fields(get, need, tensors) | {
        "num_hidden_layers": need("block_count") - drafts,
        "num_nextn_predict_layers": drafts,
    }
    if name == "glm4moe":
        fields["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    return fields


def _ernie_fields(
    experts: int, chosen: int, stacks: Mapping[int, int], tensors: _Tensors
) -> dict[str, Any]:
    """ERNIE's own names; layers with experts are told by the first, the last and what is between.

    Raises ValueError where the shared experts are no multiple of the others in width.
    """
    width = next(iter(stacks.values()))
    shared = next(iter(_widths(tensors, "ffn_gate_shexp", 2).values()), 0)
    if shared % width:
        raise ValueError(f"shared experts {shared} wide beside experts of {width}")
    layers = sorted(stacks)
    return {
        "moe_num_experts": experts,
        "moe_k": chosen,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared // width,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": layers[1] - layers[0] if len(layers) > 1 else 1,
    }
