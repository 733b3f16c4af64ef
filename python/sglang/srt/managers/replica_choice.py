"""Which replica gets a request (`--load-balance-method`), and what several say as one.

Decided from counts, by nobody else. The TokenizerManager asks once for each request and tells when
it has ended; it alone sends requests, so its counts are the queues' lengths. Nothing here sends
anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from sglang.srt.managers.generate_request import IdArray
from sglang.srt.managers.io_struct import ControlReply

# Prefixes are noted by blocks of so many tokens, up to so many blocks of a prompt, and so many in
# all: a few megabytes.
BLOCK_TOKENS = 64
MAX_BLOCKS = 64
MAX_NOTED = 1 << 16

# A known prefix is not followed to a replica with more than twice the requests of the least busy
# one, and so many more: its queue would cost more than its cache saves.
SPARE_REQUESTS = 4


class ReplicaChoice:
    """Chooses among `num_replicas` by `method`, a value of the flag."""

    def __init__(self, method: str, num_replicas: int) -> None:
        self._method = method
        self._next = 0
        self.num_requests = [0] * num_replicas  # sent and not ended
        self._seen: OrderedDict[int, int] = OrderedDict()  # chain hash of a prefix -> replica

    def choose(self, input_ids: IdArray, extra_key: str | None = None) -> int:
        """The replica for a prompt, int32 [n], whose request counts there until `ended`."""
        if self._method == "shortest_queue":
            chosen = self._least_busy()
        elif self._method == "cache_aware":
            chosen = self._choose_by_prefix(input_ids, extra_key)
        else:
            chosen = self._next
            self._next = (chosen + 1) % len(self.num_requests)
        self.num_requests[chosen] += 1
        return chosen

    def began(self, replica: int) -> None:
        """A request goes to `replica` by its own wish."""
        self.num_requests[replica] += 1

    def ended(self, replica: int) -> None:
        """A request that was chosen for or began at `replica` is over."""
        self.num_requests[replica] -= 1

    def _least_busy(self) -> int:
        """The one with the fewest requests; among equals they take turns."""
        count = len(self.num_requests)
        order = sorted(
            range(count), key=lambda one: (self.num_requests[one], (one - self._next) % count)
        )
        self._next = (order[0] + 1) % count
        return order[0]

    def _choose_by_prefix(self, input_ids: IdArray, extra_key: str | None) -> int:
        chain = _block_hashes(input_ids, extra_key)
        known = next((self._seen[key] for key in reversed(chain) if key in self._seen), None)
        most = 2 * min(self.num_requests) + SPARE_REQUESTS
        if known is None or self.num_requests[known] > most:
            chosen = self._least_busy()
        else:
            chosen = known
        for key in chain:
            self._seen[key] = chosen
            self._seen.move_to_end(key)
        while len(self._seen) > MAX_NOTED:
            self._seen.popitem(last=False)
        return chosen


def _block_hashes(input_ids: IdArray, extra_key: str | None) -> list[int]:
    """One number for each of the first prefixes of whole blocks, shortest first."""
    hashes: list[int] = []
    before = hash(extra_key)
    last = min(len(input_ids) // BLOCK_TOKENS, MAX_BLOCKS) * BLOCK_TOKENS
    for first in range(0, last, BLOCK_TOKENS):
        before = hash((before, input_ids[first : first + BLOCK_TOKENS].tobytes()))
        hashes.append(before)
    return hashes


def merged_reply(answers: Sequence[ControlReply]) -> ControlReply:
    """One reply for those of all replicas; see `TokenizerManager.control`."""
    told = next((answer for answer in answers if not answer.success), answers[0])
    if len(answers) == 1:
        return told
    data = {**told.data, "replicas": [answer.data for answer in answers]}
    return msgspec.structs.replace(told, data=data)
