"""Finds and loads the tokenizer of a model: Hugging Face files or the vocabulary in a GGUF file.

Called once by each process of the text side. transformers is imported only where it is needed,
because that takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.chat_template import read_chat_template
from sglang.srt.tokenizer.gguf_tokenizer import GGUFVocabulary, read_vocabulary
from sglang.srt.tokenizer.plain_files import read_plain_files
from sglang.srt.tokenizer.tokenizer import Tokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
)


def load_tokenizer_for(server_args: ServerArgs) -> Tokenizer | None:
    """The tokenizer that `server_args` asks for; None under --skip-tokenizer-init."""
    if server_args.skip_tokenizer_init:
        return None
    return load_tokenizer(
        server_args.tokenizer_path,
        trust_remote_code=server_args.trust_remote_code,
        chat_template=server_args.chat_template,
    )


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> Tokenizer:
    """Load from a GGUF file, a directory, or a model id on the Hugging Face hub.

    A directory without tokenizer files may hold one GGUF file. `chat_template` (see
    read_chat_template) replaces the model's own. Nothing is downloaded for a local path. Raises
    ValueError with one line that names the path.
    """
    template = None if chat_template is None else read_chat_template(chat_template)
    gguf_file = _find_gguf(Path(path))
    if gguf_file is not None:
        return _from_gguf(gguf_file, template)
    return _from_hugging_face(path, template, trust_remote_code)


def has_tokenizer(path: Path) -> bool:
    """Whether a local directory or file has something that `load_tokenizer` can read."""
    found = any((path / name).exists() for name in _TOKENIZER_FILES)
    return found or _find_gguf(path) is not None


def _find_gguf(path: Path) -> Path | None:
    if path.is_file():
        return path
    if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    return None


def _from_gguf(path: Path, template: str | None) -> Tokenizer:
    try:
        vocabulary = read_vocabulary(read_gguf_header(path).metadata)
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot load the tokenizer of {path}: {error}") from error
    chat_template = vocabulary.chat_template if template is None else template
    return Tokenizer(
        vocabulary.backend,
        lambda: _wrap_backend(vocabulary),
        bos_token_id=vocabulary.bos_token_id,
        eos_token_ids=vocabulary.eos_token_ids,
        chat_template=chat_template,
        template_tokens=_ends_of(vocabulary),
    )


def _ends_of(vocabulary: GGUFVocabulary) -> dict[str, str]:
    ends = {"bos_token": vocabulary.bos_token, "eos_token": vocabulary.eos_token}
    return {name: token for name, token in ends.items() if token is not None}


def _wrap_backend(vocabulary: GGUFVocabulary) -> Any:
    """A transformers tokenizer around the backend, for what only transformers can do."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.backend,
        clean_up_tokenization_spaces=False,
        **_ends_of(vocabulary),
    )


def _from_hugging_face(path: str, template: str | None, trust_remote_code: bool) -> Tokenizer:
    files = read_plain_files(Path(path))
    if files is not None:
        return Tokenizer(
            files.backend,
            lambda: _load_with_transformers(path, trust_remote_code),
            bos_token_id=files.id_of("bos_token"),
            eos_token_ids=tuple(i for i in (files.id_of("eos_token"),) if i is not None),
            chat_template=files.chat_template if template is None else template,
            template_tokens=files.special_tokens,
        )
    hf = _load_with_transformers(path, trust_remote_code)
    backend = getattr(hf, "backend_tokenizer", None)
    eos = hf.eos_token_id
    return Tokenizer(
        backend if isinstance(backend, tokenizers.Tokenizer) else None,
        lambda: hf,
        bos_token_id=hf.bos_token_id,
        eos_token_ids=() if eos is None else (int(eos),),
        chat_template=getattr(hf, "chat_template", None) if template is None else template,
    )


def _load_with_transformers(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path,
            local_files_only=Path(path).exists(),
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"Cannot load a tokenizer from {path!r}: {error}") from error
