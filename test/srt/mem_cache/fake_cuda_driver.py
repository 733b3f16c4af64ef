"""A CUDA driver that keeps the rules and fails on demand; for tests only.

Strict where hardware is silent: mapping twice, unmapping what a reader still needs, releasing
what is mapped, freeing what is not empty, touching what is not open are assertion failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang.srt.mem_cache.segment_backing.cuda_driver import DriverError

KINDS = (
    "granularity",
    "reserve_address",
    "free_address",
    "create_handle",
    "release_handle",
    "map",
    "unmap",
    "set_access",
    "record_event",
    "event_done",
    "memory_info",
    "host_granularity",
    "create_host_handle",
    "copy",
)


@dataclass
class Mapping:
    length: int
    handle: int
    accessible: bool = False


@dataclass
class Reader:
    """Work in flight that reads a range; `events` wait for it."""

    address: int
    length: int
    events: set[int] = field(default_factory=set)


class FakeCudaDriver:
    """Address ranges, handles, mappings, access and events of a device of `total_bytes`.

    `fail_at` counts down over all calls, `fail_kind[kind]` over one kind's: the call that brings
    it to 0 fails. `fail_always` kinds always fail. `calls` is the list of all calls' kinds.
    """

    def __init__(
        self, *, granule: int = 256, recommended: int | None = None, total_bytes: int = 1 << 30
    ) -> None:
        self.minimum = granule
        self.recommended = recommended or granule
        self.total_bytes = total_bytes
        self.ranges: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.on_host: set[int] = set()  # of the handles
        self.contents: dict[int, object] = {}  # by handle, what a test wrote into it
        self.mappings: dict[int, Mapping] = {}
        self.readers: list[Reader] = []
        self.events: set[int] = set()
        self.calls: list[str] = []
        self.fail_at = 0
        self.fail_kind: dict[str, int] = {}
        self.fail_always: set[str] = set()
        self.finish_after: int | None = None  # looks at an event until its readers end
        self._next_address = 1 << 40
        self._next_id = 1

    # ---- what the tests ask ------------------------------------------------------------------

    def state(self) -> object:
        """All that a failed call must leave as it was; handles by what they hold, not by name."""
        mapped = {
            a: (m.length, m.accessible, m.handle in self.on_host, self.contents.get(m.handle))
            for a, m in self.mappings.items()
        }
        held = sorted((length, h in self.on_host) for h, length in self.handles.items())
        return dict(self.ranges), held, mapped

    @property
    def used_bytes(self) -> int:
        return sum(length for h, length in self.handles.items() if h not in self.on_host)

    @property
    def host_bytes(self) -> int:
        return sum(self.handles[handle] for handle in self.on_host)

    def write(self, address: int, content: object) -> None:
        """A kernel writes the whole of what is mapped at an address."""
        self.touch(address, 1)
        self.contents[self.mappings[address].handle] = content

    def read(self, address: int) -> object:
        self.touch(address, 1)
        return self.contents[self.mappings[address].handle]

    def launch(self, address: int, length: int) -> Reader:
        """Work that reads a range begins; every byte must be mapped and open."""
        self.touch(address, length)
        reader = Reader(address, length)
        self.readers.append(reader)
        return reader

    def finish(self, reader: Reader) -> None:
        self.touch(reader.address, reader.length)
        self.readers.remove(reader)

    def touch(self, address: int, length: int) -> None:
        """A kernel reads or writes a range."""
        at = address
        while at < address + length:
            base, mapping = next(
                ((b, m) for b, m in self.mappings.items() if b <= at < b + m.length),
                (0, None),
            )
            assert mapping is not None, f"{at:#x} is touched but not mapped"
            assert mapping.accessible, f"{at:#x} is touched but not open"
            at = base + mapping.length

    # ---- the driver --------------------------------------------------------------------------

    def granularity(self, *, recommended: bool) -> int:
        self._count("granularity")
        return self.recommended if recommended else self.minimum

    def reserve_address(self, length: int, alignment: int) -> int:
        self._count("reserve_address")
        assert length > 0
        assert length % self.minimum == 0
        address = -(-self._next_address // alignment) * alignment
        self._next_address = address + length + self.minimum
        self.ranges[address] = length
        return address

    def free_address(self, address: int, length: int) -> None:
        self._count("free_address")
        assert self.ranges.get(address) == length, "not a whole reservation"
        inside = [a for a in self.mappings if address <= a < address + length]
        assert not inside, f"freed with mappings at {inside}"
        del self.ranges[address]

    def create_handle(self, length: int) -> int:
        self._count("create_handle")
        assert length > 0
        assert length % self.minimum == 0
        if self.used_bytes + length > self.total_bytes:
            raise DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        handle = self._next_id
        self._next_id += 1
        self.handles[handle] = length
        return handle

    def release_handle(self, handle: int) -> None:
        self._count("release_handle")
        assert handle in self.handles, "released twice"
        assert all(m.handle != handle for m in self.mappings.values()), "released while mapped"
        del self.handles[handle]
        self.on_host.discard(handle)
        self.contents.pop(handle, None)

    def map(self, address: int, length: int, handle: int) -> None:
        self._count("map")
        assert self.handles.get(handle) == length, "a handle must be mapped whole"
        assert all(m.handle != handle for m in self.mappings.values()), "a handle mapped twice"
        assert any(a <= address and address + length <= a + n for a, n in self.ranges.items())
        for other, mapping in self.mappings.items():
            apart = address + length <= other or other + mapping.length <= address
            assert apart, f"{address:#x} is mapped already"
        self.mappings[address] = Mapping(length, handle)

    def unmap(self, address: int, length: int) -> None:
        self._count("unmap")
        mapping = self.mappings.get(address)
        assert mapping is not None, f"{address:#x} is not mapped"
        assert mapping.length == length, "an unmap must be of exactly one mapping"
        for reader in self.readers:
            apart = address + length <= reader.address or reader.address + reader.length <= address
            assert apart, f"{address:#x} is unmapped under a reader"
        del self.mappings[address]

    def set_access(self, address: int, length: int) -> None:
        self._count("set_access")
        at = address
        while at < address + length:
            mapping = self.mappings.get(at)
            assert mapping is not None, f"access set at {at:#x}, where nothing is mapped"
            mapping.accessible = True
            at += mapping.length
        assert at == address + length, "access set on part of a mapping"

    def record_event(self) -> int:
        self._count("record_event")
        event = self._next_id
        self._next_id += 1
        self.events.add(event)
        for reader in self.readers:
            reader.events.add(event)
        return event

    def event_done(self, event: int) -> bool:
        self._count("event_done")
        assert event in self.events, "an event that is gone"
        waiting = [reader for reader in self.readers if event in reader.events]
        if waiting and self.finish_after is not None:
            self.finish_after -= 1
            if self.finish_after == 0:
                for reader in waiting:
                    self.finish(reader)
        if waiting:
            return False
        self.events.remove(event)
        return True

    def memory_info(self) -> tuple[int, int]:
        self._count("memory_info")
        return self.total_bytes - self.used_bytes, self.total_bytes

    def host_granularity(self) -> int:
        self._count("host_granularity")
        return self.minimum

    def create_host_handle(self, length: int) -> int:
        self._count("create_host_handle")
        assert length > 0
        assert length % self.minimum == 0
        handle = self._next_id
        self._next_id += 1
        self.handles[handle] = length
        self.on_host.add(handle)
        return handle

    def copy(self, parts: Sequence[tuple[int, int, int]]) -> None:
        self._count("copy")
        for target, source, length in parts:
            self.touch(target, length)
            self.touch(source, length)
            to, of = self.mappings[target], self.mappings[source]
            assert to.length == of.length == length, "a copy must be of a whole handle"
            self.contents[to.handle] = self.contents.get(of.handle)

    def _count(self, kind: str) -> None:
        self.calls.append(kind)
        fails = kind in self.fail_always
        if self.fail_at:
            self.fail_at -= 1
            fails |= self.fail_at == 0
        if self.fail_kind.get(kind):
            self.fail_kind[kind] -= 1
            fails |= self.fail_kind[kind] == 0
        if fails:
            raise DriverError(kind, "CUDA_ERROR_TOLD_TO_FAIL")


def kinds_since(driver: FakeCudaDriver, start: int) -> Sequence[str]:
    """The calls since there were `start` of them, repetitions of a kind folded into one."""
    calls = driver.calls[start:]
    return [kind for i, kind in enumerate(calls) if i == 0 or calls[i - 1] != kind]
