"""Runs one model over a small real KV pool, without scheduler, segments or prefix tree.

A `Sequence` owns pages that this file hands out in a scattered order; `Runner.step` packs any mix
of prefill chunks and decode tokens into one `ForwardBatch`. Pages may be shared between sequences
(prefix reuse). Everything that the model sees is what the engine would give it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.sparse_cpu_backend import SparseCpuBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.index_planes import IndexPlanes
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.utils.progress import Progress


class PlainPool:
    """K and V per layer in ordinary tensors; unwritten slots are NaN, so a stray read shows."""

    def __init__(self, spec: KVCacheSpec, num_slots: int, dtype: torch.dtype) -> None:
        self.spec = spec
        shape = (num_slots, spec.kv_heads)
        nan = float("nan")
        layers = range(spec.num_layers)
        self._k = [torch.full((*shape, spec.head_dim), nan, dtype=dtype) for _ in layers]
        self._v = [torch.full((*shape, spec.v_head_dim), nan, dtype=dtype) for _ in layers]
        if spec.values_in_keys:
            self._v = [keys[..., : spec.v_head_dim] for keys in self._k]
        self.index_planes = IndexPlanes(
            {
                n: torch.full((num_slots, 1, spec.index_dim), nan, dtype=dtype)
                for n in spec.index_layers
            }
        )

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self._k[layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self._v[layer_id]

    def set_kv_buffer(
        self,
        layer_id: int,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        self._k[layer_id].index_copy_(0, loc, round_to(k, self._k[layer_id].dtype, k_scale))
        self._v[layer_id].index_copy_(0, loc, round_to(v, self._v[layer_id].dtype, v_scale))


@dataclass(frozen=True)
class TableView:
    """A block table as the backend sees it."""

    page_ids: npt.NDArray[np.int32]
    first_run: tuple[int, int]
    first_position: int = 0


@dataclass
class Sequence:
    """Tokens of one request, its pages, and how many tokens have K and V."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0


class Runner:
    """A model, a pool and a page list. `page_size` in tokens, `num_pages` in all."""

    def __init__(
        self, model: CausalLM, *, page_size: int, num_pages: int = 64, dtype: torch.dtype
    ) -> None:
        config: ModelConfig = model.config
        self.model = model
        self.page_size = page_size
        self.spec = KVCacheSpec(
            groups=(KVGroupSpec(layers=tuple(range(config.num_layers))),),
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            dtype=str(dtype).removeprefix("torch."),
            page_size=page_size,
            values_in_keys=config.latent is not None,
            index_dim=0 if config.index is None else config.index.head_dim,
            index_layers=() if config.index is None else config.index.layers,
        )
        self.pool = PlainPool(self.spec, num_pages * page_size, dtype)
        self.backend: AttentionBackend = TorchNativeAttnBackend(self.spec)
        if config.index is not None:
            tokens = TorchNativeAttnBackend(replace(self.spec, page_size=1))
            self.backend = SparseCpuBackend(self.backend, tokens, config.index.topk)
        self.progress = Progress()
        # Pairs of neighbours in a shuffled order: some runs are longer than a page, none is all.
        pairs = np.random.default_rng(5).permutation(np.arange(1, num_pages // 2))
        self._free = [int(page) for pair in pairs for page in (2 * pair, 2 * pair + 1)]

    def share_prefix(self, source: Sequence, tokens: list[int]) -> Sequence:
        """A new sequence that reuses the full pages of the prefix it has in common."""
        common = 0
        limit = min(source.num_computed, len(tokens) - 1)
        while common < limit and source.tokens[common] == tokens[common]:
            common += 1
        pages = common // self.page_size
        return Sequence(tokens, source.pages[:pages], pages * self.page_size)

    def step(
        self,
        parts: list[tuple[Sequence, int]],
        *,
        all_logits: bool = False,
    ) -> list[torch.Tensor]:
        """Compute the next n tokens of every (sequence, n).

        Returns, per part, float32 logits [rows, vocab]: of all n rows with `all_logits`, else of
        the last row where the part reaches the end of its tokens, else of no row.
        """
        batch, owners = self._pack(parts, all_logits)
        with torch.inference_mode():
            logits = self.model.lm_head(self.model(batch)).float()
        for seq, n in parts:
            seq.num_computed += n
        return [logits[owners == b] for b in range(len(parts))]

    def greedy(
        self, prompts: list[list[int]], num_new: int, chunk: int = 10_000
    ) -> list[list[int]]:
        """Greedy continuations of `num_new` tokens, all prompts together.

        Prompts enter one per step in chunks of `chunk` tokens while earlier ones already decode,
        so that most steps mix prefill and decode.
        """
        return self.continue_greedily([Sequence(list(p)) for p in prompts], num_new, chunk)

    def continue_greedily(
        self, sequences: list[Sequence], num_new: int, chunk: int = 10_000
    ) -> list[list[int]]:
        goals = [len(seq.tokens) + num_new for seq in sequences]
        turn = 0
        while True:
            parts = [
                (seq, min(chunk, len(seq.tokens) - seq.num_computed))
                for seq, goal in zip(sequences[: turn + 1], goals, strict=False)
                if len(seq.tokens) < goal
            ]
            if not parts and turn >= len(sequences):
                break
            for (seq, _), logits in zip(parts, self.step(parts) if parts else [], strict=True):
                if len(logits):
                    seq.tokens.append(int(logits[-1].argmax()))
            turn += 1
        return [seq.tokens[-num_new:] for seq in sequences]

    def _pack(
        self, parts: list[tuple[Sequence, int]], all_logits: bool
    ) -> tuple[ForwardBatch, npt.NDArray[np.int64]]:
        page = self.page_size
        ids, positions, slots, wanted, owners, tables = [], [], [], [], [], []
        row = 0
        for b, (seq, n) in enumerate(parts):
            end = seq.num_computed + n
            while len(seq.pages) * page < end:
                seq.pages.append(self._free.pop(0))
            where = np.arange(seq.num_computed, end)
            ids += seq.tokens[seq.num_computed : end]
            positions += where.tolist()
            slots += (np.asarray(seq.pages)[where // page] * page + where % page).tolist()
            if all_logits:
                rows = range(row, row + n)
            else:
                rows = range(row + n - 1, row + n) if end == len(seq.tokens) else range(0)
            wanted += rows
            owners += [b] * len(rows)
            tables.append(TableView(np.asarray(seq.pages, np.int32), self._first_run(seq.pages)))
            row += n
        lens = np.asarray([n for _, n in parts], np.int64)
        prefix = np.asarray([seq.num_computed for seq, _ in parts], np.int64)
        geometry = BatchGeometry(
            seq_lens=prefix + lens,
            extend_prefix_lens=prefix,
            extend_seq_lens=lens,
            q_starts=np.cumsum(lens) - lens,
            logits_rows=np.asarray(wanted, np.int64),
            block_tables=(tuple(tables),),
            page_size=page,
        )
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if max(lens) == 1 else ForwardMode.MIXED,
            input_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            geometry=geometry,
            out_cache_loc=(torch.tensor(slots, dtype=torch.int64),),
            logits_rows=torch.tensor(wanted, dtype=torch.int64),
            token_to_kv_pool=self.pool,
            attn_backend=self.backend,
            attn_plan=self.backend.plan(geometry),
            progress=self.progress,
        )
        return batch, np.asarray(owners, np.int64)

    def _first_run(self, pages: list[int]) -> tuple[int, int]:
        count = 1
        while count < len(pages) and pages[count] == pages[0] + count:
            count += 1
        return (pages[0] * self.page_size, count * self.page_size)
