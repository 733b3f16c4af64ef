"""Whether and how tokens are drafted, to be verified several in a step.

A part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.flag_spec import flag

SPECULATION = "Speculative decoding"

DEFAULT_DRAFT_TOKENS = 8
DEFAULT_STEPS = 4
DEFAULT_MIN_MATCH = 2
DEFAULT_MAX_MATCH = 12


@dataclass(frozen=True)
class SpeculativeArgs:
    """Settings of speculative decoding; docs/speculative_decoding.md has the rules."""

    speculative_algorithm: str | None = flag(
        None,
        "Draft tokens and verify them in one step; the tokens that come out are the same. NGRAM "
        "drafts from a request's own prompt and output, STANDALONE by a smaller model, EAGLE and "
        "EAGLE3 by a head on the hidden states of a Llama, EAGLE without a path or NEXTN by the "
        "model's own layer of multi-token prediction (DeepSeek-V3).",
        group=SPECULATION,
        choices=("NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN"),
        default_text="off",
    )
    speculative_draft_model_path: str | None = flag(
        None,
        "Directory or GGUF file of the draft model, which must have the model's vocabulary, or "
        "directory of a draft head.",
        group=SPECULATION,
        aliases=("--speculative-draft-model",),
        metavar="PATH",
    )
    speculative_draft_load_format: str | None = flag(
        None,
        "--load-format of the draft model.",
        group=SPECULATION,
        default_text="that of the model",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    speculative_draft_model_quantization: str | None = flag(
        None,
        "--quantization of the draft model.",
        group=SPECULATION,
        default_text="as for --quantization",
        choices=(
            *("gguf", "int8", "mxfp4", "fp8", "gptq", "gptq_marlin", "awq", "awq_marlin"),
            *("compressed-tensors", "none"),
        ),
    )
    speculative_num_steps: int | None = flag(
        None,
        "Most tokens that the draft model says of a request in one step.",
        group=SPECULATION,
        parse=int,
        default_text=str(DEFAULT_STEPS),
        metavar="N",
        minimum=1,
        maximum=63,
    )
    speculative_eagle_topk: int | None = flag(
        None,
        "Tokens that the draft model goes on from at each place: drafts are chains here, so 1.",
        group=SPECULATION,
        parse=int,
        default_text="1",
        metavar="N",
        minimum=1,
        maximum=1,
    )
    speculative_num_draft_tokens: int | None = flag(
        None,
        "Most tokens of a request that one step verifies: NGRAM drafts so many, and with a draft "
        "model the token before them counts as well.",
        group=SPECULATION,
        parse=int,
        default_text=f"{DEFAULT_DRAFT_TOKENS}, or --speculative-num-steps and one",
        metavar="N",
        minimum=1,
        maximum=64,
    )
    speculative_ngram_min_match_window_size: int | None = flag(
        None,
        "Least newest tokens that must have stood in the request's text before.",
        group=SPECULATION,
        parse=int,
        default_text=str(DEFAULT_MIN_MATCH),
        metavar="N",
        minimum=1,
        maximum=64,
    )
    speculative_ngram_max_match_window_size: int | None = flag(
        None,
        "Most newest tokens that are compared, to find the longest match.",
        group=SPECULATION,
        parse=int,
        default_text=str(DEFAULT_MAX_MATCH),
        metavar="N",
        minimum=1,
        maximum=64,
    )


def check_speculation(args: Any) -> None:
    """Raise ValueError with one line when a flag of drafting could have no effect."""
    of_ngram = {
        "--speculative-ngram-min-match-window-size": args.speculative_ngram_min_match_window_size,
        "--speculative-ngram-max-match-window-size": args.speculative_ngram_max_match_window_size,
    }
    of_models = {
        "--speculative-draft-model-path": args.speculative_draft_model_path,
        "--speculative-draft-load-format": args.speculative_draft_load_format,
        "--speculative-draft-model-quantization": args.speculative_draft_model_quantization,
        "--speculative-num-steps": args.speculative_num_steps,
        "--speculative-eagle-topk": args.speculative_eagle_topk,
    }
    of_both = {"--speculative-num-draft-tokens": args.speculative_num_draft_tokens}
    if args.speculative_algorithm is None:
        _refuse_given({**of_ngram, **of_models, **of_both}, "--speculative-algorithm")
    elif args.speculative_algorithm == "NGRAM":
        _refuse_given(of_models, "--speculative-algorithm STANDALONE or EAGLE")
        least, most = ngram_window(args)
        if least > most:
            raise ValueError(
                f"--speculative-ngram-min-match-window-size {least} is above "
                f"--speculative-ngram-max-match-window-size {most}"
            )
    else:
        _refuse_given(of_ngram, "--speculative-algorithm NGRAM")
        _check_draft_model(args)


def _check_draft_model(args: Any) -> None:
    name = f"--speculative-algorithm {args.speculative_algorithm}"
    path = args.speculative_draft_model_path
    if args.speculative_algorithm in ("STANDALONE", "EAGLE3") and path is None:
        raise ValueError(f"{name} needs --speculative-draft-model-path")
    if args.speculative_algorithm == "NEXTN" and path is not None:
        raise ValueError(f"{name} drafts by the model's own layer: drop the draft model's path")
    if args.speculative_num_draft_tokens == 1:
        raise ValueError("--speculative-num-draft-tokens 1 leaves a draft model nothing to say")
    if args.kv_parallel_size > 1:
        raise ValueError(f"{name} and --kv-parallel-size don't go together, so far")
    if args.kv_canary != "off":
        raise ValueError(f"{name}: --kv-canary can't know what a draft model reads; drop it")


def _refuse_given(flags: Mapping[str, object], needed: str) -> None:
    """Raise ValueError when one of the flags is given that do nothing without what is `needed`."""
    for name, value in flags.items():
        if value is not None:
            raise ValueError(f"{name} needs {needed}")


def draft_length(args: Any) -> int:
    """Most tokens that a draft model says of a request in one step."""
    steps: int | None = args.speculative_num_steps
    verified: int | None = args.speculative_num_draft_tokens
    if verified is None:
        return DEFAULT_STEPS if steps is None else steps
    return verified - 1 if steps is None else min(steps, verified - 1)


def ngram_window(args: Any) -> tuple[int, int]:
    """Least and most newest tokens of a match."""
    least = args.speculative_ngram_min_match_window_size
    most = args.speculative_ngram_max_match_window_size
    least = DEFAULT_MIN_MATCH if least is None else least
    return least, max(least, DEFAULT_MAX_MATCH) if most is None else most
