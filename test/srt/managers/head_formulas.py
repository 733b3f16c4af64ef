"""Draft heads by their formulas, with random weights, over transformers' states."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Matrices that keep sizes, norms around 1."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = noise * 1.2 / shape[-1] ** 0.5 if len(shape) > 1 else 1.0 + 0.2 * noise
    return weights


class HeadFormula(ABC):
    """A head on the states of `reference`; `weights` by their names within it."""

    weights: Weights

    def __init__(self, reference: PreTrainedModel) -> None:
        self.reference = reference
        self.model: Any = reference.model
        self.hidden = reference.config.hidden_size

    @torch.no_grad()
    def states(self, text: list[int]) -> torch.Tensor:
        """What the head reads of the model, of a text: [1, n, h]."""
        found: torch.Tensor = self.model(torch.tensor([text])).last_hidden_state
        return found

    @torch.no_grad()
    def draft(self, tokens: list[int], count: int, states: torch.Tensor) -> list[int]:
        """What follows `tokens`, by the formula over the `states` of a text that begins so."""
        states = states[:, : len(tokens) - 1]
        said = list(tokens)
        for _ in range(count):
            made = self.made(states, self.model.embed_tokens(torch.tensor([said[1:]])))
            said.append(self.token_of(made[0, -1]))
            states = torch.cat((states, made[:, -1:]), 1)
        return said[len(tokens) :]

    @abstractmethod
    def made(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """The head's states, of those before and of embeddings, both [1, n, h]."""

    def token_of(self, made: torch.Tensor) -> int:
        return int(self.reference.lm_head(made).argmax())

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.reference.config.rms_norm_eps
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return scaled * self.weights[f"{name}.weight"]


def causal(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [1, n], and a mask [1, 1, n, n] of what is not seen."""
    mask = torch.full((length, length), float("-inf")).triu(1)
    return torch.arange(length)[None], mask[None, None]


class NextTokens(HeadFormula):
    """A layer of multi-token prediction."""

    def __init__(self, reference: PreTrainedModel) -> None:
        super().__init__(reference)
        self.layer = copy.deepcopy(self.model.layers[-1])
        shapes = {name: tuple(tensor.shape) for name, tensor in self.layer.state_dict().items()}
        norms = ("enorm", "hnorm", "shared_head.norm")
        shapes |= {f"{name}.weight": (self.hidden,) for name in norms}
        shapes["eh_proj.weight"] = (self.hidden, 2 * self.hidden)
        self.weights = random_weights(shapes)
        self.layer.load_state_dict({name: self.weights[name] for name in self.layer.state_dict()})

    def made(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        joined = torch.cat((self.norm(embedded, "enorm"), self.norm(states, "hnorm")), -1)
        x = joined @ self.weights["eh_proj.weight"].T
        places, mask = causal(x.shape[1])
        turns = self.model.rotary_emb(x, places)
        out = self.layer(x, attention_mask=mask, position_ids=places, position_embeddings=turns)
        return self.norm(out[0] if isinstance(out, tuple) else out, "shared_head.norm")

    def save_behind(self, folder: Path) -> None:
        """Into the checkpoint of the model, with the copies that published ones have."""
        number = self.reference.config.num_hidden_layers
        file = folder / "model.safetensors"
        tensors = load_file(file)
        # Published files hold one matrix for each expert.
        own = {f"model.layers.{number}.{name}": t for name, t in self._published().items()}
        copies = {
            "embed_tokens": "model.embed_tokens.weight",
            "shared_head.head": "lm_head.weight",
        }
        for name, source in copies.items():
            own[f"model.layers.{number}.{name}.weight"] = tensors[source].clone()
        save_file({**tensors, **own}, file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))

    def _published(self) -> Weights:
        found: Weights = {}
        for name, tensor in self.weights.items():
            parent, _, leaf = name.rpartition(".experts.")
            if leaf == "gate_up_proj":
                for expert, both in enumerate(tensor):
                    for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                        found[f"{parent}.experts.{expert}.{part}_proj.weight"] = half.clone()
            elif leaf == "down_proj":
                for expert, one in enumerate(tensor):
                    found[f"{parent}.experts.{expert}.down_proj.weight"] = one.clone()
            else:
                found[name] = tensor
        return found


class Eagle(HeadFormula):
    """EAGLE's head for a Llama, of other heads than the model's."""

    layer = "layers.0"
    heads, kv_heads, width = 6, 2, 8
    inputs = 1  # vectors that go into attention

    def __init__(self, reference: PreTrainedModel) -> None:
        super().__init__(reference)
        self.weights = random_weights(self.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, wide = self.hidden, 80
        q, kv = self.heads * self.width, self.kv_heads * self.width
        found: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
        layer = {
            "self_attn.q_proj": (q, self.inputs * hidden),
            "self_attn.k_proj": (kv, self.inputs * hidden),
            "self_attn.v_proj": (kv, self.inputs * hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "post_attention_layernorm": (hidden,),
        }
        return found | {f"{self.layer}.{name}.weight": shape for name, shape in layer.items()}

    def made(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        x = torch.cat((embedded, states), -1) @ self.weights["fc.weight"].T
        return self.behind(x, x)

    def behind(self, x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """`stream` behind the layer, whose attention reads x."""
        stream = stream + self._attention(x)
        normed = self.norm(stream, f"{self.layer}.post_attention_layernorm")
        gate, up = (self._times(normed, f"mlp.{name}_proj") for name in ("gate", "up"))
        return stream + self._times(torch.nn.functional.silu(gate) * up, "mlp.down_proj")

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = (
            self._times(x, f"self_attn.{name}_proj").view(length, -1, self.width).transpose(0, 1)
            for name in ("q", "k", "v")
        )
        angles = torch.arange(length)[:, None] / 10000.0 ** (
            torch.arange(0, self.width, 2) / self.width
        )
        angles = torch.cat((angles, angles), -1)

        def turned(heads: torch.Tensor) -> torch.Tensor:
            first, second = heads.chunk(2, -1)
            return heads * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 0) for t in (turned(k), v))
        scores = turned(q) @ k.transpose(1, 2) * self.width**-0.5 + causal(length)[1][0]
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(1, length, -1)
        return self._times(mixed, "self_attn.o_proj")

    def _times(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{self.layer}.{name}.weight"].T

    def config(self) -> dict[str, Any]:
        own = self.reference.config
        return {
            "architectures": ["LlamaForCausalLMEagle"],
            "model_type": "llama",
            "vocab_size": own.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": 80,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width,
            "rms_norm_eps": own.rms_norm_eps,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }

    def save(self, folder: Path, **changes: Any) -> str:
        """A checkpoint of the head, with the copy of the embedding that published ones have."""
        embedding = self.model.embed_tokens.weight.detach().clone()
        save_file({**self.weights, "embed_tokens.weight": embedding}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**self.config(), **changes}))
        return str(folder)


class Eagle3(Eagle):
    """EAGLE-3's, on what goes into the model's first three layers, for every second token."""

    layer = "midlayer"
    inputs = 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, known = self.hidden, self.reference.config.vocab_size // 2
        norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm")
        found = {**super().shapes(), "fc.weight": (hidden, 3 * hidden)}
        found |= {f"{name}.weight": (hidden,) for name in norms}
        return {**found, "lm_head.weight": (known, hidden)}

    def __init__(self, reference: PreTrainedModel) -> None:
        super().__init__(reference)
        vocab = reference.config.vocab_size
        self.weights["d2t"] = torch.arange(vocab // 2)
        self.weights["t2d"] = torch.arange(vocab) % 2 == 0

    @torch.no_grad()
    def states(self, text: list[int]) -> torch.Tensor:
        found = self.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        return torch.cat(found[:3], -1) @ self.weights["fc.weight"].T

    def made(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        both = (
            self.norm(embedded, "midlayer.input_layernorm"),
            self.norm(states, "midlayer.hidden_norm"),
        )
        return self.behind(torch.cat(both, -1), states)

    def token_of(self, made: torch.Tensor) -> int:
        return 2 * int((self.weights["lm_head.weight"] @ self.norm(made, "norm")).argmax())

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": self.reference.config.vocab_size // 2,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
        }
