"""How a byte-level BPE cuts a text into words before merging, by the name in a GGUF file.

`tokenizer.ggml.pre` names the cutting. The patterns are those that the model families publish in
their own tokenizer.json (GPT-2, SmolLM, Llama 3 and 4, Qwen2) or tekken.json (Mistral); each name
is tested against the ids that llama.cpp gives. Used by gguf_tokenizer.py and text_borders.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# What llama.cpp does for files that name no cutting, found by asking it.
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class WordCutting:
    """One way of cutting: the patterns apply in turn, each to what the one before left whole.

    `digits_alone`: digits are cut one by one first. `ignore_merges`: a word that is a token is
    that token, whatever the merges say. `nfc`: the family normalises text. `adds_bos`: BOS is
    added unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    digits_alone: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The cutting, ending in the byte alphabet."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_alone:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """Unicode NFC, or None."""
        return normalizers.NFC() if self.nfc else None


def word_cuttings() -> dict[str, WordCutting]:
    """Name in `tokenizer.ggml.pre` -> cutting, for every name that is supported."""
    gpt2 = WordCutting((_GPT2,))
    smollm = WordCutting((_GPT2,), digits_alone=True)
    llama3 = WordCutting((_LLAMA3,), ignore_merges=True, adds_bos=True)
    qwen2 = WordCutting((_QWEN2,), nfc=True)
    return {
        "default": WordCutting(_DEFAULT),
        "gpt-2": gpt2,
        "smollm": smollm,
        "starcoder": smollm,
        "refact": smollm,
        "command-r": smollm,
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
        "qwen2": qwen2,
        "deepseek-r1-qwen": qwen2,
        "tekken": WordCutting((_TEKKEN,), ignore_merges=True, adds_bos=True),
    }


def find_word_cutting(name: str) -> WordCutting:
    """The cutting called `name`; ValueError that names it and the known ones otherwise."""
    cuttings = word_cuttings()
    if name not in cuttings:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported; "
            f"supported are {', '.join(sorted(cuttings))}. Give the model's Hugging Face "
            "tokenizer with --tokenizer-path instead."
        )
    return cuttings[name]


def cutting_patterns() -> dict[str, bool]:
    """Every known pattern -> whether it ends a match at each border of text_borders.py.

    Those of the GGUF names, and Llama 4's. A pattern that is no whole cutting only refines what
    another one has cut.
    """
    whole = (_GPT2, _LLAMA3, _QWEN2, _TEKKEN, _LLAMA4)
    parts = dict.fromkeys((part for part in _DEFAULT if part != _GPT2), False)
    return {**parts, **dict.fromkeys(whole, True)}
