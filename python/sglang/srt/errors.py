"""The three error families that may be raised; the fourth, scarcity, is a value (None).

Every room raises these and nothing else on purpose. A `RequestError` always becomes a reply in
the API's error format, a `BackingError` is caught where memory is mapped, and an
`InvariantError` ends the process after its state was written down.
"""

from __future__ import annotations


class RequestError(Exception):
    """A client's mistake, or a refusal that the client has to hear about.

    `message` goes to the client as it is, `http_status` is the reply's status and `err_type` the
    OpenAI-style type name (None: derived from the status by the door that replies).
    """

    def __init__(self, message: str, http_status: int = 400, err_type: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.http_status = http_status
        self.err_type = err_type


class BackingError(Exception):
    """The machine refused: memory could not be mapped, a disk is full, a driver call failed."""


class InvariantError(Exception):
    """A count or an ownership does not add up: a bug, never a client's doing."""


class RankLostError(InvariantError):
    """Tensor-parallel ranks can't go on together: one is gone, hangs, or decided otherwise.

    Ends the process like any broken invariant; the message names the rank where it is known.
    """
