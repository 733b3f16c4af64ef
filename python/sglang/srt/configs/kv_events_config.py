"""What `--kv-events-config` says: whether and where events of the prefix cache are published.

`ServerArgs` holds the parsed value, the scheduler's process opens the publisher that it asks for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

_WILDCARDS = ("*", "0.0.0.0", "[::]")


@dataclass(frozen=True)
class KVEventsConfig:
    """One publisher. `publisher` is "zmq", or "null" for none.

    `endpoint` is bound when its host is a wildcard or it is an ipc path, else connected to.
    `hwm` messages wait per subscriber, `max_queue_size` batches before the socket, until the
    oldest are dropped (a gap in the sequence numbers tells). `replay_endpoint` is always bound and
    answers from the last `buffer_steps` batches; None: nothing is kept.
    """

    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    topic: str = ""
    hwm: int = 100_000
    max_queue_size: int = 100_000
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000

    PUBLISHERS: ClassVar[tuple[str, ...]] = ("null", "zmq")

    @classmethod
    def from_json(cls, text: str) -> KVEventsConfig:
        """Parse the flag's text, a JSON object. Raises ValueError with one line."""
        name = "--kv-events-config"
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{name} must be a JSON object")
        if given.pop("enable_kv_cache_events", True) is False:
            given["publisher"] = "null"
        known = {field.name: field.type for field in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise ValueError(f"{name}: unknown key {key!r}; known are {', '.join(known)}")
            _check(f"{name}: {key}", value, known[key])
        config = cls(**given)
        if config.publisher not in cls.PUBLISHERS:
            allowed = ", ".join(cls.PUBLISHERS)
            raise ValueError(f"{name}: publisher must be one of {allowed}")
        if "://" not in config.endpoint:
            raise ValueError(f"{name}: endpoint must look like tcp://*:5557")
        if config.replay_endpoint is not None:
            if "://" not in config.replay_endpoint:
                raise ValueError(f"{name}: replay_endpoint must look like tcp://*:5558")
            if _is_same_address(config.endpoint, config.replay_endpoint):
                raise ValueError(f"{name}: replay_endpoint must be another address than endpoint")
        return config

    def for_replica(self, dp_rank: int) -> KVEventsConfig:
        """The same for a replica: as in SGLang its ports, or paths, follow the first one's."""
        replay = self.replay_endpoint
        return replace(
            self,
            endpoint=_of_replica(self.endpoint, dp_rank),
            replay_endpoint=None if replay is None else _of_replica(replay, dp_rank),
        )

    @property
    def enabled(self) -> bool:
        """Whether anything is published."""
        return self.publisher != "null"

    @property
    def binds(self) -> bool:
        """Whether the endpoint is this side's own address."""
        host = self.endpoint.split("://", 1)[1].rsplit(":", 1)
        wild = any(mark in host[0] for mark in _WILDCARDS)
        return wild or host[-1] == "*" or self.endpoint.startswith(("ipc://", "inproc://"))


def _of_replica(endpoint: str, dp_rank: int) -> str:
    """The `dp_rank`-th endpoint after the first; a port that the system chooses stays so."""
    if dp_rank == 0:
        return endpoint
    start, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://"):
        return f"{start}:{int(port) + dp_rank}" if port.isdecimal() and int(port) else endpoint
    return f"{endpoint}_dp{dp_rank}"


def _is_same_address(one: str, other: str) -> bool:
    """Whether two endpoints name one address; a port that the system chooses is never the same."""
    transport, address = one.split("://", 1)
    if transport == "tcp" and address.rsplit(":", 1)[-1] in ("*", "0"):
        return False
    for mark in _WILDCARDS:
        one, other = (text.replace(f"//{mark}:", "//*:") for text in (one, other))
    return one == other


def _check(name: str, value: Any, kind: Any) -> None:
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1")
    if kind == "str | None" and value is None:
        return
    if kind in ("str", "str | None") and not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
