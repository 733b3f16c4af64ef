"""SGLang's flags that do nothing here, and why: accepted with a warning, or refused.

Together with the fields of `ServerArgs` this is the whole command line. A flag is *accepted*
when what it tunes does not exist here and no reply depends on it; it is *refused* when going on
without it would change results, protection or outputs behind the user's back. Moving a flag
from one to the other, or making it work, is an edit of this data.

An entry is `names [values] [ok:noops]`, entries end with `;`: names joined with `|`, the main one
first; `V` one value, `V?` none or one, `V*` any number, absent: a switch; `ok:` values of a
refused flag that pass because they ask for what is the case anyway, joined with `,`.
"""

from __future__ import annotations

from sglang.srt.configs.flag_spec import Arity, FlagKind, FlagSpec

_ARITIES = {"V": Arity.ONE, "V?": Arity.OPTIONAL, "V*": Arity.MANY}

_ACCEPTED: tuple[tuple[str, str], ...] = (
    (
        "graphs are recorded without such tuning here, and no whole step is compiled",
        """
        --disable-cuda-graph-padding; --cuda-graph-max-bs-prefill V; --cuda-graph-bs V*;
        --cuda-graph-bs-decode V*; --cuda-graph-bs-prefill V*; --cuda-graph-backend-decode V;
        --cuda-graph-backend-prefill V; --enable-cudagraph-gc; --enable-profile-cuda-graph;
        --enable-breakable-cuda-graph; --debug-cuda-graph; --enable-piecewise-cuda-graph;
        --disable-piecewise-cuda-graph; --enforce-piecewise-cuda-graph;
        --piecewise-cuda-graph-max-tokens V; --piecewise-cuda-graph-tokens V*;
        --piecewise-cuda-graph-compiler V; --enable-torch-compile-debug-mode;
        --enable-layerwise-nvtx-marker; --pre-warm-nccl
        """,
    ),
    (
        "a draft is one chain of tokens here, from the longest newest match in the request's text",
        """
        --speculative-ngram-min-bfs-breadth V; --speculative-ngram-max-bfs-breadth V;
        --speculative-ngram-match-type V; --speculative-ngram-branch-length V;
        --speculative-ngram-capacity V; --speculative-ngram-max-trie-depth V
        """,
    ),
    (
        "ranks need no such tuning here",
        """
        --nccl-port V; --base-gpu-id V;
        --gpu-id-step V; --enable-mscclpp; --enable-torch-symm-mem;
        --enable-nccl-nvls; --enable-symm-mem; --enable-p2p-check; --enable-quant-communications;
        --enable-flashinfer-allreduce-fusion; --enable-aiter-allreduce-fusion;
        --flashinfer-allreduce-fusion-backend V; --disable-flashinfer-cutlass-moe-fp4-allgather;
        --prefill-round-robin-balance; --load-watch-interval V;
        --enable-dp-lm-head; --enable-attn-tp-input-scattered; --enable-two-batch-overlap;
        --enable-single-batch-overlap; --tbo-token-distribution-threshold V;
        --pp-max-micro-batch-size V; --pp-async-batch-depth V; --enable-dynamic-chunking;
        --enable-dynamic-batch-tokenizer; --dynamic-batch-tokenizer-batch-size V;
        --dynamic-batch-tokenizer-batch-timeout V; --numa-node V*; --elastic-ep-backend V;
        --elastic-ep-rejoin; --mooncake-ib-device V
        """,
    ),
    (
        "experts are computed by our kernels and split as other weights are",
        """
        --moe-a2a-backend V; --moe-runner-backend V; --moe-dense-tp-size V;
        --flashinfer-mxfp4-moe-precision V; --enable-flashinfer-cutlass-moe;
        --enable-flashinfer-trtllm-moe; --enable-ep-moe; --enable-deepep-moe; --deepep-mode V;
        --deepep-config V; --ep-num-redundant-experts V; --ep-dispatch-algorithm V;
        --init-expert-location V; --enable-eplb; --eplb-algorithm V;
        --eplb-rebalance-num-iterations V; --eplb-rebalance-layers-per-chunk V;
        --eplb-min-rebalancing-utilization-threshold V; --expert-distribution-recorder-mode V;
        --expert-distribution-recorder-buffer-size V; --enable-expert-distribution-metrics;
        --disable-shared-experts-fusion; --enforce-shared-experts-fusion;
        --n-share-experts-fusion V; --enable-fused-moe-sum-all-reduce; --record-nolora-graph
        """,
    ),
    (
        "recurrent states are pages of the one budget, and are computed in PyTorch",
        """
        --max-mamba-cache-size V; --mamba-full-memory-ratio V;
        --mamba-scheduler-strategy V; --mamba-track-interval V; --mamba-backend V;
        --enable-mamba-extra-buffer; --linear-attn-backend V; --linear-attn-decode-backend V;
        --linear-attn-prefill-backend V
        """,
    ),
    (
        "images have no such settings here; video and audio are not served",
        """
        --mm-attention-backend V; --mm-max-concurrent-calls V; --mm-per-request-timeout V;
        --mm-process-config V; --mm-enable-dp-encoder; --enable-mm-global-cache;
        --enable-broadcast-mm-inputs-process; --enable-prefix-mm-cache;
        --disable-fast-image-processor; --keep-mm-feature-on-device;
        --limit-mm-data-per-request V; --enable-adaptive-dispatch-to-encoder;
        --enable-precise-embedding-interpolation
        """,
    ),
    (
        "the kernel that it tunes does not exist here",
        """
        --triton-attention-num-kv-splits V; --triton-attention-split-tile-size V;
        --triton-attention-reduce-in-fp32; --flashinfer-mla-disable-ragged;
        --enable-flashinfer-mla; --enable-flashmla; --disable-mla; --disable-chunked-prefix-cache;
        --fp8-gemm-backend|--fp8-gemm-runner-backend V;
        --fp4-gemm-backend|--fp4-gemm-runner-backend V; --nsa-prefill-backend V;
        --nsa-decode-backend V; --dsa-prefill-backend V; --dsa-decode-backend V;
        --nsa-prefill-cp-mode V; --disable-flashinfer-autotune;
        --num-continuous-decode-steps V; --enable-pdmux; --pdmux-config-path V; --sm-group-num V
        """,
    ),
    (
        "adapters are PyTorch's products, and change places between steps",
        """
        --lora-backend V; --max-lora-chunk-size V; --enable-lora-overlap-loading
        """,
    ),
    (
        "weights stay where they were loaded",
        """
        --cpu-offload-gb V; --offload-group-size V; --offload-num-in-group V;
        --offload-prefetch-step V; --offload-mode V; --enable-weights-cpu-backup;
        --enable-draft-weights-cpu-backup; --weight-loader-disable-mmap;
        --weight-loader-prefetch-checkpoints; --weight-loader-prefetch-num-threads V;
        --weight-loader-drop-cache-after-load; --download-dir V;
        --file-storage-path|--file-storage-pth V;
        --remote-instance-weight-loader-start-seed-via-transfer-engine
        """,
    ),
    (
        "memory is one budget from which every layer group draws segments",
        """
        --swa-full-tokens-ratio V; --hybrid-kvcache-ratio V?; --disable-hybrid-swa-memory;
        --enable-unified-memory
        """,
    ),
    (
        "segments move whole and are read where they lie, on the host too",
        """
        --hicache-write-policy V; --hicache-io-backend V; --hicache-mem-layout V;
        --hicache-host-memory-mode V; --hicache-storage-prefetch-policy V;
        --hicache-storage-backend-extra-config V; --hierarchical-sparse-attention-extra-config V
        """,
    ),
    (
        "admission reserves each request's real need, and prefill always mixes with decode",
        """
        --schedule-conservativeness V; --enable-mixed-chunk; --prefill-max-requests V;
        --prefill-delayer-max-delay-passes V; --prefill-delayer-token-usage-low-watermark V;
        --enable-prefill-delayer; --scheduler-recv-interval V; --sleep-on-idle;
        --max-micro-batch-size V
        """,
    ),
    (
        "a request's limit of reasoning always holds, where there is a --reasoning-parser",
        """
        --enable-strict-thinking
        """,
    ),
    (
        "sessions of both kinds are always served, over the one prefix cache",
        """
        --enable-streaming-session; --enable-session-radix-cache
        """,
    ),
    (
        "one tokenizer and one detokenizer process do all text work",
        """
        --tokenizer-worker-num V; --detokenizer-worker-num V; --tokenizer-backend V;
        --enable-tokenizer-batch-encode; --disable-tokenizer-batch-encode;
        --disable-tokenizer-batch-decode; --disable-outlines-disk-cache
        """,
    ),
    (
        "this kind of logging, tracing or dumping does not exist here",
        """
        --log-requests; --log-requests-level V; --log-requests-format V; --log-requests-target V*;
        --uvicorn-access-log-exclude-prefixes V*; --crash-dump-folder V; --show-time-cost;
        --enable-request-time-stats-logging; --gc-warning-threshold-secs V; --gc-threshold V*;
        --enable-trace; --oltp-traces-endpoint|--otlp-traces-endpoint V;
        --soft-watchdog-timeout V; --enable-nan-detection; --warmups V; --stream-output
        """,
    ),
    (
        "/metrics has fixed buckets and one set of series",
        """
        --bucket-time-to-first-token V*; --bucket-inter-token-latency V*;
        --bucket-e2e-request-latency V*; --prompt-tokens-buckets V*;
        --generation-tokens-buckets V*; --collect-tokens-histogram;
        --enable-metrics-for-all-schedulers; --tokenizer-metrics-custom-labels-header V;
        --tokenizer-metrics-allowed-custom-labels|--tokenizer-metrics-allowed-customer-labels V*;
        --extra-metric-labels V; --enable-mfu-metrics; --stat-loggers V
        """,
    ),
)

_REFUSED: tuple[tuple[str, str], ...] = (
    (
        "quantised computation and other numeric formats are not served (GGUF files are)",
        """
        --torchao-config V; --modelopt-quant V;
        --modelopt-checkpoint-restore-path V; --modelopt-checkpoint-save-path V;
        --modelopt-export-path V; --quantize-and-serve; --enable-fp32-lm-head;
        --rl-quant-profile V
        """,
    ),
    (
        "recurrent states are kept in float32",
        """
        --mamba-ssm-dtype V ok:float32
        """,
    ),
    (
        "the model is divided by --tp-size alone",
        """
        --pp-size|--pipeline-parallel-size|--pp V ok:1;
        --ep-size|--expert-parallel-size|--ep V ok:1;
        --attn-cp-size|--attention-context-parallel-size V ok:1;
        --moe-dp-size|--moe-data-parallel-size V ok:1; --dcp-size V ok:1;
        --enable-dp-attention; --enable-dp-attention-local-control-broadcast;
        --enable-prefill-context-parallel; --enable-nsa-prefill-context-parallel;
        --enable-kv-cache-sharding; --use-ray
        """,
    ),
    (
        "drafts are chains of tokens from a request's own text or a local draft model, and a token "
        "is taken where the model says the same",
        """
        --speculative-draft-model-revision V; --speculative-token-map V;
        --speculative-accept-threshold-single V; --speculative-accept-threshold-acc V;
        --speculative-attention-mode V; --speculative-draft-attention-backend V;
        --speculative-moe-runner-backend V; --speculative-moe-a2a-backend V;
        --speculative-dflash-block-size V; --speculative-adaptive;
        --speculative-adaptive-config V; --enable-multi-layer-eagle
        """,
    ),
    (
        "prefill and decode run in one server",
        """
        --disaggregation-mode V ok:null; --disaggregation-transfer-backend V;
        --disaggregation-bootstrap-port V; --disaggregation-ib-device V;
        --disaggregation-decode-tp V; --disaggregation-decode-dp V; --disaggregation-prefill-pp V;
        --disaggregation-decode-enable-offload-kvcache; --disaggregation-decode-enable-fake-auto;
        --disaggregation-decode-polling-interval V; --num-reserved-decode-tokens V;
        --encoder-only; --language-only; --encoder-transfer-backend V; --encoder-urls V*
        """,
    ),
    (
        "what lies below memory is the host's (--enable-hierarchical-cache) or a disk "
        "(--kv-disk-path)",
        """
        --hicache-storage-backend V
        """,
    ),
    (
        "the cache service or memory mode that it asks for does not exist here",
        """
        --enable-lmcache; --enable-flexkv; --enable-hisparse; --hisparse-config V;
        --enable-double-sparsity; --ds-channel-config-path V; --ds-heavy-channel-num V;
        --ds-heavy-token-num V; --ds-heavy-channel-type V; --ds-sparse-decode-threshold V;
        --enable-memory-saver; --radix-cache-backend V
        """,
    ),
    (
        "whoever has to give up its place is the least urgent, then who has the least to redo",
        """
        --retraction-policy V ok:length,priority
        """,
    ),
    (
        "templates and tools of this kind do not exist here",
        """
        --tool-server V;
        --hf-chat-template-name V;
        --enable-custom-logit-processor;
        --dllm-algorithm V; --dllm-algorithm-config V
        """,
    ),
    (
        "replies of this kind do not exist here",
        """
        --enable-return-hidden-states;
        --enable-return-routed-experts; --multi-item-scoring-delimiter V
        """,
    ),
    (
        "the server speaks plain HTTP/1.1; put a proxy in front",
        """
        --ssl-keyfile V; --ssl-certfile V; --ssl-ca-certs V; --ssl-keyfile-password V;
        --enable-ssl-refresh; --fastapi-root-path V; --grpc-mode;
        --smg-grpc-port V; --grpc-http-sidecar-port V; --enable-http2
        """,
    ),
    (
        "one backend computes all attention; sampling, models and loaders are the built-in ones",
        """
        --prefill-attention-backend V ok:torch_native;
        --decode-attention-backend V ok:torch_native; --sampling-backend V ok:pytorch,auto;
        --model-impl V ok:auto,sglang; --tokenizer-mode V ok:auto;
        --model-config-parser V ok:auto; --model-loader-extra-config V ok:{};
        --enable-deterministic-inference; --rl-on-policy-target V; --custom-weight-loader V*;
        --checkpoint-engine-wait-weights-before-ready;
        --remote-instance-weight-loader-seed-instance-ip V;
        --remote-instance-weight-loader-seed-instance-service-port V;
        --remote-instance-weight-loader-send-weights-group-ports V;
        --remote-instance-weight-loader-backend V; --decrypted-config-file V;
        --decrypted-draft-config-file V; --delete-ckpt-after-loading; --forward-hooks V;
        --kt-weight-path V; --kt-method V; --kt-cpuinfer V; --kt-threadpool-count V;
        --kt-num-gpu-experts V; --kt-max-deferred-experts-per-token V
        """,
    ),
    (
        "models are local paths, and nothing is downloaded",
        """
        --revision V
        """,
    ),
    (
        "nothing would be written",
        """
        --debug-tensor-dump-output-folder V; --debug-tensor-dump-layers V*;
        --debug-tensor-dump-input-file V; --debug-tensor-dump-inject V;
        --debug-tensor-dump-prefill-only; --export-metrics-to-file;
        --export-metrics-to-file-dir V
        """,
    ),
)


def _rows(kind: FlagKind, table: tuple[tuple[str, str], ...]) -> tuple[FlagSpec, ...]:
    return tuple(
        _row(kind, reason, entry.split())
        for reason, entries in table
        for entry in entries.split(";")
    )


def _row(kind: FlagKind, reason: str, words: list[str]) -> FlagSpec:
    name, *aliases = words[0].split("|")
    arity, noops = Arity.SWITCH, ""
    for word in words[1:]:
        if word.startswith("ok:"):
            noops = word.removeprefix("ok:")
        else:
            arity = _ARITIES[word]
    return FlagSpec(
        name=name,
        help=reason,
        kind=kind,
        group=reason,
        aliases=tuple(aliases),
        arity=arity,
        noops=tuple(noops.split(",")) if noops else (),
    )


OTHER_FLAGS: tuple[FlagSpec, ...] = (
    *_rows(FlagKind.ACCEPTED, _ACCEPTED),
    *_rows(FlagKind.REFUSED, _REFUSED),
)
