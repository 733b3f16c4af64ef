"""Two texts as one prompt, joined as the model's files say."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from sglang.srt.errors import RequestError
from sglang.srt.tokenizer.tokenizer import Tokenizer

WORDS = {"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "?": 4}


def make(template: bool) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
        )

    def no_transformers() -> None:
        raise AssertionError("the tokenizers library is enough")

    return Tokenizer(
        backend, no_transformers, bos_token_id=None, eos_token_ids=(), chat_template=None
    )


def test_a_template_tells_where_the_second_text_begins() -> None:
    ids, second_from = make(template=True).encode_pair("a b", "b a a")
    assert ids.tolist() == [0, 2, 3, 1, 3, 2, 2, 1]
    assert ids.dtype == "int32"
    assert second_from == 4


def test_without_one_texts_stand_one_after_the_other() -> None:
    ids, second_from = make(template=False).encode_pair("a", "b")
    assert (ids.tolist(), second_from) == ([2, 3], 1)


def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        make(template=True).encode_pair("a", "\ud800")
