"""Writes vocabularies.json and golden_ids.json: what llama.cpp makes of the probe strings.

Run by hand, where llama-cpp-python is installed beside this project's own packages:

    python make_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

The two small vocabularies are trained here on text made for the purpose, without any cutting into
words, so that every difference in cutting shows in the ids. Each is written to GGUF files that
differ in `tokenizer.ggml.pre` (or in the space prefix) only; golden ids are
`Llama(path, vocab_only=True).tokenize(probe, add_bos=False, special=...)`.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<tool>",)
UNMERGEABLE = "zqxj"
PRE_NAMES = (
    "default",
    "gpt-2",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "qwen2",
    "deepseek-r1-qwen",
    "tekken",
)
LINES = (
    "It's 1234567 I'LL we'VE don't DON'T 3.14159 2024-12-31 12:34:56 $1,234.50 100% ...!!! \n\n\n"
    "  x  =  y;\r\n\t\tfoo(bar)[0]->baz :: /* c */ // -- == != <= >= `q` |p| ~/h ^2 <a+b>\n",
    "Größe naïve café façade Москва привет мир 你好世界 日本語テキスト 안녕하세요 مرحبا שלום "
    "😀😃🎉👩‍👩‍👧 ½ ² ٣٤٥ १२३ Ⅷ ①②③ e\u0301 \u00a0 \u2003 \u3000。、！？ …—–“”‘’\n",
    "camelCaseWords HTMLParser iPhone XMLHttpRequest snake_case_Word SCREAMING_Case ÀÉÎõü eBay "
    "x86CPU A1b2 ǅez हिन्दी ไทย ด้วย ﬁ x²+y³=z⁴ 𝟘𝟙\n",
    "user_id's O'Neil'S DON'TGo can'tstop I'Very we'Rex /path/to//x .\n./a ;\n;; a\n/b !\n/x "
    "\r\n/ \u0301a \u0e49b 1\u0301 _\u0301\n",
    "The capital of France is Paris, and the quick brown fox jumps over the lazy dog again.\n",
    "def self_return(self, value):\n    return self.value  # the value\n\n\nclass Thing(object):\n",
)


def training_texts() -> list[str]:
    """Text with many repeated stretches that cross every boundary a cutting may make."""
    rng = random.Random(1)
    texts = list(LINES) * 100
    digits = ["".join(rng.choices("0123456789", k=rng.randint(1, 9))) for _ in range(3000)]
    texts += [number + rng.choice(" .,\n") for number in digits]
    for _ in range(1500):
        texts.append(" " * rng.randint(1, 9) + rng.choice("x\n\t1!") * rng.randint(1, 4))
        mark = rng.choice(".,;:!?-=/*()[]{}\"'#$%&<>|~^+`") * rng.randint(1, 4)
        texts.append(mark + rng.choice(["", "\n", "\n\n", " ", "a", "1"]))
        clitic = rng.choice(["'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "'LL"])
        texts.append(rng.choice([" ", "", "x"]) + clitic + rng.choice([" ", "x", ""]))
    return texts


def train_bpe() -> dict[str, list]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
    tokens += [UNMERGEABLE, *USER_DEFINED]
    types += [1, 4]
    return {"tokens": tokens, "types": types, "merges": [" ".join(m) for m in model["merges"]]}


def train_spm() -> dict[str, list]:
    texts = [line for text in training_texts() for line in text.split("\n") if line.strip()]
    random.Random(2).shuffle(texts)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.99,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        user_defined_symbols=list(SPECIALS[3:]),
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(len(pieces))
    tokens = [pieces.id_to_piece(i) for i in ids]
    types = [
        2 if pieces.is_unknown(i) else 6 if pieces.is_byte(i) else 3 if token in SPECIALS else 1
        for i, token in enumerate(tokens)
    ]
    return {"tokens": tokens, "types": types, "scores": [pieces.get_score(i) for i in ids]}


def write_gguf(path: Path, vocabulary: dict[str, list], pre: str, space_prefix: bool) -> None:
    """A GGUF file with nothing but a vocabulary (and the sizes that llama.cpp insists on)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2" if "merges" in vocabulary else "llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    else:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_add_space_prefix(space_prefix)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def golden(path: Path, probes: list[str]) -> dict[str, list]:
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = {
        "special": [llama.tokenize(p.encode(), add_bos=False, special=True) for p in probes],
        "plain": [llama.tokenize(p.encode(), add_bos=False, special=False) for p in probes],
        "with_ends": llama.tokenize(b"Hello", add_bos=True, special=True),
    }
    llama.close()
    return ids


def main() -> None:
    probes = json.loads((HERE / "probes.json").read_text())
    vocabularies = {"bpe": train_bpe(), "spm": train_spm()}
    files: dict[str, dict[str, list]] = {"smollm2": golden(Path(sys.argv[1]), probes)}
    with tempfile.TemporaryDirectory() as directory:
        for pre in PRE_NAMES:
            path = Path(directory) / f"{pre}.gguf"
            write_gguf(path, vocabularies["bpe"], pre, True)
            files[f"bpe/{pre}"] = golden(path, probes)
        for name, space_prefix in (("spm", True), ("spm-no-prefix", False)):
            path = Path(directory) / f"{name}.gguf"
            write_gguf(path, vocabularies["spm"], "default", space_prefix)
            files[name] = golden(path, probes)
    compact = {"ensure_ascii": False, "separators": (",", ":")}
    (HERE / "vocabularies.json").write_text(json.dumps(vocabularies, **compact) + "\n")
    note = "made by make_golden.py; see its first lines"
    result = {"note": note, "llama_cpp_python": llama_cpp.__version__, "files": files}
    (HERE / "golden_ids.json").write_text(json.dumps(result, **compact) + "\n")


if __name__ == "__main__":
    main()
