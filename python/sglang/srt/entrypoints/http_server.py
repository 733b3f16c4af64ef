"""The HTTP server's life: bind, start the children, wait, serve, and end cleanly.

The socket is bound first and answers 503 until the model is loaded. The process ends with 0
after SIGINT or SIGTERM and with 1 when it cannot start or a child dies, having said which and
why. A second SIGINT kills everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator, Sequence

import uvicorn
import uvloop

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.event_stream import cancel_and_wait
from sglang.srt.entrypoints.node_server import serve_node
from sglang.srt.entrypoints.nodes import resolve_nodes
from sglang.srt.entrypoints.processes import ServerProcesses, StartError
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.text_start import start_text_service, warm_up
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils.process import configure_logging
from sglang.srt.utils.rendezvous import NodeMeeting

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_REPLY_GRACE_S = 3  # for replies under way when the server stops
_KEEP_ALIVE_S = 5
_EXIT_KILLED = 130


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: the launcher decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield


def uvicorn_config(context: ServerContext) -> uvicorn.Config:
    """How uvicorn serves the application of `context`."""
    return uvicorn.Config(
        build_app(context),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=context.server_args.log_level_http,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_REPLY_GRACE_S,
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in its queue from now on. Raises OSError.

    Its connections send what is small at once: asyncio asks for that only where a socket's protocol
    is named, and a reply's body would wait for the client's word that it has the head.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Launcher:
    """One server from its start to its end; `run` gives the process's exit code."""

    def __init__(
        self,
        server_args: ServerArgs,
        environ: Environ,
        model_config: ModelConfig,
        listener: socket.socket,
        processes: ServerProcesses,
    ) -> None:
        self._args = server_args
        self._model_config = model_config
        self._listener = listener
        self._processes = processes
        self._environ = environ
        self._context = ServerContext(server_args, environ)
        self._http = HttpServer(uvicorn_config(self._context))
        self._manager: TokenizerManager | None = None
        self._failure: asyncio.Task[None]

    async def run(self) -> int:
        """Serve until a signal or a failure."""
        loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[int] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._http.serve([self._listener]))
        starting = asyncio.create_task(self._start())
        try:
            await asyncio.wait(
                (serving, starting, self._ending), return_when=asyncio.FIRST_COMPLETED
            )
            if starting.done() and not starting.result():
                return 1
            await asyncio.wait((serving, self._ending), return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                return self._ending.result()
            logger.error("The HTTP server ended by itself.")
            return 1
        finally:
            await self._stop(serving, starting)

    async def _start(self) -> bool:
        """Bring the server to ready; False, having said why, when it cannot."""
        loop = asyncio.get_running_loop()
        try:
            self._processes.start()
            self._manager = await start_text_service(
                self._args, self._environ, self._model_config, self._processes.ipc
            )
            self._failure = asyncio.create_task(self._watch_manager(self._manager))
            self._context.attach(self._manager)
            ready = await asyncio.to_thread(self._processes.wait_ready)
            self._manager.scheduler_ready(ready)

            def on_exit(reason: str) -> None:
                loop.call_soon_threadsafe(self._on_child_exit, reason)

            self._processes.watch(on_exit)
            if not self._args.skip_server_warmup:
                await warm_up(self._manager)
        except (StartError, RequestError, ValueError, OSError) as error:
            if not self._ending.done():
                logger.error("The server cannot start: %s", error)
            return False
        self._context.open()
        host, port = self._listener.getsockname()[:2]
        logger.info(
            "The server is ready: http://%s:%d (%.1f s after its start; context length %d)",
            f"[{host}]" if ":" in host else host,
            port,
            self._context.ready_after_s,
            self._manager.context_length,
        )
        return True

    def _on_signal(self, number: signal.Signals) -> None:
        if self._ending.done():
            if number == signal.SIGINT:
                self._processes.kill()
                os._exit(_EXIT_KILLED)
            return
        logger.info("%s: shutting down", number.name)
        self._ending.set_result(0)

    async def _watch_manager(self, manager: TokenizerManager) -> None:
        """End the server when its text side can go on no more."""
        reason = await manager.wait_failed()
        if not self._ending.done():
            logger.error("%s The server ends.", reason)
            self._ending.set_result(1)

    def _on_child_exit(self, reason: str) -> None:
        if self._manager is not None:
            self._manager.server_died(reason)
        if not self._ending.done():
            logger.error("%s The server ends.", reason)
            self._ending.set_result(1)

    async def _stop(self, serving: asyncio.Task[None], starting: asyncio.Task[bool]) -> None:
        """Refuse what is new, answer what runs, end the children."""
        self._context.close()
        self._http.should_exit = True
        await cancel_and_wait(starting)
        stopping = asyncio.create_task(asyncio.to_thread(self._processes.stop))
        if self._manager is not None:
            await self._manager.stop()  # every running request gets its 503 now
            await cancel_and_wait(self._failure)
        await asyncio.gather(serving, stopping, return_exceptions=True)
        logger.info("The server has ended.")


def make_processes(
    server_args: ServerArgs, environ: Environ, meeting: NodeMeeting | None
) -> ServerProcesses:
    """The children of the first node. Raises OSError that names the address of the meeting."""
    try:
        return ServerProcesses(server_args, environ, meeting)
    except OSError as error:
        if meeting is None:
            raise
        where = f"--dist-init-addr {server_args.dist_init_addr}"
        raise OSError(f"{where}: node 0 can't listen there: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    """`python -m sglang.launch_server`: the exit code."""
    server_args = prepare_server_args(argv)
    configure_logging(server_args.log_level, "sglang")
    try:
        environ = Environ.from_os()
        server_args, meeting = resolve_nodes(server_args, environ)
        model_config = ModelConfig.from_path(
            server_args.model_path,
            overrides=server_args.model_overrides(),
            trust_remote_code=server_args.trust_remote_code,
            multimodal=server_args.enable_multimodal,
        )
        if server_args.node_rank > 0:
            return serve_node(server_args, ServerProcesses(server_args, environ, meeting))
        listener = bind(server_args.host, server_args.port)
        processes = make_processes(server_args, environ, meeting)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    logger.info(
        "Listening on %s:%d; answering 503 until the model %s is loaded",
        server_args.host,
        server_args.port,
        server_args.model_path,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        launcher = Launcher(server_args, environ, model_config, listener, processes)
        return runner.run(launcher.run())
