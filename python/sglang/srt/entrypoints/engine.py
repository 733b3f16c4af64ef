"""`sglang.Engine`: the same engine without HTTP, inside the caller's process.

The scheduler and the detokenizer are children as under the server; the TokenizerManager runs on
an event loop of its own thread, so `generate` works from any thread and `async_generate` from any
loop. Requests are read by the tables of /generate, so fields mean the same in both.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.background_loop import BackgroundLoop
from sglang.srt.entrypoints.encode_api import read_encode
from sglang.srt.entrypoints.generate_request_body import GenerateCall, read_generate
from sglang.srt.entrypoints.image_files import with_files
from sglang.srt.entrypoints.openai.pooling_fields import SCORE_FIELDS
from sglang.srt.entrypoints.processes import ServerProcesses, StartError
from sglang.srt.entrypoints.request_fields import raw_from_python
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.server_info import server_info
from sglang.srt.entrypoints.text_start import start_text_service
from sglang.srt.environ import Environ
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

T = TypeVar("T")
Result = dict[str, Any]


class Engine:
    """An engine that lives until `shutdown`, the end of its `with` block or of the process.

    Keywords are the server's flags with underscores (`model_path` is required); `log_level` is
    "error" unless given and is the children's: this process's logging stays its own. Or
    `server_args` are all of them, as they are. Scripts need an `if __name__ == "__main__":` guard,
    because the children are spawned. Raises ValueError for bad settings and StartError when the
    model cannot be served.
    """

    def __init__(self, *, server_args: ServerArgs | None = None, **flags: Any) -> None:
        _refuse_while_importing_main()
        if server_args is None:
            server_args = ServerArgs.from_kwargs(**{"log_level": "error", **flags})
        elif flags:
            raise ValueError(f"Engine: server_args leaves no room for {', '.join(flags)}")
        self.server_args = server_args
        if self.server_args.nnodes > 1:
            raise ValueError("--nnodes: an Engine runs on one node; start servers for several")
        environ = Environ.from_os()
        model_config = ModelConfig.from_path(
            self.server_args.model_path,
            overrides=self.server_args.model_overrides(),
            trust_remote_code=self.server_args.trust_remote_code,
            multimodal=self.server_args.enable_multimodal,
        )
        self._start(environ, model_config, ServerProcesses(self.server_args, environ))

    def _start(
        self, environ: Environ, model_config: ModelConfig, processes: ServerProcesses
    ) -> None:
        self._processes = processes
        self._manager: TokenizerManager | None = None
        self._context = ServerContext(self.server_args, environ)
        self._loop = BackgroundLoop("sglang-engine")
        atexit.register(self.shutdown)
        try:
            processes.start()
            manager = self._loop.call(
                start_text_service(self.server_args, environ, model_config, processes.ipc)
            )
            self._manager = manager
            self._context.attach(manager)
            ready = processes.wait_ready()
            self._loop.call(_on_loop(lambda: manager.scheduler_ready(ready)))
            processes.watch(self._on_child_exit)
        except BaseException:
            self.shutdown()
            raise
        self._context.open()

    def _on_child_exit(self, reason: str) -> None:
        logger.error("%s The engine serves no more.", reason)
        if self._manager is not None:
            self._manager.server_died(reason)

    # ---- generating

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Result | list[Result] | Iterator[Result]:
        """Generate for one prompt or a batch, as /generate does.

        `input_ids` are lists or arrays of ids instead of `prompt`. Gives a dict per sequence: one,
        a list of them (batch or n above 1), or with `stream` an iterator of partial ones (closing
        it ends the request). `fields` are the other fields of /generate; `image_data` may name
        files and hold bytes as well. Raises RequestError.
        """
        call = self._read(prompt, sampling_params, input_ids, stream, fields)
        server = self._context.generating.generate
        if stream:
            return self._loop.iterate(_plain_stream(server.stream(call)))
        return _plain_all(self._loop.call(server.reply(call)))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Result | list[Result] | AsyncIterator[Result]:
        """`generate` for asyncio; with `stream` the awaited value is an async iterator."""
        call = self._read(prompt, sampling_params, input_ids, stream, fields)
        server = self._context.generating.generate
        if stream:
            return self._loop.aiterate(_plain_stream(server.stream(call)))
        return _plain_all(await self._loop.acall(server.reply(call)))

    def _read(
        self, prompt: Any, sampling_params: Any, input_ids: Any, stream: bool, fields: Any
    ) -> GenerateCall:
        if fields.get("image_data") is not None:
            fields = {**fields, "image_data": with_files(fields["image_data"])}
        values = {
            **fields,
            "text": prompt,
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "stream": stream,
        }
        return read_generate(raw_from_python(values), self._context.serving.preferred_sampling)

    # ---- vectors and scores

    def encode(
        self,
        prompt: str | list[str] | None = None,
        *,
        input_ids: Any = None,
        dimensions: int | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """The vector of a prompt or of each of a batch, as /encode gives it.

        For a model that is pooled (`is_embedding`). `input_ids` are lists or arrays of ids instead
        of `prompt`, `dimensions` None: all numbers. Raises RequestError.
        """
        return _plain_all(self._loop.call(self._encode(prompt, input_ids, dimensions, fields)))

    async def async_encode(
        self,
        prompt: str | list[str] | None = None,
        *,
        input_ids: Any = None,
        dimensions: int | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """`encode` for asyncio."""
        call = self._encode(prompt, input_ids, dimensions, fields)
        return _plain_all(await self._loop.acall(call))

    def _encode(
        self, prompt: Any, input_ids: Any, dimensions: int | None, fields: dict[str, Any]
    ) -> Coroutine[Any, Any, Result | list[Result]]:
        values = {**fields, "text": prompt, "input_ids": input_ids, "dimensions": dimensions}
        call = read_encode(raw_from_python(values))
        return self._context.serving.encode.reply(call)

    def score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """For each item how likely the labels are after query and item, as /v1/score tells.

        Raises RequestError.
        """
        values = {
            "query": query,
            "items": items,
            "label_token_ids": label_token_ids,
            "apply_softmax": apply_softmax,
            "item_first": item_first,
        }
        body = SCORE_FIELDS.read(raw_from_python(values))
        reply = self._loop.call(self._context.serving.rerank.score(body))
        return [scores.tolist() for scores in reply["scores"]]

    # ---- managing

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the requests whose id starts with `rid`, or all of them."""
        self._loop.call(self._context.serving.runner.abort(rid, abort_all))

    def open_session(
        self,
        capacity_of_str_len: int = 0,  # noqa: ARG002 (SGLang's)
        session_id: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Open a session and give its id; requests name it in `session_params`.

        `capacity_of_str_len` sizes nothing here. Idle for `timeout` seconds it is closed (None:
        never). Raises RequestError.
        """
        sessions = self._context.serving.runner.sessions
        return self._loop.call(
            _on_loop(lambda: sessions.open(session_id, streaming=streaming, timeout_s=timeout))
        )

    def close_session(self, session_id: str) -> None:
        """Close a session and forget its ids. Raises RequestError for an unknown one."""
        sessions = self._context.serving.runner.sessions
        self._loop.call(_on_loop(lambda: sessions.close(session_id)))

    def flush_cache(self) -> bool:
        """Drop every cached prefix; False when requests are running."""
        return self._loop.call(self._context.serving.service.flush_cache()).success

    def load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False
    ) -> dict[str, Any]:
        """The object of /load_lora_adapter."""
        registry = self._context.serving.service.adapters
        return self._loop.call(registry.load(lora_name, lora_path, pinned))

    def unload_lora_adapter(self, lora_name: str) -> dict[str, Any]:
        """The object of /unload_lora_adapter; waits for the last request with the adapter."""
        return self._loop.call(self._context.serving.service.adapters.unload(lora_name))

    def get_server_info(self) -> dict[str, Any]:
        """The object of /server_info."""
        return self._loop.call(server_info(self._context))

    def shutdown(self) -> None:
        """End the children and give everything back; a second call does nothing."""
        atexit.unregister(self.shutdown)
        self._context.close()
        if self._manager is not None:
            manager, self._manager = self._manager, None
            self._loop.call(manager.stop())  # what still runs elsewhere gets its 503 now
        self._processes.stop()
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


def _refuse_while_importing_main() -> None:
    """A spawned child imports its parent's script; without a guard it would start an engine too.

    multiprocessing refuses that as well, but only after much was made that nobody ends.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise StartError(
            "The script starts an Engine while a child process imports it: put its code under "
            'if __name__ == "__main__":'
        )


async def _on_loop(action: Callable[[], T]) -> T:
    return action()


def _plain(result: Result) -> Result:
    """The result with lists in place of arrays."""
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in result.items()
    }


def _plain_all(results: Result | list[Result]) -> Result | list[Result]:
    return [_plain(one) for one in results] if isinstance(results, list) else _plain(results)


async def _plain_stream(
    source: AsyncGenerator[Result | bytes, None],
) -> AsyncGenerator[Result, None]:
    """The objects of a stream without its comments."""
    try:
        async for result in source:
            if not isinstance(result, bytes):
                yield _plain(result)
    finally:
        await source.aclose()
