"""Llama 4: chunked layers that turn, global layers that don't, experts.

The decoder is Llama's; attention and MLP are chosen per layer from `ModelConfig`. In checkpoints
of the multimodal model the text part's names begin with `language_model.`; vision weights go to
`llama4_vision`, or are passed over. Source: the published configuration and documentation of
Llama-4-Scout and Maverick.

Shape letters: T packed new tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention_temperature import AttentionTemperature
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.managers.req_images import ImagePart
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import Place
from sglang.srt.models.llama import (
    DecoderOptions,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
)
from sglang.srt.models.llama4_vision import VisionTower
from sglang.srt.models.mixture import MixtureForCausalLM, MixtureOptions
from sglang.srt.models.multimodal import text_weights
from sglang.srt.utils.native import kernels_for


class Llama4Attention(LlamaAttention):
    """Turned and normalised heads in layers with positions, tempered queries in the others."""

    rotates_last = False

    def __init__(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        layer_id: int,
        rotary_emb: RotaryEmbedding | None,
        temperature: AttentionTemperature | None,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, options, layer_id, rotary_emb, parallel, dtype)
        self.norm_eps = config.rms_norm_eps if config.weightless_qk_norm else None
        self.temperature = temperature
        self.head_ones: torch.Tensor
        self.register_buffer(
            "head_ones", torch.ones(config.head_dim, dtype=dtype), persistent=False
        )

    def place(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `LlamaAttention.place`; queries and keys are not placed alike here."""
        q, k, v = self.qkv_proj.split(qkv)
        return self.place_queries(q, positions), self.place_keys(k, positions), v

    def place_queries(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.rotary_emb is not None:
            return self.place_keys(q, positions)
        return q if self.temperature is None else self.temperature(positions, q)

    def place_keys(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.rotary_emb is None:
            return k
        turned = self.rotary_emb.rotate(positions, k)
        if self.norm_eps is None:
            return turned
        kernels = kernels_for(turned, self.head_ones)
        if kernels is not None:
            normed, _ = kernels.rms_norm(
                turned.view(-1, self.head_dim),
                self.head_ones,
                self.norm_eps,
                num_threads=torch.get_num_threads(),
            )
            out: torch.Tensor = normed.view(k.shape)
            return out
        heads = turned.float().view(len(k), k.shape[1] // self.head_dim, self.head_dim)
        return F.rms_norm(heads, (self.head_dim,), eps=self.norm_eps).flatten(1).to(k.dtype)


class Llama4DecoderLayer(LlamaDecoderLayer):
    """Llama's layer, whose MLP checkpoints call `feed_forward`."""

    mlp_name = "feed_forward"


class Llama4ForCausalLM(MixtureForCausalLM):
    """The whole text model; arguments and errors as for `LlamaForCausalLM`."""

    mixture = MixtureOptions("router", "shared_expert", ExpertLayout.MERGED)

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        rotary_emb = get_rope(
            config.head_dim,
            config.rope,
            config.max_position_embeddings,
            dtype,
            interleaved=config.interleaved_rope,
        )
        tuned = config.temperature
        temperature = None if tuned is None else AttentionTemperature(tuned)
        layers = []
        for layer_id, turns in enumerate(config.layer_rope):
            turn = rotary_emb if turns else None
            attention = Llama4Attention(
                config, options, layer_id, turn, temperature, parallel, dtype
            )
            mlp = self.make_mlp(config, layer_id, parallel, dtype)
            layers.append(Llama4DecoderLayer(config, attention, mlp, dtype))
        return LlamaModel(config, layers, parallel, dtype)


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """A multimodal checkpoint: the text model, and the vision tower where images are served."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        super().__init__(config, parallel, dtype)
        self.vision: VisionTower | None = None
        if config.vision is not None:
            self.vision = VisionTower(config.vision, config.hidden_size, dtype)

    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """See `CausalLM.forward`.

        Side effects: images that the batch begins with are encoded, rows of those that it ends
        with are let go.
        """
        if not forward_batch.image_parts:
            return super().forward(forward_batch)
        embedded = self.model.embed(forward_batch.input_ids)
        for part in forward_batch.image_parts:
            self._put_image(part, embedded, forward_batch.progress.tick)
        hidden: torch.Tensor = self.model(forward_batch, embedded)
        return hidden

    def _put_image(self, part: ImagePart, embedded: torch.Tensor, tick: Callable[[], None]) -> None:
        image = part.image
        if image.rows is None:
            if self.vision is None:
                raise InvariantError("an image came to a model without a vision tower")
            image.rows = self.vision.encode(image.pixels, tick)
        at = torch.from_numpy(part.at).to(embedded.device)
        some = image.rows[part.first : part.first + len(part.at)]
        embedded.index_copy_(0, at, some.to(embedded.dtype))
        if part.is_last:
            image.rows = None

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names; vision weights go to the
        vision tower, or nowhere without one."""
        vision = self.vision
        super().load_weights(text_weights(weights, None if vision is None else vision.load))
        if vision is not None:
            vision.check_complete()

    def _places(self) -> dict[str, Place]:
        # The vision tower fills itself: its modules are not made of our layers.
        own = super()._places().items()
        return {name: place for name, place in own if not name.startswith("vision.")}
