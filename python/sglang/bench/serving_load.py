"""What a serving benchmark asks: prompts of a dataset, and when each is sent.

The only effect is reading a dataset's file. Random numbers come from the seed that is given alone:
two runs send the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

DATASETS = ("sharegpt", "random", "random-ids", "generated-shared-prefix")

# A text is cut at its tokens' ends and encoded again, which can join or split what stood there.
_ATTEMPTS = 8
# SGLang's benchmark leaves such pairs out, too: they say little about serving.
_LEAST_TOKENS = 4


class Codec(Protocol):
    """As much of a tokenizer as a load needs."""

    @property
    def ordinary_ids(self) -> npt.NDArray[np.int64]:
        """Ids of tokens that stand for text, no special ones."""

    def encode(self, text: str) -> list[int]:
        """Token ids without those that models put around a text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request: `prompt` is a text or token ids, the lengths are in tokens."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class LoadShape:
    """What is asked of a dataset; lengths in tokens.

    Lengths of `random` are drawn between `range_ratio` times the wanted one and the wanted one.
    `sharegpt_output_len` None: as long as the dataset's own answer; `sharegpt_context_len` None:
    no bound. `as_ids`: prompts are token ids.
    """

    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 1024
    range_ratio: float = 0.0
    sharegpt_output_len: int | None = None
    sharegpt_context_len: int | None = None
    num_groups: int = 64
    prompts_per_group: int = 16
    system_prompt_len: int = 2048
    question_len: int = 128
    group_output_len: int = 256
    as_ids: bool = False


def make_load(
    dataset: str, path: str | None, shape: LoadShape, codec: Codec, seed: int
) -> list[LoadRequest]:
    """The requests of one run in the order in which they are sent.

    `path` is a file in ShareGPT's format; `random` takes its words from there if it is given, else
    it draws token ids as `random-ids` does. Raises ValueError with one line for a dataset that is
    not served, a file that can't be read and shapes that make no sense.
    """
    _check(dataset, path, shape)
    rng = np.random.default_rng(seed)
    if dataset == "sharegpt":
        assert path is not None
        return _sharegpt(path, shape, codec, rng)
    if dataset == "generated-shared-prefix":
        return _shared_prefix(shape, codec, rng)
    words = _words(path, codec) if dataset == "random" and path is not None else None
    low, high = shape.range_ratio, 1.0
    asked = [
        (_drawn(rng, shape.input_len, low, high), _drawn(rng, shape.output_len, low, high))
        for _ in range(shape.num_prompts)
    ]
    source = _ids(rng, codec) if words is None else _cuts(rng, words)
    return [
        _request(source.send(prompt_len), output_len, shape, codec)
        for prompt_len, output_len in asked
    ]


def _check(dataset: str, path: str | None, shape: LoadShape) -> None:
    if dataset not in DATASETS:
        raise ValueError(f"--dataset-name {dataset}: {', '.join(DATASETS)} exist")
    if dataset == "sharegpt" and not path:
        raise ValueError(
            "--dataset-name sharegpt needs --dataset-path, a file in ShareGPT's format; "
            "--dataset-name random needs none"
        )
    if not 0 <= shape.range_ratio <= 1:
        raise ValueError(f"--random-range-ratio {shape.range_ratio} is not between 0 and 1")
    for name in (
        *("num_prompts", "input_len", "output_len", "num_groups", "prompts_per_group"),
        *("system_prompt_len", "question_len", "group_output_len"),
    ):
        if getattr(shape, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(shape, name)}")


def _drawn(rng: np.random.Generator, wanted: int, low: float, high: float) -> int:
    return max(1, int(rng.integers(int(wanted * low), int(wanted * high) + 1)))


def _source(draw: Any) -> Any:
    """A generator that is ready to be sent lengths."""
    made = draw()
    next(made)
    return made


def _ids(rng: np.random.Generator, codec: Codec) -> Any:
    """Answers a number of tokens with so many drawn ids."""

    def draw() -> Any:
        count = yield
        while True:
            count = yield rng.choice(codec.ordinary_ids, count).tolist()

    return _source(draw)


def _cuts(rng: np.random.Generator, words: Sequence[list[int]]) -> Any:
    """Answers a number of tokens with a text's ids, repeated until they are enough."""

    def draw() -> Any:
        count = yield
        while True:
            ids = words[int(rng.integers(len(words)))]
            count = yield (ids * -(-count // len(ids)))[:count]

    return _source(draw)


def _request(ids: list[int], output_len: int, shape: LoadShape, codec: Codec) -> LoadRequest:
    if shape.as_ids:
        return LoadRequest(ids, len(ids), output_len)
    text, count = _as_text(ids, codec)
    return LoadRequest(text, count, output_len)


def _as_text(ids: list[int], codec: Codec) -> tuple[str, int]:
    """A text of about as many tokens as `ids`, and how many they are."""
    wanted, text = len(ids), codec.decode(ids)
    for _ in range(_ATTEMPTS):
        found = codec.encode(text)
        if len(found) == wanted:
            break
        more = found + ids[: max(0, wanted - len(found))]
        text = codec.decode(more[:wanted])
    return text, len(codec.encode(text))


def _shared_prefix(shape: LoadShape, codec: Codec, rng: np.random.Generator) -> list[LoadRequest]:
    """Groups of questions behind one system prompt each, in a drawn order."""
    ids = _ids(rng, codec)
    requests = []
    for _ in range(shape.num_groups):
        head = ids.send(shape.system_prompt_len)
        if not shape.as_ids:
            head, _ = _as_text(head, codec)
        for _ in range(shape.prompts_per_group):
            tail = ids.send(shape.question_len)
            if shape.as_ids:
                prompt: str | list[int] = head + tail
                count = len(prompt)
            else:
                prompt = f"{head}\n\n{_as_text(tail, codec)[0]}"
                count = len(codec.encode(prompt))
            requests.append(LoadRequest(prompt, count, shape.group_output_len))
    return [requests[i] for i in rng.permutation(len(requests))]


def _sharegpt(
    path: str, shape: LoadShape, codec: Codec, rng: np.random.Generator
) -> list[LoadRequest]:
    pairs = _pairs(path)
    requests: list[LoadRequest] = []
    for i in rng.permutation(len(pairs)):
        if len(requests) == shape.num_prompts:
            break
        question, answer = pairs[i]
        prompt_len = len(codec.encode(question))
        output_len = shape.sharegpt_output_len or len(codec.encode(answer))
        bound = shape.sharegpt_context_len
        if min(prompt_len, output_len) < _LEAST_TOKENS:
            continue
        if bound is not None and prompt_len + output_len > bound:
            continue
        prompt = codec.encode(question) if shape.as_ids else question
        requests.append(LoadRequest(prompt, prompt_len, output_len))
    if not requests:
        raise ValueError(f"--dataset-path {path}: no conversation of a usable length")
    return requests


def _words(path: str, codec: Codec) -> list[list[int]]:
    words = [ids for question, _ in _pairs(path) if (ids := codec.encode(question))]
    if not words:
        raise ValueError(f"--dataset-path {path}: no text in it")
    return words


def _pairs(path: str) -> list[tuple[str, str]]:
    """The first two turns of each conversation of a file in ShareGPT's format."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset-path {path}: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"--dataset-path {path} is no list of conversations")
    return [(turns[0], turns[1]) for one in found if len(turns := list(_turns(one))) >= 2]


def _turns(conversation: Any) -> Iterator[str]:
    if not isinstance(conversation, dict):
        return
    for turn in conversation.get("conversations") or conversation.get("conversation") or ():
        value = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(value, str):
            yield value


def arrival_times(count: int, request_rate: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is sent.

    A Poisson process of `request_rate` requests a second; infinite: all at once. Raises ValueError
    for a rate that is not above 0.
    """
    if not request_rate > 0:
        raise ValueError(f"--request-rate {request_rate} is not above 0")
    if request_rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / request_rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return [time - times[0] for time in times]
