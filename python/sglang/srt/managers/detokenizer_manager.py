"""The detokenizer process: token news in, text news out, stop strings reported to the scheduler.

Started by the launcher with multiprocessing's spawn. It holds sockets and a loop; the work is
detokenizer.py's.
"""

from __future__ import annotations

import logging
import sys

import zmq

from sglang.srt.managers.detokenizer import Detokenizer
from sglang.srt.managers.io_struct import (
    BatchStrOut,
    IpcNames,
    ToDetokenizer,
    ToScheduler,
    ToTokenizer,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.loader import load_tokenizer_for
from sglang.srt.tokenizer.tokenizer import Tokenizer
from sglang.srt.utils.channel import Receiver, Sender
from sglang.srt.utils.process import set_up_child

logger = logging.getLogger(__name__)


class DetokenizerManager:
    """The sockets around a `Detokenizer` for `dp_size` replicas; belongs to one thread."""

    def __init__(self, ipc: IpcNames, tokenizer: Tokenizer | None, dp_size: int = 1) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._receiver = Receiver[ToDetokenizer](self._context, ipc.detokenizer, ToDetokenizer)
        self._to_tokenizer = Sender[ToTokenizer](self._context, ipc.tokenizer)
        self._to_schedulers = [
            Sender[ToScheduler](self._context, ipc.of_replica(dp_rank).scheduler)
            for dp_rank in range(dp_size)
        ]

    def run(self) -> None:
        """Serve for ever."""
        while True:
            self.run_once(None)

    def run_once(self, timeout_ms: int | None) -> bool:
        """Handle one message; False when none came within `timeout_ms` (None: wait for ever)."""
        batch = self._receiver.receive(timeout_ms)
        if batch is None:
            return False
        result = self._detokenizer.handle(batch)
        for hit in result.hits:
            for scheduler in self._to_schedulers:  # only one of them knows the request
                scheduler.send(hit)
        if result.outs:
            self._to_tokenizer.send(BatchStrOut(result.outs))
        return True

    def close(self) -> None:
        """Close the sockets; what was not delivered is dropped."""
        self._receiver.close()
        self._to_tokenizer.close()
        for scheduler in self._to_schedulers:
            scheduler.close()
        self._context.term()


def run_detokenizer_process(server_args: ServerArgs, ipc: IpcNames) -> None:
    """Entry of the process; runs until it is ended from outside, exits with 1 on any failure."""
    set_up_child("sglang::detokenizer", server_args.log_level)
    try:
        DetokenizerManager(ipc, load_tokenizer_for(server_args), server_args.dp_size).run()
    except Exception:
        logger.exception("The detokenizer cannot go on")
        sys.exit(1)
