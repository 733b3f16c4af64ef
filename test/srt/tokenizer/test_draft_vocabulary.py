"""A draft model with other tokens than the model's is refused at start."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.draft_vocabulary import check_draft_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer
from srt.tokenizer.vocabularies import write_gguf


def args_for(draft: Path) -> ServerArgs:
    return ServerArgs.from_kwargs(
        model_path="m",
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=str(draft),
    )


def test_other_tokens_are_refused_and_the_same_are_not(tmp_path: Path) -> None:
    own = load_tokenizer(str(write_gguf(tmp_path / "own.gguf", "bpe")))
    check_draft_vocabulary(args_for(write_gguf(tmp_path / "same.gguf", "bpe")), own)
    other = write_gguf(tmp_path / "other.gguf", "spm")
    with pytest.raises(
        ValueError, match=r"its tokens are not the model's; token \d+ is '"
    ) as error:
        check_draft_vocabulary(args_for(other), own)
    assert str(other) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_a_draft_model_is_taken_at_its_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = load_tokenizer(str(write_gguf(tmp_path / "own.gguf", "bpe")))
    draft = tmp_path / "draft"
    draft.mkdir()
    check_draft_vocabulary(args_for(draft), own)
    assert [record.getMessage() for record in caplog.records] == [
        f"{draft} has no tokenizer: its tokens are taken to be the model's."
    ]
    check_draft_vocabulary(args_for(draft), None)
    check_draft_vocabulary(ServerArgs.from_kwargs(model_path="m"), own)
