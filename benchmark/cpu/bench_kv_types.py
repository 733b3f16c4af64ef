"""How far next-token log probabilities move with the type of the KV cache. JSON on stdout.

    python benchmark/cpu/bench_kv_types.py --model-path MODEL [--markdown]

One prompt of English text through an engine for each type, everything else in float32; differences
are to a KV cache of float32, over the log probabilities of the prompt's own tokens. Chunks of 64
tokens, so that most tokens read their past from the cache.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import numpy.typing as npt

import sglang

REFERENCE = "float32"
KINDS = ("bfloat16", "int8", "fp8_e4m3", "fp8_e5m2")
TEXT = (
    "The steam engine is older than the factories that it is known for. Hero of Alexandria wrote "
    "of a ball that turned by steam. Thomas Savery sold a pump, Thomas Newcomen built an engine "
    "for mines, and James Watt gave it a condenser of its own, which saved most of the coal. "
) * 4


def logprobs(model_path: str, kind: str) -> npt.NDArray[np.float64]:
    """Of every prompt token but the first, through a cache of `kind`."""
    engine = sglang.Engine(
        model_path=model_path,
        dtype="float32",
        quantization="none",
        kv_cache_dtype=kind,
        kv_memory_budget="256MiB",
        chunked_prefill_size=64,
        disable_radix_cache=True,
        log_level="error",
    )
    try:
        params = {"max_new_tokens": 1, "temperature": 0}
        answer = engine.generate(TEXT, params, return_logprob=True, logprob_start_len=0)
    finally:
        engine.shutdown()
    pairs = answer["meta_info"]["input_token_logprobs"]
    return np.array([pair[0] for pair in pairs if pair[0] is not None])


def differences(model_path: str) -> list[dict[str, object]]:
    """A row for each of KINDS: mean, root mean square and largest difference."""
    expected = logprobs(model_path, REFERENCE)
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        off = np.abs(logprobs(model_path, kind) - expected)
        rows.append(
            {
                "kv_cache_dtype": kind,
                "tokens": len(off),
                "mean": round(float(off.mean()), 5),
                "rms": round(float(np.sqrt((off**2).mean())), 5),
                "max": round(float(off.max()), 5),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--markdown", action="store_true", help="the table of docs/benchmarks")
    args = parser.parse_args()
    rows = differences(args.model_path)
    if not args.markdown:
        print(json.dumps(rows, indent=2))
        return
    print("| KV cache | mean | root mean square | largest |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['kv_cache_dtype']} | {row['mean']} | {row['rms']} | {row['max']} |")


if __name__ == "__main__":
    main()
