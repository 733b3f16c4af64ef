"""Flags of a benchmark's load, and the tokenizer it is made with: what two commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang.bench.serving_load import DATASETS, LoadShape
from sglang.srt.tokenizer.loader import load_tokenizer


class TokenizerCodec:
    """A tokenizer as a load sees it. Raises ValueError when there is none at `path`."""

    def __init__(self, path: str) -> None:
        self._tokenizer = load_tokenizer(path)
        every = np.arange(self._tokenizer.vocab_size)
        self.ordinary_ids = every[~np.isin(every, list(self._tokenizer.special_ids))]

    def encode(self, text: str) -> list[int]:
        """See Codec."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See Codec."""
        return self._tokenizer.decode(list(ids))


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Names and defaults are SGLang's."""
    add = parser.add_argument
    add("--dataset-name", choices=DATASETS, default="sharegpt")
    add("--dataset-path", help="a file in ShareGPT's format; nothing is downloaded")
    add("--num-prompts", type=int, default=1000)
    add("--random-input-len", "--random-input", type=int, default=1024)
    add("--random-output-len", "--random-output", type=int, default=1024)
    add("--random-range-ratio", type=float, default=0.0)
    add("--sharegpt-output-len", type=int)
    add("--sharegpt-context-len", type=int)
    add("--gsp-num-groups", type=int, default=64)
    add("--gsp-prompts-per-group", type=int, default=16)
    add("--gsp-system-prompt-len", type=int, default=2048)
    add("--gsp-question-len", type=int, default=128)
    add("--gsp-output-len", type=int, default=256)
    add("--disable-ignore-eos", action="store_true", help="answers may end early")
    add("--extra-request-body", type=_json_object, default={}, metavar="JSON")


def load_shape(settings: argparse.Namespace, as_ids: bool) -> LoadShape:
    """What the flags of `add_load_flags` ask for."""
    return LoadShape(
        num_prompts=settings.num_prompts,
        input_len=settings.random_input_len,
        output_len=settings.random_output_len,
        range_ratio=settings.random_range_ratio,
        sharegpt_output_len=settings.sharegpt_output_len,
        sharegpt_context_len=settings.sharegpt_context_len,
        num_groups=settings.gsp_num_groups,
        prompts_per_group=settings.gsp_prompts_per_group,
        system_prompt_len=settings.gsp_system_prompt_len,
        question_len=settings.gsp_question_len,
        group_output_len=settings.gsp_output_len,
        as_ids=as_ids,
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("no JSON object")
    return found
