"""Turns of several ranks: rank 0 hears, reads the clock and tells; the others do the same.

Every rank runs the same `Scheduler` over its own memory and worker. What a turn is decided from
travels as one `TurnInputs`, so all else is a pure function of common state. Made by
scheduler_process.py, called by the scheduler once a turn. See docs/structures.md, Note [Ranks].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.distributed.communicator import Communicator
from sglang.srt.errors import RankLostError
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    ToScheduler,
)
from sglang.srt.managers.scheduler_limits import (
    GrammarVerdict,
    SchedulerChannel,
    StepTime,
    TurnInputs,
    TurnSource,
)

# While nothing is computed no collective would notice a rank that hangs; so often all ranks meet.
MEET_INTERVAL_S = 1.0


class OwnTurns:
    """The turns of a rank that is alone: its channel, its clock."""

    def __init__(self, channel: SchedulerChannel, clock: Callable[[], float]) -> None:
        self._channel = channel
        self._clock = clock
        self._step_times: list[StepTime] = []
        self._grammars: list[GrammarVerdict] = []

    def next(self, poll_ms: int) -> TurnInputs:
        """See `TurnSource`; the clock is read after the wait."""
        messages = list(self._channel.receive(poll_ms))
        times, self._step_times = self._step_times, []
        verdicts, self._grammars = self._grammars, []
        return TurnInputs(self._clock(), messages, times, grammars=verdicts)

    def note_step(self, time: StepTime) -> None:
        """See `TurnSource`."""
        self._step_times.append(time)

    def note_grammars(self, verdicts: Sequence[GrammarVerdict]) -> None:
        """See `TurnSource`."""
        self._grammars.extend(verdicts)

    def note_decided(self, values: npt.NDArray[np.int64]) -> None:
        """Nobody else has to decide alike."""


class LeadingTurns:
    """Rank 0's turns: what came in is broadcast before anything is decided.

    `control` is the group of the schedulers' threads. Raises RankLostError from `next`.
    """

    def __init__(
        self, channel: SchedulerChannel, clock: Callable[[], float], control: Communicator
    ) -> None:
        self._own = OwnTurns(channel, clock)
        self._control = control
        self._digest = 0
        self._met = clock()
        self._encoder = msgspec.msgpack.Encoder()

    def next(self, poll_ms: int) -> TurnInputs:
        """See `TurnSource`; at rest every second all ranks meet."""
        inputs = self._own.next(poll_ms)
        inputs.digest = self._digest
        inputs.meet = poll_ms > 0 and inputs.now - self._met >= MEET_INTERVAL_S
        self._control.broadcast(self._encoder.encode(inputs))
        if inputs.meet:
            self._met = inputs.now
            self._control.agree((0,))
        return inputs

    def note_step(self, time: StepTime) -> None:
        """See `TurnSource`."""
        self._own.note_step(time)

    def note_grammars(self, verdicts: Sequence[GrammarVerdict]) -> None:
        """See `TurnSource`."""
        self._own.note_grammars(verdicts)

    def note_decided(self, values: npt.NDArray[np.int64]) -> None:
        """See `TurnSource`."""
        self._digest = zlib.crc32(values.tobytes(), self._digest)


class FollowingTurns:
    """Every other rank's turns: what rank 0 broadcast; it sleeps until that comes.

    Raises RankLostError from `next`, also when this rank has decided otherwise than rank 0.
    """

    def __init__(self, control: Communicator) -> None:
        self._control = control
        self._digest = 0
        self._decoder = msgspec.msgpack.Decoder(TurnInputs)

    def next(self, poll_ms: int) -> TurnInputs:
        """See `TurnSource`; how long to wait is rank 0's to decide."""
        del poll_ms
        inputs = self._decoder.decode(self._control.broadcast(None))
        if inputs.digest != self._digest:
            raise RankLostError(
                f"rank {self._control.rank} has decided otherwise than rank 0: "
                f"{self._digest:08x} is not {inputs.digest:08x}"
            )
        if inputs.meet:
            self._control.agree((0,))
        return inputs

    def note_step(self, time: StepTime) -> None:
        """Rank 0's time of the same step counts."""

    def note_grammars(self, verdicts: Sequence[GrammarVerdict]) -> None:
        """Rank 0's word counts."""

    def note_decided(self, values: npt.NDArray[np.int64]) -> None:
        """See `TurnSource`."""
        self._digest = zlib.crc32(values.tobytes(), self._digest)


class SilentChannel:
    """The channel of a rank that hears from rank 0 alone and tells nobody."""

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        """Nothing ever comes."""
        del timeout_ms
        return ()

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        """Rank 0 says the same."""

    def send_reply(self, reply: ControlReply) -> None:
        """Rank 0 says the same."""

    def send_progress(self, progress: BatchProgressOut) -> None:
        """Rank 0 says the same."""


def make_turns(
    channel: SchedulerChannel, clock: Callable[[], float], control: Communicator | None
) -> TurnSource:
    """The turns of a rank by its place in `control` (None: it is alone)."""
    if control is None:
        return OwnTurns(channel, clock)
    if control.rank == 0:
        return LeadingTurns(channel, clock, control)
    return FollowingTurns(control)
