"""Runs the requests of sessions, between the doors and the service.

It puts what a session knows before what a request brings, and lets the store keep the ids of
requests that came to their own end. Aborted and failed ones leave a session as it was.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from sglang.srt.entrypoints.service import TextService
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.session_store import SessionStore, SessionTurn


class SessionRunner:
    """The sessions of one server; lives on its event loop. `clock` gives monotonic seconds."""

    def __init__(
        self,
        service: TextService,
        store: SessionStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._store = store or SessionStore()
        self._clock = clock

    def open(
        self, session_id: str | None, *, streaming: bool = False, timeout_s: float | None = None
    ) -> str:
        """Open a session; its id. Raises RequestError 400 when there is one, 503 without room."""
        return self._store.open(session_id, streaming, timeout_s, self._clock())

    def close(self, session_id: str) -> None:
        """Close a session and forget all of it. Raises RequestError 400 for an unknown one."""
        self._store.close(session_id, self._clock())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """`TextService.generate` of a request with a session; raises RequestError 400 and 503, too.

        What the session holds of it is decided before its last delta is seen.
        """
        assert request.session is not None
        if request.images:
            raise RequestError("session_params: a session keeps no images; send them without it.")
        turn = self._store.begin(request.session, request.rid, self._clock())
        try:
            new_ids = await self._new_ids(request, turn)
            self._store.check_room(len(new_ids))
            prompt = turn.prompt(new_ids)
            num_tokens = len(prompt)
            whole = replace(request, text=None, input_ids=prompt, session=None)
            del prompt  # the service lets go of it
            if whole.routed_dp_rank is None:
                whole.routed_dp_rank = turn.session.replica
            request.forget_prompt()
            output_ids: list[IdArray] = []
            async with aclosing(self._service.generate(whole)) as deltas:
                async for delta in deltas:
                    output_ids.append(delta.output_ids)
                    reason = delta.finish_reason
                    is_whole = delta.prompt_tokens == num_tokens  # it may be cut to fit
                    if reason is not None and reason.type != "abort" and is_whole:
                        turn.session.replica = delta.dp_rank
                        self._store.keep(turn, new_ids, output_ids)
                        self._store.end(turn, self._clock())
                    yield delta
        finally:
            self._store.end(turn, self._clock())

    async def _new_ids(self, request: GenerateRequest, turn: SessionTurn) -> IdArray:
        """What the request brings; in a text that goes on no other begins."""
        ids = request.input_ids
        if ids is None:
            ids = await self._service.tokenize(request.text or "", request.add_special_tokens)
        if ids.ndim != 1 or len(ids) == 0:
            raise RequestError("The prompt is empty: it must have at least one token.")
        tokenizer = self._service.tokenizer
        if turn.parent is not None and tokenizer is not None and ids[0] == tokenizer.bos_token_id:
            ids = ids[1:]
        return ids
