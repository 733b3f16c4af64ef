"""Whether a draft model's tokens are the model's: the same text under every number.

Asked once, at start; the sizes of both were compared before the models were loaded.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.loader import has_tokenizer, load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def check_draft_vocabulary(server_args: ServerArgs, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError with one line when a draft model's tokens are others than `tokenizer`'s.

    Nothing without a draft model or without `tokenizer`; a draft model that brings no tokenizer is
    taken at its word, with a warning.
    """
    path = server_args.speculative_draft_model_path
    if path is None or tokenizer is None:
        return
    if not has_tokenizer(Path(path)):
        logger.warning("%s has no tokenizer: its tokens are taken to be the model's.", path)
        return
    own, other = tokenizer.spellings(), load_tokenizer(path).spellings()
    if own is None or other is None:
        return
    # Files name more or fewer of the numbers that no text has.
    differing = [i for i in own.keys() & other.keys() if own[i] != other[i]]
    if differing:
        first = min(differing)
        raise ValueError(
            f"--speculative-draft-model-path {path}: its tokens are not the model's; token {first} "
            f"is {other[first]!r} there and {own[first]!r} here"
        )
