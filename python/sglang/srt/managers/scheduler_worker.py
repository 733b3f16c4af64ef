"""What computes a scheduler's steps: a worker that samples, or one that pools."""

from __future__ import annotations

from dataclasses import replace

from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.pooling_worker import PoolingWorker
from sglang.srt.managers.scheduler_device import make_recorder, make_sampler
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.draft_head import DraftHead
from sglang.srt.model_executor.draft_model import Drafter
from sglang.srt.model_executor.lora_places import AdapterPlaces
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.pooled import PooledModel
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.device import DeviceRuntime

AnyWorker = TpModelWorker | PoolingWorker


def args_for_pooling(args: ServerArgs, pooling: PoolingConfig | None) -> ServerArgs:
    """The settings without what a server that pools has no use for; as they are for others.

    Nothing is decoded, so no step is recorded. Where vectors need every hidden state of a prompt no
    prefix is ever taken from the cache (`PoolingState.needs_all_rows`), so none is put there.
    """
    if pooling is None:
        return args
    if args.serves_lora:
        raise ValueError("--enable-lora: adapters are served of models that generate only")
    if args.speculative_algorithm not in (None, "NGRAM"):
        raise ValueError("--speculative-algorithm: a model that gives vectors generates nothing")
    args = replace(args, disable_cuda_graph=True)
    if pooling.whole:
        # Attention is the model's own, and reads nothing from the pool.
        args = replace(args, chunked_prefill_size=-1, attention_backend="torch_native")
        if args.kv_canary != "off":
            raise ValueError("--kv-canary: an encoder keeps no K and V to be checked")
    if pooling.mode == "last":
        return args
    return replace(
        args,
        disable_radix_cache=True,
        max_cached_tokens=None,
        schedule_policy="fcfs",
    )


def make_worker(
    args: ServerArgs,
    model: CausalLM,
    backend: AttentionBackend,
    runtime: DeviceRuntime,
    pool: MHATokenToKVPool,
    num_rows: int,
    places: AdapterPlaces | None,
    drafter: Drafter | None = None,
) -> AnyWorker:
    """The worker that `model` needs. Side effect: on a device its steps are recorded.

    `num_rows` are the KV rows of requests, and one; `places` those of LoRA adapters (None: none are
    served), `drafter` None: no model drafts.
    """
    if isinstance(model, PooledModel):
        return PoolingWorker(model, runtime)
    reads_hidden = isinstance(drafter, DraftHead)
    recorder = None
    if not (reads_hidden and runtime.is_async):  # a graph keeps no hidden states
        recorder = make_recorder(args, model, backend, runtime, pool, places)
    runner = ModelRunner(model, LogitsProcessor(runtime=runtime), recorder, places)
    return TpModelWorker(runner, make_sampler(args, runtime), num_rows, runtime, drafter)
