"""The detokenizer's news for each request, and its process over real sockets."""

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from sglang.srt.managers.detokenizer import Detokenizer
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
from sglang.srt.managers.io_struct import (
    BatchStrOut,
    BatchTokenIDOut,
    DetokOptions,
    FinishReason,
    IpcNames,
    LogprobArrays,
    StopStringHit,
    TextOut,
    TokenOut,
    ToScheduler,
    ToTokenizer,
    int32_buffer,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from sglang.srt.utils.channel import IpcDirectory, Receiver, Sender
from srt.tokenizer.vocabularies import write_gguf

LENGTH = FinishReason("length", length=9)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("bpe") / "m.gguf", "bpe", pre="smollm")


@pytest.fixture(scope="module")
def tokenizer(model_file: Path) -> Tokenizer:
    return load_tokenizer(str(model_file))


class Driver:
    """Feeds one request to a Detokenizer, keeping the totals as the scheduler does."""

    def __init__(
        self, tokenizer: Tokenizer | None, options: DetokOptions | None = None, rid: str = "r"
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.hits: list[StopStringHit] = []
        self.num_tokens = 0
        self.rid = rid
        self.options: DetokOptions | None = options or DetokOptions()

    def feed(self, ids: list[int], finish: FinishReason | None = None) -> TextOut | None:
        self.num_tokens += len(ids)
        logprobs = LogprobArrays(
            len(ids),
            int32_buffer(ids),
            np.arange(len(ids), dtype="<f4").tobytes(),
            top_num=2,
            top_ids=int32_buffer(range(2 * len(ids))),
            top_logprobs=bytes(8 * len(ids)),
            picked_ids=int32_buffer([1, 2, 3]),
            picked_logprobs=bytes(12 * len(ids)),
        )
        out = TokenOut(
            self.rid,
            int32_buffer(ids),
            prompt_tokens=5,
            completion_tokens=self.num_tokens,
            cached_tokens=2,
            num_retractions=1,
            finish_reason=finish,
            output_logprobs=logprobs,
            detok=self.options,
        )
        self.options = None
        result = self.detokenizer.handle(BatchTokenIDOut([out]))
        self.hits += result.hits
        assert len(result.outs) <= 1
        return result.outs[0] if result.outs else None

    def say(self, ids: list[int], finish: FinishReason | None = None) -> str:
        out = self.feed(ids, finish)
        assert out is not None
        return out.text


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def test_every_token_is_an_event_even_without_text(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer)
    pieces = tokenizer.pieces
    assert pieces is not None
    first, second = (
        next(i for i in range(300) if pieces.piece(i) == bytes([byte])) for byte in "é".encode()
    )
    out = driver.feed([first])
    assert out is not None
    assert (out.text, out.output_ids, out.completion_tokens) == ("", int32_buffer([first]), 1)
    assert (out.prompt_tokens, out.cached_tokens, out.num_retractions) == (5, 2, 1)
    assert driver.say([second]) == "é"
    assert driver.say([first], LENGTH) == "�"
    assert len(driver.detokenizer) == 0


def test_requests_of_one_batch_are_kept_apart(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    texts = {"a": "the quick fox", "b": "lazy dogs", "c": "日本語 😀"}
    ids = {rid: ids_of(tokenizer, text) for rid, text in texts.items()}
    shown = dict.fromkeys(texts, "")
    for step in range(max(map(len, ids.values()))):
        outs = [
            TokenOut(
                rid,
                int32_buffer(ids[rid][step : step + 1]),
                1,
                step + 1,
                finish_reason=LENGTH if step + 1 == len(ids[rid]) else None,
                detok=DetokOptions() if step == 0 else None,
            )
            for rid in texts
            if step < len(ids[rid])
        ]
        for out in detokenizer.handle(BatchTokenIDOut(outs)).outs:
            shown[out.rid] += out.text
    assert shown == texts
    assert len(detokenizer) == 0


def test_a_stop_string_ends_the_request_here(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(stop_strings=("lazy",)))
    shown = ""
    out = None
    for token_id in ids_of(tokenizer, "the lazy dog"):
        out = driver.feed([token_id])
        if out is None or out.finish_reason is not None:
            break
        shown += out.text
    assert out is not None
    assert shown + out.text == "the "
    assert out.finish_reason == FinishReason("stop", matched="lazy")
    assert driver.hits == [StopStringHit("r")]
    assert driver.feed([70]) is None  # computed before the scheduler heard of it
    assert len(driver.detokenizer) == 1
    assert driver.feed([], FinishReason("stop", matched="lazy")) is None
    assert len(driver.detokenizer) == 0
    driver.options = DetokOptions()
    driver.num_tokens = 0
    assert driver.say(ids_of(tokenizer, "again"), LENGTH) == "again"  # the id may come again


def test_news_of_several_tokens_are_cut_at_the_stop_string(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(stop_strings=("1",)))
    ids = ids_of(tokenizer, "x 123")
    out = driver.feed(ids, LENGTH)
    assert out is not None
    kept = ids[: ids.index(ids_of(tokenizer, "1")[0]) + 1]
    assert out.text == "x "
    assert out.output_ids == int32_buffer(kept)
    assert out.completion_tokens == len(kept)
    assert out.finish_reason == FinishReason("stop", matched="1")
    arrays = out.output_logprobs
    assert arrays is not None
    assert arrays.num_rows == len(kept)
    assert arrays.token_ids == int32_buffer(kept)
    assert [len(arrays.logprobs), len(arrays.top_ids), len(arrays.picked_logprobs)] == [
        4 * len(kept),
        8 * len(kept),
        12 * len(kept),
    ]
    assert driver.hits == []  # the scheduler had ended it already
    assert len(driver.detokenizer) == 0


def test_no_stop_trim_shows_the_stop_string_but_nothing_after_it(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(stop_strings=("1",), no_stop_trim=True))
    assert driver.say(ids_of(tokenizer, "x 123")) == "x 1"


@pytest.mark.parametrize(("keep", "shown"), [(False, "hi"), (True, "hi<|im_end|>")])
def test_the_stop_token_is_trimmed_unless_told(
    tokenizer: Tokenizer, keep: bool, shown: str
) -> None:
    options = DetokOptions(no_stop_trim=keep, skip_special_tokens=False)
    driver = Driver(tokenizer, options)
    out = driver.feed([*ids_of(tokenizer, "hi"), 4], FinishReason("stop", matched=4))
    assert out is not None
    assert out.text == shown


def test_a_stop_tokens_id_inside_the_text_stays(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(skip_special_tokens=False))
    assert driver.say([4, *ids_of(tokenizer, "hi")], LENGTH) == "<|im_end|>hi"


def test_min_new_tokens_makes_stop_strings_ordinary_text(tokenizer: Tokenizer) -> None:
    ones = ids_of(tokenizer, "1") * 6
    driver = Driver(tokenizer, DetokOptions(stop_strings=("1",), min_new_tokens=4))
    out = driver.feed(ones)
    assert out is not None
    assert (out.text, out.completion_tokens) == ("111", 4)
    assert out.finish_reason == FinishReason("stop", matched="1")


def test_a_stop_pattern_ends_the_request_as_a_stop_string_does(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(stop_strings=("dog",), stop_regex=("l[a-z]+y", "z{9}")))
    shown = ""
    out = None
    for token_id in ids_of(tokenizer, "the lion and the lazy dog"):
        out = driver.feed([token_id])
        assert out is not None
        shown += out.text
        if out.finish_reason is not None:
            break
    assert shown == "the lion and the "
    assert out is not None
    assert out.finish_reason == FinishReason("stop", matched="l[a-z]+y")
    assert driver.hits == [StopStringHit("r")]


def test_stop_patterns_know_no_stop_trim_and_min_new_tokens(tokenizer: Tokenizer) -> None:
    options = DetokOptions(stop_regex=("[0-9]+",), no_stop_trim=True, min_new_tokens=4)
    out = Driver(tokenizer, options).feed(ids_of(tokenizer, "1") * 6)
    assert out is not None
    assert (out.text, out.completion_tokens) == ("1111", 4)
    assert out.finish_reason == FinishReason("stop", matched="[0-9]+")


def test_held_text_comes_with_the_end(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, DetokOptions(stop_strings=("the end.",)))
    held = driver.say(ids_of(tokenizer, "the"))
    assert held == ""
    assert driver.say(ids_of(tokenizer, " e"), FinishReason("abort", message="gone")) == "the e"


def test_an_end_without_tokens_passes(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer)
    reason = FinishReason("abort", message="refused", status_code=503)
    out = driver.feed([], reason)
    assert out is not None
    assert (out.text, out.finish_reason) == ("", reason)
    assert len(driver.detokenizer) == 0


def test_without_a_tokenizer_only_ids_pass() -> None:
    driver = Driver(None)
    out = driver.feed([1, 2], LENGTH)
    assert out is not None
    assert (out.text, out.output_ids) == ("", int32_buffer([1, 2]))


@pytest.fixture
def ipc() -> Iterator[IpcNames]:
    with IpcDirectory() as directory:
        yield IpcNames.in_directory(directory.path)


def test_the_process_serves_over_its_sockets(model_file: Path, ipc: IpcNames) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    from_detokenizer = Receiver[ToTokenizer](context, ipc.tokenizer, ToTokenizer)
    to_scheduler = Receiver[ToScheduler](context, ipc.scheduler, ToScheduler)
    sender = Sender[BatchTokenIDOut](context, ipc.detokenizer)
    args = ServerArgs.from_kwargs(model_path=str(model_file))
    process = multiprocessing.get_context("spawn").Process(
        target=run_detokenizer_process, args=(args, ipc), daemon=True
    )
    process.start()
    try:
        ids = ids_of(load_tokenizer(str(model_file)), "the 1")
        options = DetokOptions(stop_strings=("1",))
        sender.send(BatchTokenIDOut([TokenOut("r", int32_buffer(ids), 1, len(ids), detok=options)]))
        news = from_detokenizer.receive(60_000)
        assert isinstance(news, BatchStrOut)
        assert news.outs[0].text == "the "
        assert news.outs[0].finish_reason == FinishReason("stop", matched="1")
        assert to_scheduler.receive(60_000) == StopStringHit("r")
    finally:
        process.terminate()
        process.join(30)
        for socket in (from_detokenizer, to_scheduler, sender):
            socket.close()
        context.term()
    assert process.exitcode == -signal.SIGTERM
