"""Whether a text can be held to a grammar here, and what a scheduler needs to know for that.

The scheduler has no tokenizer: it hears of the vocabulary before the first request that has a
constraint, so that nobody else pays for it. Called by the TokenizerManager.
"""

from __future__ import annotations

from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.tokenizer.tokenizer import Tokenizer


class ConstraintDesk:
    """Knows the reasons against, and which replica's scheduler has heard of the vocabulary.

    `tokenizer` is None under --skip-tokenizer-init, `end_ids` end a text, `backend` is
    --grammar-backend.
    """

    def __init__(self, tokenizer: Tokenizer | None, end_ids: tuple[int, ...], backend: str) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._backend = backend
        self._message: VocabularyReq | None = None
        self._told: set[int] = set()

    @property
    def refusal(self) -> str | None:
        """Why no constraint can be served, for the client; None: they are."""
        if self._backend == "none":
            return "Constraints are not served (--grammar-backend none)."
        if self._tokenizer is None:
            return "Constraints need a tokenizer, but the server has none (--skip-tokenizer-init)."
        if self._tokenizer.pieces is None:
            return "Constraints cannot be served: the bytes of this tokenizer's tokens are unknown."
        if not self._end_ids:
            return "Constraints cannot be served: the model has no end-of-text token."
        return None

    def read_vocabulary(self) -> None:
        """Write down the vocabulary, once; takes a moment, for a thread."""
        if self._message is None and self._tokenizer is not None:
            found = self._tokenizer.library_json()
            if found is not None:
                self._message = VocabularyReq(*found, self._end_ids)

    def news_for(self, replica: int) -> VocabularyReq | None:
        """What a replica's scheduler has not heard yet; None: it has."""
        if replica in self._told:
            return None
        self._told.add(replica)
        return self._message
