"""What `--kv-events-config` says: whether and where events of the prefix cache are published.

`ServerArgs` holds the parsed value, the scheduler's process opens the publisher that it asks for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

# Keys of the same option elsewhere that ask for something that does not exist here.
_REFUSED = {"replay_endpoint": "a replay socket"}
_IGNORED = ("buffer_steps",)  # belongs to the replay socket


@dataclass(frozen=True)
class KVEventsConfig:
    """One publisher. `publisher` is "zmq", or "null" for none.

    `endpoint` is bound when its host is a wildcard or it is an ipc path, else connected to.
    `hwm` messages wait per subscriber, `max_queue_size` batches before the socket, until the
    oldest are dropped (a gap in the sequence numbers tells).
    """

    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    topic: str = ""
    hwm: int = 100_000
    max_queue_size: int = 100_000

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
        for key, what in _REFUSED.items():
            if given.pop(key, None) is not None:
                raise ValueError(f"{name}: {key} asks for {what}, which does not exist here")
        for key in _IGNORED:
            given.pop(key, None)
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
        return config

    @property
    def enabled(self) -> bool:
        """Whether anything is published."""
        return self.publisher != "null"

    @property
    def binds(self) -> bool:
        """Whether the endpoint is this side's own address."""
        host = self.endpoint.split("://", 1)[1].rsplit(":", 1)
        wild = any(mark in host[0] for mark in ("*", "0.0.0.0", "[::]"))
        return wild or host[-1] == "*" or self.endpoint.startswith(("ipc://", "inproc://"))


def _check(name: str, value: Any, kind: Any) -> None:
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1")
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
