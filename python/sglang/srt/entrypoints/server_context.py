"""What every door of one HTTP server shares: its settings, its phase and the text service.

Made by the launcher, filled in while the server starts, handed to `build_app`; there is no
global behind it.
"""

from __future__ import annotations

import enum
import time

from sglang.srt.configs.pooling_config import pooling_of
from sglang.srt.entrypoints.anthropic.serving_messages import MessageServing
from sglang.srt.entrypoints.binary_ids import ID_BYTES
from sglang.srt.entrypoints.encode_api import EncodeServer
from sglang.srt.entrypoints.generate_api import GenerateServer
from sglang.srt.entrypoints.model_kind import ModelKind
from sglang.srt.entrypoints.ollama.serving_ollama import OllamaServing
from sglang.srt.entrypoints.openai.chat_messages import template_kwargs
from sglang.srt.entrypoints.openai.fill_in_middle import MIDDLE_MARKS
from sglang.srt.entrypoints.openai.responses_store import ResponseStore
from sglang.srt.entrypoints.openai.serving_base import OpenAIOptions, default_sampling
from sglang.srt.entrypoints.openai.serving_chat import ChatServing
from sglang.srt.entrypoints.openai.serving_completions import CompletionServing
from sglang.srt.entrypoints.openai.serving_embeddings import EmbeddingServing
from sglang.srt.entrypoints.openai.serving_rerank import RerankServing
from sglang.srt.entrypoints.openai.serving_responses import ResponseServing
from sglang.srt.entrypoints.pooled_calls import PooledCalls
from sglang.srt.entrypoints.request_body import split_object
from sglang.srt.entrypoints.sampling_fields import sampling_from_raw
from sglang.srt.entrypoints.sequences import SequenceRunner
from sglang.srt.entrypoints.service import TextService
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers.metrics import ServerMetrics
from sglang.srt.parser.parser_choice import choose_parsers
from sglang.srt.server_args import ServerArgs

# A prompt that is a little too long is read, to be refused with both numbers.
BINARY_SLACK_BYTES = 1 << 20


class Phase(enum.Enum):
    """Where a server is in its life; it only moves forward."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Serving:
    """The API servers on top of one text service; `parsers` are those that `auto` stood for.

    `kind` says which of them have something to serve. Making one raises ValueError as `pooling_of`,
    and RequestError for flags whose JSON names what can't be served.
    """

    def __init__(
        self, service: TextService, server_args: ServerArgs, metrics: ServerMetrics | None
    ) -> None:
        defaults = {}
        if server_args.sampling_defaults == "model":
            defaults = default_sampling(service.model_config.generation_defaults)
        tokenizer = service.tokenizer
        self.parsers = choose_parsers(
            server_args.tool_call_parser,
            server_args.reasoning_parser,
            None if tokenizer is None else tokenizer.chat_template,
        )
        self.preferred_sampling = split_object(
            (server_args.preferred_sampling_params or "{}").encode()
        )
        sampling_from_raw(self.preferred_sampling)
        template_kwargs(server_args.template_defaults(), None)
        options = OpenAIOptions(
            defaults,
            server_args.enable_cache_report,
            server_args.weight_version,
            self.parsers,
            template_defaults=server_args.template_defaults(),
            includes_usage=server_args.stream_response_default_include_usage,
            middle=MIDDLE_MARKS.get(server_args.completion_template or ""),
        )
        self.service = service
        self.kind = ModelKind(
            pooling_of(service.model_config, is_embedding=server_args.is_embedding)
        )
        self.runner = SequenceRunner(service, metrics, self.kind)
        self.generate = GenerateServer(
            service,
            self.runner,
            incremental=server_args.incremental_streaming_output,
            weight_version=server_args.weight_version,
            reasoning_parser=self.parsers.reasoning,
        )
        self.chat = ChatServing(service, self.runner, options)
        self.responses = ResponseServing(self.chat, ResponseStore())
        self.messages = MessageServing(self.chat)
        self.completions = CompletionServing(service, self.runner, options)
        self.ollama = OllamaServing(self.chat, self.completions)
        calls = PooledCalls(self.runner, self.kind)
        self.encode = EncodeServer(calls, server_args.weight_version)
        self.embeddings = EmbeddingServing(calls, options.cache_report)
        self.rerank = RerankServing(
            service, self.runner, calls, self.kind, server_args.weight_version
        )


class ServerContext:
    """One server's shared state; lives on the event loop that serves.

    `created` is the start as seconds since the epoch. Before `open` and after `close` every door
    but health answers 503.
    """

    def __init__(self, server_args: ServerArgs, environ: Environ) -> None:
        self.server_args = server_args
        self.environ = environ
        self.created = time.time()
        self.ready_after_s: float | None = None
        self.phase = Phase.STARTING
        self.metrics = (
            ServerMetrics(server_args.served_model_name, server_args.dp_size)
            if server_args.enable_metrics
            else None
        )
        self._serving: Serving | None = None

    def attach(self, service: TextService) -> None:
        """Give the doors the service that they will use once the server is open."""
        self._serving = Serving(service, self.server_args, self.metrics)

    def open(self) -> None:
        """Serve from now on; `attach` comes first."""
        self.ready_after_s = time.time() - self.created
        self.phase = Phase.READY

    def close(self) -> None:
        """Refuse new requests from now on."""
        self.phase = Phase.STOPPING

    @property
    def serving(self) -> Serving:
        """The API servers. Raises RequestError 503 unless the server is open."""
        if self.phase is Phase.STOPPING:
            raise RequestError("The server is shutting down.", 503)
        if self._serving is None or self.phase is Phase.STARTING:
            raise RequestError("The server is starting.", 503)
        return self._serving

    @property
    def generating(self) -> Serving:
        """`serving` of a model that generates; RequestError 400 for one that is pooled."""
        serving = self.serving
        serving.kind.need_generation()
        return serving

    @property
    def is_healthy(self) -> bool:
        """True when the server is open and its scheduler gives signs of life."""
        return (
            self.phase is Phase.READY
            and self._serving is not None
            and self._serving.service.is_healthy()
        )

    @property
    def request_byte_limit(self) -> int:
        """Largest request body in bytes at this moment."""
        return self.server_args.request_byte_limit(self.serving.service.context_length)

    @property
    def binary_byte_limit(self) -> int:
        """Largest body of token ids as int32: far longer prompts than the context are not read."""
        ids = ID_BYTES * self.serving.service.context_length
        return min(self.request_byte_limit, ids + BINARY_SLACK_BYTES)
