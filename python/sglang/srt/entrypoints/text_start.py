"""Starting the text side in the process of a server or an engine."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.pooling_config import pooling_of
from sglang.srt.entrypoints.generate_request_body import new_rid
from sglang.srt.entrypoints.probe import probe_request
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import IpcNames
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.draft_vocabulary import check_draft_vocabulary
from sglang.srt.tokenizer.loader import load_tokenizer_for

logger = logging.getLogger(__name__)

# One token by extend, one by decode: both paths have then run once.
_WARMUP_TOKENS = 2


async def start_text_service(
    server_args: ServerArgs, environ: Environ, model_config: ModelConfig, ipc: IpcNames
) -> TokenizerManager:
    """A TokenizerManager that receives; it refuses requests until the scheduler is ready.

    The tokenizer is loaded in a thread: meanwhile the loop answers. Raises ValueError when it
    cannot be loaded, or a draft model has another.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer_for, server_args)
    await asyncio.to_thread(check_draft_vocabulary, server_args, tokenizer)
    manager = TokenizerManager(server_args, environ, model_config, ipc, tokenizer)
    await manager.start()
    return manager


async def warm_up(manager: TokenizerManager) -> None:
    """Let every replica give a first answer, so that no client waits for what is slow once.

    The prefix that it leaves is dropped again. Raises RequestError when there is none.
    """
    if manager.context_length <= _WARMUP_TOKENS:
        return
    logger.info("Warming up")
    await asyncio.gather(
        *(_answer_once(manager, dp_rank) for dp_rank in range(manager.num_replicas))
    )
    await manager.flush_cache(timeout_s=5.0)


async def _answer_once(manager: TokenizerManager, dp_rank: int) -> None:
    args = manager.server_args
    pooling = pooling_of(manager.model_config, is_embedding=args.is_embedding)
    request = probe_request(f"WARMUP_{new_rid()}", _WARMUP_TOKENS, pooling, dp_rank)
    async with aclosing(manager.generate(request)) as deltas:
        async for delta in deltas:
            reason = delta.finish_reason
            if reason is not None and reason.type == "abort":
                raise RequestError(f"the warm-up failed: {reason.message}", 503)
