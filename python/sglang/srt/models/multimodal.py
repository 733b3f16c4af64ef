"""The parts of a multimodal checkpoint: which of its weights a language model takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from sglang.srt.layers.weights import LoadedWeight

logger = logging.getLogger(__name__)

_TEXT_PREFIX = "language_model."
_INNER_TEXT_PREFIX = "model.language_model."  # of newer files, where it replaces `model.`
_VISION_PREFIXES = ("vision_model.", "vision_tower.", "multi_modal_projector.", "model.visual.")


def text_weights(
    weights: Iterable[tuple[str, LoadedWeight]],
    take_vision: Callable[[str, LoadedWeight], None] | None = None,
) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, tensor) without the prefix of text names and without vision.

    Side effect: `take_vision` gets vision's, by name; None: logs how many were passed over.
    """
    skipped = 0
    for name, tensor in weights:
        if name.startswith(_INNER_TEXT_PREFIX):
            yield "model." + name.removeprefix(_INNER_TEXT_PREFIX), tensor
        elif not name.startswith(_VISION_PREFIXES):
            yield name.removeprefix(_TEXT_PREFIX), tensor
        elif take_vision is not None:
            take_vision(name, tensor)
        else:
            skipped += 1
    if skipped:
        logger.info("Only text is served: %d vision weights of the model are not used.", skipped)
