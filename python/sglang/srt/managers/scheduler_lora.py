"""The scheduler's book of adapters: which are loaded, who has a place, what has to change places.

Admission asks whether a request may run and gives it its adapter's place; the changes go with the
next batch. Loading and unloading happen between steps, on all ranks or on none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from sglang.srt.configs.lora_args import LoraRef
from sglang.srt.distributed.communicator import Communicator
from sglang.srt.managers.io_struct import ControlReply, ControlReq, FinishReason
from sglang.srt.managers.lora_policy import (
    choose_place,
    has_place,
    held_places,
    may_overtake,
)
from sglang.srt.managers.schedule_batch import AdapterChange, Req
from sglang.srt.model_executor.decode_tapes import CausalLM
from sglang.srt.model_executor.lora_places import AdapterPlaces, make_places
from sglang.srt.model_loader.lora_files import read_adapter
from sglang.srt.models.causal_lm import CausalLM as LoadedModel
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.device import DeviceRuntime

logger = logging.getLogger(__name__)

LORA_OPS = ("load_lora_adapter", "unload_lora_adapter")


class AdapterHost(Protocol):
    """What loading and unloading ask of the scheduler."""

    def requests(self) -> Sequence[Req]: ...

    def drain(self) -> None: ...


class SchedulerAdapters:
    """One rank's adapters; `places` None: none are served.

    `evicts_lru`: the least recently used gives up its place, else the one that has it longest.
    `ranks` (None: this rank is alone) decide together whether an adapter is loaded.
    """

    def __init__(
        self,
        places: AdapterPlaces | None = None,
        *,
        evicts_lru: bool = True,
        ranks: Communicator | None = None,
    ) -> None:
        self._places = places
        self._evicts_lru = evicts_lru
        self._ranks = ranks
        self._loaded: set[int] = set()
        self._pinned: set[int] = set()
        self._place_of: dict[int, int] = {}  # in the order in which places are given up
        self._held: set[int] = set()
        self._is_somebody_waiting = False
        self._changes: list[AdapterChange] = []

    @property
    def serves(self) -> bool:
        """Whether adapters are served."""
        return self._places is not None

    # ---- admission

    def begin_admission(self, running: Sequence[Req]) -> None:
        """A new look at the queue, with `running` all requests that have a lease."""
        self._is_somebody_waiting = False
        if self._places is not None:
            users = [req.adapter_id for req in running]
            self._held = held_places(users, self._pinned, self._place_of)

    def may_admit(self, req: Req) -> bool:
        """Whether the next in the queue has a place for its adapter; asked in the queue's order."""
        if self._places is None:
            return True
        adapter = req.adapter_id
        numbers = (self._held, self._pinned, self._places.num_places)
        if self._is_somebody_waiting:
            return may_overtake(adapter, *numbers)
        if adapter is None or has_place(adapter, *numbers):
            return True
        self._is_somebody_waiting = True
        return False

    def fits_beside(self, req: Req, others: Sequence[Req]) -> bool:
        """Whether `req` would have a place if no more than `others` ran."""
        if self._places is None or req.adapter_id is None:
            return True
        held = held_places([one.adapter_id for one in others], self._pinned, self._place_of)
        return has_place(req.adapter_id, held, self._pinned, self._places.num_places)

    def take_place(self, req: Req) -> None:
        """Give an admitted request its adapter's place, noting what has to change for it."""
        adapter = req.adapter_id
        if self._places is None or adapter is None:
            return
        place = self._place_of.get(adapter)
        if place is None:
            place, victim = choose_place(self._place_of, self._held, self._places.num_places)
            if victim is not None:
                del self._place_of[victim]
            self._changes.append(AdapterChange(place, adapter))
        elif self._evicts_lru:
            del self._place_of[adapter]  # it goes to the end
        self._place_of[adapter] = place
        self._held.add(adapter)
        req.adapter_place = place

    def take_changes(self) -> tuple[AdapterChange, ...]:
        """What has to change before the next step computes; told once."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def refusal(self, adapter_id: int | None) -> FinishReason | None:
        """Why a request with this adapter can't be served; None: it can."""
        if adapter_id is None or adapter_id in self._loaded:
            return None
        text = "The request's LoRA adapter is not loaded."
        return FinishReason("abort", message=text, status_code=400, err_type="BadRequestError")

    # ---- loading

    def load(self, adapter_id: int, ref: LoraRef) -> str | None:
        """Load an adapter on all ranks, or on none; why not, or None when it is there."""
        if self._places is None:
            return "LoRA adapters are not served (--enable-lora)."
        error = None
        try:
            self._places.hold(adapter_id, read_adapter(ref.path))
        except (ValueError, OSError) as reason:
            error = f"{reason}"
        if self._ranks is not None and not self._ranks.agree((error is None,))[0]:
            error = error or "another rank could not load it"
        if error is not None:
            self._places.forget(adapter_id)
            logger.warning("LoRA adapter %r was not loaded: %s", ref.name, error)
            return error
        self._loaded.add(adapter_id)
        if ref.pinned:
            self._pinned.add(adapter_id)
        logger.info("Loaded LoRA adapter %r from %s; %r", ref.name, ref.path, self._places)
        return None

    def unload(self, adapter_id: int, host: AdapterHost) -> str | None:
        """Forget an adapter that nobody uses; why not, or None when it is gone."""
        if self._places is None or adapter_id not in self._loaded:
            return "It is not loaded."
        host.drain()
        users = sum(req.adapter_id == adapter_id for req in host.requests())
        if users:
            return f"{users} requests use it."
        self._loaded.discard(adapter_id)
        self._pinned.discard(adapter_id)
        self._place_of.pop(adapter_id, None)
        self._changes = [one for one in self._changes if one.adapter_id != adapter_id]
        self._places.forget(adapter_id)
        return None

    def answer(self, message: ControlReq, host: AdapterHost) -> ControlReply:
        """Load or unload, as one of `LORA_OPS` says."""
        args = message.args
        adapter_id = int(args["adapter_id"])
        if message.op == "load_lora_adapter":
            ref = LoraRef(str(args["name"]), str(args["path"]), bool(args["pinned"]))
            error = self.load(adapter_id, ref)
        else:
            error = self.unload(adapter_id, host)
        return ControlReply(message.seq, error is None, error or "")


def open_adapters(
    args: ServerArgs, model: CausalLM, ranks: Communicator | None, runtime: DeviceRuntime
) -> tuple[AdapterPlaces | None, SchedulerAdapters]:
    """The places, filled with nothing, and the book with --lora-paths loaded.

    For right after the weights are loaded: the places' memory counts as theirs does. Raises
    ValueError with one line for an adapter that can't be served.
    """
    if not args.serves_lora:
        return None, SchedulerAdapters()
    if not isinstance(model, LoadedModel):
        raise ValueError("--enable-lora: this model takes no adapters")
    found = [read_adapter(ref.path) for ref in args.lora_paths]
    places = make_places(
        model.adapter_sites(),
        found,
        num_places=args.max_loras_per_batch,
        rank=args.max_lora_rank,
        targets=args.lora_target_modules,
        own_factors=model.own_factors,
        runtime=runtime,
    )
    book = SchedulerAdapters(places, evicts_lru=args.lora_eviction_policy == "lru", ranks=ranks)
    for number, ref in enumerate(args.lora_paths, 1):
        error = book.load(number, ref)
        if error is not None:
            raise ValueError(f"--lora-paths: {error}")
    return places, book
