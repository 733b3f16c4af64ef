"""The text part of a multimodal checkpoint: which of its weights a language model takes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from sglang.srt.layers.weights import LoadedWeight

logger = logging.getLogger(__name__)

_TEXT_PREFIX = "language_model."
_VISION_PREFIXES = ("vision_model.", "vision_tower.", "multi_modal_projector.")


def text_weights(
    weights: Iterable[tuple[str, LoadedWeight]],
) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, tensor) without the prefix of text names and without vision.

    Side effect: logs how many were passed over.
    """
    skipped = 0
    for name, tensor in weights:
        if name.startswith(_VISION_PREFIXES):
            skipped += 1
        else:
            yield name.removeprefix(_TEXT_PREFIX), tensor
    if skipped:
        logger.info("Only text is served: %d vision weights of the model are not used.", skipped)
