"""Whether and how tokens are drafted, to be verified several in a step.

A part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.flag_spec import flag

SPECULATION = "Speculative decoding"

DEFAULT_DRAFT_TOKENS = 8
DEFAULT_MIN_MATCH = 2
DEFAULT_MAX_MATCH = 12


@dataclass(frozen=True)
class SpeculativeArgs:
    """Settings of speculative decoding; docs/speculative_decoding.md has the rules."""

    speculative_algorithm: str | None = flag(
        None,
        "Draft tokens and verify them in one step; the tokens that come out are the same. NGRAM "
        "drafts from a request's own prompt and output.",
        group=SPECULATION,
        choices=("NGRAM",),
        default_text="off",
    )
    speculative_num_draft_tokens: int | None = flag(
        None,
        "Most tokens that are drafted for a request in one step.",
        group=SPECULATION,
        parse=int,
        default_text=str(DEFAULT_DRAFT_TOKENS),
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
    sizes = {
        "--speculative-num-draft-tokens": args.speculative_num_draft_tokens,
        "--speculative-ngram-min-match-window-size": args.speculative_ngram_min_match_window_size,
        "--speculative-ngram-max-match-window-size": args.speculative_ngram_max_match_window_size,
    }
    if args.speculative_algorithm is None:
        for name, value in sizes.items():
            if value is not None:
                raise ValueError(f"{name} needs --speculative-algorithm")
        return
    least, most = ngram_window(args)
    if least > most:
        raise ValueError(
            f"--speculative-ngram-min-match-window-size {least} is above "
            f"--speculative-ngram-max-match-window-size {most}"
        )


def ngram_window(args: Any) -> tuple[int, int]:
    """Least and most newest tokens of a match."""
    least = args.speculative_ngram_min_match_window_size
    most = args.speculative_ngram_max_match_window_size
    least = DEFAULT_MIN_MATCH if least is None else least
    return least, max(least, DEFAULT_MAX_MATCH) if most is None else most
