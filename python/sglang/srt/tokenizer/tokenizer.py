"""Text to token ids and back, whatever file the vocabulary came from.

`Tokenizer` is what the TokenizerManager, the detokenizer and the doors see. It wraps a fast
tokenizer of the `tokenizers` library, or a slow one of transformers. Chat templates are rendered by
chat_render.py, or by transformers where it alone knows the special tokens or a final message is to
be continued. It reads no file; loader.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import tokenizers

from sglang.srt.errors import RequestError
from sglang.srt.tokenizer.chat_render import ChatRenderer
from sglang.srt.tokenizer.pieces import TokenPieces, special_ids_of
from sglang.srt.tokenizer.text_borders import TextBorders

PIECE_CHARS = 1 << 15
_NO_IDS = np.empty(0, np.int32)
_NO_IDS.setflags(write=False)


class Tokenizer:
    """One vocabulary, its special tokens and its chat template; safe to use from threads.

    `backend` is None for a slow tokenizer, which is then asked through `make_hf`'s object.
    `make_hf` builds the transformers tokenizer on first use (importing it takes seconds, and
    most models never need it). `chat_template` None: the model has none. `template_tokens` are the
    special tokens by name for chat templates; None: only transformers knows them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        make_hf: Callable[[], Any],
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | Mapping[str, str] | None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self._renderer = None if template_tokens is None else ChatRenderer(template_tokens)
        self._backend = backend
        self._make_hf = make_hf
        if backend is None:
            self.pieces = None
            self.special_ids = frozenset(int(i) for i in self.hf.all_special_ids)
            self.vocab_size = len(self.hf)
        else:
            backend.no_truncation()
            backend.no_padding()
            self.pieces = TokenPieces.of(backend)
            self.special_ids = special_ids_of(backend)
            self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def hf(self) -> Any:
        """The transformers tokenizer of this vocabulary."""
        return self._make_hf()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.int32]:
        """Token ids of `text`, int32 [n]; special tokens written in `text` become their ids.

        `add_special_tokens` adds BOS and EOS as the model's files say. Releases the interpreter
        lock meanwhile. Raises RequestError (400) for text that is not Unicode (lone surrogates).
        """
        pieces = [*self.encode_pieces(text, add_special_tokens=add_special_tokens)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def encode_pieces(
        self, text: str, *, add_special_tokens: bool = True
    ) -> Iterator[npt.NDArray[np.int32]]:
        """The ids of `text` part by part, at least one: what `encode` gives, in bounded memory.

        Each part is about `PIECE_CHARS` characters, so it takes some ten milliseconds, except
        where the tokenizer has no border known to be safe (see text_borders.py): then a part is
        longer, or the only one. Raises RequestError (400) as `encode` does.
        """
        borders = self._borders if len(text) > PIECE_CHARS else None
        if borders is None:
            yield self._encode_whole(text, add_special_tokens)
            return
        before, after = (self._ends if add_special_tokens else None) or (_NO_IDS, _NO_IDS)
        for piece in borders.pieces(text, PIECE_CHARS):
            ids = self._encode_whole(text[piece.start : piece.end], False)
            first = before if piece.start == 0 else _NO_IDS
            last = after if piece.next_start == len(text) else _NO_IDS
            yield np.concatenate([first, ids, last]) if len(first) or len(last) else ids

    def _encode_whole(self, text: str, add_special_tokens: bool) -> npt.NDArray[np.int32]:
        if not is_unicode(text):
            raise RequestError("The text is not valid Unicode.")
        if self._backend is None:
            ids = self.hf.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids = encoded[0].ids
        return np.array(ids, dtype=np.int32)

    def encode_pair(self, first: str, second: str) -> tuple[npt.NDArray[np.int32], int]:
        """Token ids of two texts as the model's files join them, int32 [n], and where in them the
        second begins (0: the files don't tell).

        Raises RequestError (400) for text that is not Unicode.
        """
        if not (is_unicode(first) and is_unicode(second)):
            raise RequestError("The text is not valid Unicode.")
        if self._backend is None:
            joined = self.hf(first, second, return_token_type_ids=True)
            ids, types = joined["input_ids"], joined["token_type_ids"]
        else:
            encoded = self._backend.encode(first, second)
            ids, types = encoded.ids, encoded.type_ids
        return np.array(ids, dtype=np.int32), types.index(1) if 1 in types else 0

    @cached_property
    def _borders(self) -> TextBorders | None:
        """Where texts may be cut; None: nowhere, as far as is known."""
        if self._backend is None or self._ends is None:
            return None
        return TextBorders.of(self._backend)

    @cached_property
    def _ends(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """The ids that `add_special_tokens` puts before and after a text, found by trying."""
        bare, dressed = self._encode_whole("a", False), self._encode_whole("a", True)
        for first in range(len(dressed) - len(bare) + 1) if len(bare) else ():
            if np.array_equal(dressed[first : first + len(bare)], bare):
                return dressed[:first], dressed[first + len(bare) :]
        return None

    def decode(
        self,
        token_ids: Sequence[int] | npt.NDArray[np.int32],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The whole text of `token_ids`; ids that the vocabulary lacks stand for nothing.

        `spaces_between_special_tokens` only matters to slow tokenizers, as in transformers.
        """
        ids = [int(i) for i in token_ids]
        if self.pieces is not None:
            return self.pieces.decode(ids, skip_special_tokens=skip_special_tokens)
        if self._backend is not None:
            known = [i for i in ids if i >= 0]
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        text: str = self.hf.decode(
            [i for i in ids if 0 <= i < self.vocab_size],
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, as shown beside a log probability."""
        if self.pieces is not None:
            return self.pieces.piece(token_id).decode(errors="replace")
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; for tokenizers without byte pieces those of its text."""
        if self.pieces is not None:
            return self.pieces.piece(token_id)
        return self.token_text(token_id).encode()

    def spellings(self) -> dict[int, str] | None:
        """How the tokenizers library writes each token; None for a slow tokenizer."""
        if self._backend is None:
            return None
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    def library_json(self) -> tuple[str, int] | None:
        """The tokenizer as the tokenizers library writes it, and one more than its largest id.

        Takes a moment for a large vocabulary. None where the bytes of its tokens are not known.
        """
        if self._backend is None or self.pieces is None:
            return None
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        return self._backend.to_str(), 1 + max(ids, default=-1)

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        """Ids of those special tokens that are written as one of `texts`."""
        ids = self._ids_of_specials
        return frozenset(ids[text] for text in texts if text in ids)

    @cached_property
    def _ids_of_specials(self) -> dict[str, int]:
        return {self.token_text(i): i for i in self.special_ids}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Render `messages` to the prompt text; encode it with add_special_tokens=False.

        Raises RequestError (400) when there is no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "The model has no chat template; start the server with --chat-template "
                "or use the completions endpoint."
            )
        template = self._pick_template(bool(tools))
        try:
            if self._renderer is not None and not continue_final_message:
                return self._renderer.render(
                    template,
                    list(messages),
                    tools=list(tools) if tools else None,
                    add_generation_prompt=add_generation_prompt,
                    **template_kwargs,
                )
            rendered = self.hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"The chat template cannot render the messages: {error}") from error
        return str(rendered)

    def _pick_template(self, with_tools: bool) -> str:
        if isinstance(self.chat_template, str):
            return self.chat_template
        templates = self.chat_template or {}
        if with_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" not in templates:
            raise RequestError(
                f"The model's chat templates are {sorted(templates)}, none is the default; "
                "choose one with --chat-template."
            )
        return templates["default"]


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which JSON can carry and UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
