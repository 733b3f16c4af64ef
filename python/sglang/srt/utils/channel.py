"""Typed ZeroMQ pipes between the processes: PUSH on one side, PULL on the other.

Every process binds the PULL end of its own name and connects PUSH ends to the others. Messages
are msgspec structs in msgpack with tagged unions. The high-water mark is unlimited: a sender
never blocks and never drops, because what is in flight is bounded by the requests that were
admitted. Sockets belong to one thread each; nothing here knows what a message means.

A message type may name one of its fields, a `memoryview`, as `bulk_field`. Its bytes travel as a
frame of their own behind the message: the sender hands their memory to ZeroMQ and the receiver
gets a window on what came in, so on neither side is there a copy.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import deque
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec
import zmq

T = TypeVar("T")

_NO_BYTES = memoryview(b"")
_POLLIN = int(zmq.POLLIN)
_MAX_DIRECTORY_BYTES = 80
"""A Unix socket's path must fit in 104 bytes on some systems; the rest is for its name."""


class IpcDirectory:
    """A private (0700) directory for the sockets of one server.

    `IpcNames.in_directory(directory.path)` gives the endpoints. Removed by `remove` or on leaving
    the `with` block. Raises ValueError when the temporary directory's path is too long.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.path = tempfile.mkdtemp(prefix="sglang-", dir=parent)
        if len(os.fsencode(self.path)) > _MAX_DIRECTORY_BYTES:
            self.remove()
            raise ValueError(
                f"{self.path} is too long for the path of a socket "
                f"({_MAX_DIRECTORY_BYTES} bytes at most); set TMPDIR to a shorter directory."
            )

    def remove(self) -> None:
        """Delete the directory and what is in it; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> IpcDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class Sender(Generic[T]):
    """The PUSH end; `send` never blocks. Use it from one thread."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: T) -> None:
        """Queue `message` for the other side; it need not be there yet.

        The memory of a bulk field must not change any more; it is kept until it was delivered.
        """
        name = _bulk_field(message)
        if name is None:
            # A small message costs less to copy than to keep until it was delivered.
            self._socket.send(self._encoder.encode(message))
            return
        bulk = getattr(message, name)
        head = self._encoder.encode(_without(message, name))
        self._socket.send_multipart([head, bulk], copy=False)

    def close(self) -> None:
        """Close the socket and drop what was not delivered; a second call does nothing."""
        self._socket.close(linger=0)


class Receiver(Generic[T]):
    """The PULL end for a thread that waits or polls. Use it from one thread.

    `kind` is the message type or union to decode; a bulk field is a window on the received frame,
    which it keeps alive. Raises `msgspec.DecodeError` for anything else.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, kind: Any) -> None:
        self._socket: zmq.Socket[bytes] = _bound_pull(context, endpoint)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def receive(self, timeout_ms: int | None = None) -> T | None:
        """The next message, waiting at most `timeout_ms` (None: for ever, 0: not at all).

        None when nothing came in time.
        """
        if timeout_ms is None:
            return self._read(self._socket.recv())
        if not self._socket.poll(timeout_ms):
            return None
        return self._read(self._socket.recv(zmq.NOBLOCK))

    def drain(self) -> list[T]:
        """All messages that are already here, without waiting."""
        messages: list[T] = []
        while int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN:
            messages.append(self._read(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def _read(self, head: bytes) -> T:
        message = self._decoder.decode(head)
        if self._socket.getsockopt(zmq.RCVMORE):  # the frames of one message come together
            _attach(message, self._socket.recv(zmq.NOBLOCK, copy=False))
        return message

    @property
    def descriptor(self) -> int:
        """Readable when something may have come since the socket was last asked."""
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """The PULL end for an asyncio loop; make it on that loop. Decodes as `Receiver` does.

    The loop watches the socket's descriptor, which tells that something changed and stays readable
    until the socket was asked: so it is asked until nothing is left. ZeroMQ's own sockets for
    asyncio make several futures and timers for a message.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, kind: Any) -> None:
        self._inbox: Receiver[T] = Receiver(context, endpoint, kind)
        self._loop = asyncio.get_running_loop()
        self._messages: deque[T] = deque()
        self._arrival = asyncio.Event()
        self._failure: Exception | None = None
        self._descriptor: int | None = self._inbox.descriptor
        self._loop.add_reader(self._descriptor, self._take)
        self._take()

    async def receive(self) -> T:
        """Wait for the next message. Raises what `Receiver` raises for one of another kind."""
        while not self._messages:
            if self._failure is not None:
                raise self._failure
            self._arrival.clear()
            await self._arrival.wait()
        return self._messages.popleft()

    def _take(self) -> None:
        """What the loop calls when the descriptor is readable."""
        try:
            self._messages += self._inbox.drain()
        except (msgspec.DecodeError, zmq.ZMQError) as error:
            self._failure = error
            self._stop_watching()
        self._arrival.set()

    def _stop_watching(self) -> None:
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._stop_watching()
        self._inbox.close()


def _bound_pull(context: Any, endpoint: str) -> Any:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(endpoint)
    return socket


def _bulk_field(message: object) -> str | None:
    return getattr(type(message), "bulk_field", None)


def _without(message: Any, name: str) -> Any:
    return msgspec.structs.replace(message, **{name: _NO_BYTES})


def _attach(message: object, frame: zmq.Frame) -> None:
    name = _bulk_field(message)
    if name is None:
        raise msgspec.DecodeError(f"a {type(message).__name__} comes in one frame")
    setattr(message, name, frame.buffer)
