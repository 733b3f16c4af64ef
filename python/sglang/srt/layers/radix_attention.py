"""`RadixAttention`: one layer's attention over the paged KV cache, whatever the backend.

Models call it with the new tokens' q, k and v. It stores k and v at the slots that memory
granted, then lets the batch's backend attend over every token that the request's table holds. It
owns no state but its shape and the scales of what is stored.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.rotary_embedding import Rotation
from sglang.srt.layers.scaled import scaled
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class RadixAttention(nn.Module):
    """Attention of layer `layer_id` with this rank's heads.

    `scaling` multiplies q k^T. In tokens, at most one of both: with `sliding_window` a query at
    position p sees positions > p - window, with `attention_chunk` c those from p - p % c on (None:
    all). `logit_cap` c > 0 turns a score s into c * tanh(s / c). Query head h reads kv head
    h // (num_heads / num_kv_heads). `sinks` [H] are logits of a key without value, one a head,
    that every query sees: they take their share of the softmax and give nothing (None: no such
    key). With `values_in_keys` v is the first numbers of k's heads, as in latent attention, and
    what is stored of k is all. Raises ValueError for impossible shapes.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        *,
        sliding_window: int | None = None,
        attention_chunk: int | None = None,
        v_head_dim: int | None = None,
        logit_cap: float = 0.0,
        sinks: nn.Parameter | None = None,
        values_in_keys: bool = False,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads over {num_kv_heads} kv heads")
        if sliding_window is not None and attention_chunk is not None:
            raise ValueError("a layer has a sliding window or chunks, not both")
        for name, span in (
            ("sliding_window", sliding_window),
            ("attention_chunk", attention_chunk),
        ):
            if span is not None and span < 1:
                raise ValueError(f"{name} must be at least 1, not {span}")
        if sinks is not None and tuple(sinks.shape) != (num_heads,):
            raise ValueError(f"sinks of shape {tuple(sinks.shape)} for {num_heads} query heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.scaling = scaling
        self.layer_id = layer_id
        self.sliding_window = sliding_window
        self.attention_chunk = attention_chunk
        self.logit_cap = logit_cap
        self.sinks: torch.Tensor | None = sinks
        self.values_in_keys = values_in_keys
        self.k_scale = self.v_scale = 1.0

    def set_kv_scales(self, k_scale: float, v_scale: float) -> None:
        """Let the cache hold k / k_scale and v / v_scale; both are above 0.

        Scores are products with what is stored, so `scaling` takes `k_scale` up, before caps, sinks
        and log-sum-exps; what attention gives is linear in v, so `forward` multiplies its result,
        where the backend has not done that. Where v stands in k, `k_scale` is for both.
        """
        if self.values_in_keys:
            v_scale = k_scale
        self.scaling *= k_scale / self.k_scale
        self.k_scale, self.v_scale = k_scale, v_scale

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool = False,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Store k [T, G*D] and v [T, G*Dv]; attention of q [R, H*D] as [R, H*Dv] in q's dtype.

        R is T, or the rows of `forward_batch.logits_rows` when `rows_pruned` (the last layer,
        where only they go on). With a `rotation` q and k are still to be turned, which the batch's
        backend must be one for (`rotates`). Side effect: the slots `out_cache_loc` of this layer's
        group hold k and v.
        """
        backend: AttentionBackend = forward_batch.attn_backend
        if rotation is not None:
            q = backend.rotate_and_store(q, k, v, rotation, self, forward_batch)
        else:
            backend.store(
                k.view(-1, self.num_kv_heads, self.head_dim),
                v.view(-1, self.num_kv_heads, self.v_head_dim),
                self,
                forward_batch,
            )
        heads = q.view(-1, self.num_heads, self.head_dim)
        out = backend.forward(heads, self, forward_batch, rows_pruned=rows_pruned)
        is_done = self.v_scale == 1.0 or backend.scales_values
        return out if is_done else scaled(out, self.v_scale)
