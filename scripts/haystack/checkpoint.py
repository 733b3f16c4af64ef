"""Writes the circuit as a Hugging Face directory: config.json, safetensors and a tokenizer.

The fields are those of Meta's published Llama 4 configurations (model type llama4_text).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from haystack.circuit import HEAD_DIM, HIDDEN_SIZE, Shape, build_weights
from haystack.prompts import SPECIAL_TOKENS, Vocabulary


def config_of(shape: Shape) -> dict[str, Any]:
    """The object of config.json."""
    chunked = [layer.looks_back is not None for layer in shape.layers]
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_cache": True,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_chunk_size": shape.chunk_size,
        "no_rope_layers": [int(rotary) for rotary in chunked],
        "layer_types": ["chunked_attention" if one else "full_attention" for one in chunked],
        "use_qk_norm": False,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        # All MLPs are dense: the experts' fields are there because every Llama 4 has them.
        "intermediate_size_mlp": shape.intermediate_size,
        "intermediate_size": shape.intermediate_size,
        "moe_layers": [],
        "interleave_moe_layer_step": shape.num_layers + 1,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
    }


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Write the directory, made when it is not there; files of an older checkpoint are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n")
    save_file(build_weights(shape), folder / "model.safetensors", {"format": "pt"})
    _tokenizer(shape).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "model_max_length": shape.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n"
    )


def _tokenizer(shape: Shape) -> tokenizers.Tokenizer:
    """One word, one token, with the space before it; bytes are spelled as byte-level BPE does."""
    words = Vocabulary(shape.vocab_size).words
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made
