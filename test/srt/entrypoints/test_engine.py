"""`sglang.Engine` with real child processes around a fake scheduler."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

import sglang
from sglang.srt.entrypoints import engine as engine_module
from sglang.srt.entrypoints.processes import ServerProcesses, StartError
from sglang.srt.errors import RequestError
from sglang.srt.server_args import ServerArgs
from srt.entrypoints.fake_scheduler import ENTRY
from srt.entrypoints.fake_service import TINY_CONFIG

PARAMS = {"max_new_tokens": 3, "ignore_eos": True}
IDS = [100, 101, 102]


def make_engine(model_dir: Path, **server_args: Any) -> Any:
    (model_dir / "config.json").write_bytes(msgspec.json.encode(TINY_CONFIG))
    patched = functools.partial(ServerProcesses, scheduler=ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "ServerProcesses", patched)
        return sglang.Engine(
            model_path=str(model_dir),
            skip_tokenizer_init=True,
            log_level="critical",
            **server_args,
        )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    lora = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}
    with make_engine(tmp_path_factory.mktemp("model"), **lora) as one:
        yield one


def test_settings_come_as_one_object_or_as_keywords() -> None:
    args = ServerArgs(model_path="m")
    with pytest.raises(ValueError, match="server_args leaves no room for page_size"):
        sglang.Engine(server_args=args, page_size=4)


def test_one_prompt(engine: Any) -> None:
    result = engine.generate(input_ids=[5, 6], sampling_params=PARAMS)
    assert result["output_ids"] == IDS
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert result["meta_info"]["prompt_tokens"] == 2


def test_batches_arrays_and_n(engine: Any) -> None:
    results = engine.generate(
        input_ids=[np.array([5], np.int32), np.arange(4)],
        sampling_params=[PARAMS, {**PARAMS, "n": 2}],
    )
    assert [one["meta_info"]["prompt_tokens"] for one in results] == [1, 4, 4]
    assert [one["output_ids"] for one in results] == [IDS] * 3


def test_stream(engine: Any) -> None:
    stream = engine.generate(input_ids=[5], sampling_params=PARAMS, stream=True)
    events = list(stream)
    assert events[-1]["output_ids"] == IDS
    lengths = [len(one["output_ids"]) for one in events]
    assert lengths == sorted(lengths)


def test_adapters_come_and_go(engine: Any) -> None:
    there = {"success": True, "error_message": "", "loaded_adapters": {"a": "/a"}}
    assert engine.load_lora_adapter("a", "/a") == there
    result = engine.generate(input_ids=[5], sampling_params=PARAMS, lora_path="a")
    assert result["output_ids"] == IDS
    with pytest.raises(RequestError, match="The LoRA adapter 'b' is not loaded; loaded are: 'a'"):
        engine.generate(input_ids=[5], sampling_params=PARAMS, lora_path="b")
    assert engine.unload_lora_adapter("a") == {**there, "loaded_adapters": {}}
    answer = engine.unload_lora_adapter("a")
    assert (answer["success"], answer["error_message"]) == (
        False,
        "The LoRA adapter 'a' is not loaded.",
    )


async def test_async_from_another_loop(engine: Any) -> None:
    calls = [engine.async_generate(input_ids=[5], sampling_params=PARAMS) for _ in range(8)]
    for result in await asyncio.gather(*calls):
        assert result["output_ids"] == IDS
    stream = await engine.async_generate(input_ids=[5], sampling_params=PARAMS, stream=True)
    assert isinstance(stream, AsyncIterator)
    assert [one async for one in stream][-1]["output_ids"] == IDS


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "exactly one"),
        ({"prompt": "x", "input_ids": [1]}, "exactly one"),
        ({"prompt": "x"}, "skip-tokenizer-init"),
        ({"input_ids": [-1]}, "-1"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"temperature": float("nan")}}, "temperature"),
        ({"input_ids": [1], "image_data": ["x"]}, "enable-multimodal"),
        ({"input_ids": [1], "no_such": 1}, "no_such"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 600}}, "context length"),
    ],
)
def test_mistakes_are_request_errors(engine: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        engine.generate(**fields)
    with pytest.raises(RequestError, match=named):
        list(engine.generate(**fields, stream=True))


def test_sessions(engine: Any) -> None:
    session = engine.open_session(capacity_of_str_len=1000)
    assert engine.open_session(1000, "named", timeout=60.0) == "named"
    params = {"id": session}
    first = engine.generate(input_ids=[5, 6], sampling_params=PARAMS, session_params=params)
    params["rid"] = first["meta_info"]["id"]
    second = engine.generate(input_ids=[7], sampling_params=PARAMS, session_params=params)
    assert second["meta_info"]["prompt_tokens"] == 2 + 3 + 1
    assert second["output_ids"] == IDS
    engine.close_session(session)
    with pytest.raises(RequestError, match="no session"):
        engine.generate(input_ids=[7], sampling_params=PARAMS, session_params=params)
    with pytest.raises(RequestError, match="'named' already"):
        engine.open_session(session_id="named")


def test_managing(engine: Any) -> None:
    assert engine.flush_cache() is True
    assert engine.get_server_info()["memory"] == {"capacity_tokens": 4096}
    engine.abort_request("nobody")


def children() -> set[int]:
    """Child processes, without multiprocessing's own helper, which stays until we end."""
    every = psutil.Process().children(recursive=True)
    return {child.pid for child in every if "resource_tracker" not in str(child.cmdline())}


def test_shutdown_leaves_nothing(
    tmp_path: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_tmp))
    before = children()
    engine = make_engine(tmp_path)
    assert len(children() - before) == 2
    assert list(short_tmp.iterdir()) != []
    engine.shutdown()
    engine.shutdown()
    assert children() == before
    assert list(short_tmp.iterdir()) == []
    with pytest.raises(RequestError, match="shutting down"):
        engine.generate(input_ids=[1])


def test_a_start_that_fails_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SCHEDULER", "fail")
    before = children()
    with pytest.raises(StartError, match="cheese"):
        make_engine(tmp_path)
    assert children() == before


def test_a_death_fails_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SCHEDULER", "die")
    with make_engine(tmp_path) as engine:
        with pytest.raises(RequestError, match=r"exited with code 7.*invariant") as caught:
            engine.generate(input_ids=[1], sampling_params=PARAMS)
        assert caught.value.http_status == 503
        with pytest.raises(RequestError, match="exited with code 7"):
            engine.generate(input_ids=[1], sampling_params=PARAMS)


def test_closing_a_stream_ends_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SCHEDULER", "hang")
    with make_engine(tmp_path) as engine:

        async def leave_early() -> None:
            call = engine.async_generate(input_ids=[5], sampling_params=PARAMS)
            task = asyncio.ensure_future(call)
            while running() == 0:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        def running() -> int:
            return int(engine.get_server_info()["internal_states"][0]["num_running_reqs"])

        asyncio.run(leave_early())
        while running() == 1:
            pass


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = sglang.Motor


def test_a_script_without_a_guard_is_told_so(tmp_path: Path, short_tmp: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(TINY_CONFIG))
    script = tmp_path / "script.py"
    script.write_text(
        f"import sglang\nsglang.Engine(model_path={str(tmp_path)!r}, skip_tokenizer_init=True)\n"
    )
    source = str(Path(sglang.__file__ or "").parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "TMPDIR": str(short_tmp)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert 'put its code under if __name__ == "__main__":' in done.stderr
    assert list(short_tmp.iterdir()) == []
