"""Running prompts through a model that is pooled: vectors cut, normalised and in order.

Between the doors that speak a format and the sequences that carry the prompts. The device gives a
vector as it was pooled; what a client sees of it is made here, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.model_kind import ModelKind
from sglang.srt.entrypoints.sequences import Call, SequenceRunner
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.sampling.sampling_params import SamplingParams

Vector = npt.NDArray[np.float32]

NO_NEW_TOKENS = SamplingParams(max_new_tokens=0)
_LEAST_NORM = 1e-12  # of a vector of zeros, which stays one


@dataclass(frozen=True, slots=True)
class PooledAnswer:
    """A prompt's vector float32 [d] and its last news."""

    vector: Vector
    last: GenerateDelta


class PooledCalls:
    """One for the whole server, without state of its own."""

    def __init__(self, runner: SequenceRunner, kind: ModelKind) -> None:
        self._runner = runner
        self._kind = kind

    @property
    def pooling(self) -> PoolingConfig:
        """How the model is pooled. Raises RequestError 400 when it generates."""
        return self._kind.need_pooling()

    async def run(self, call: Call, dimensions: int | None = None) -> list[PooledAnswer]:
        """The vectors of the call's prompts, in order, of `dimensions` numbers (None: of all).

        Raises RequestError, as `SequenceRunner.collect` does, and 500 for what is no number.
        """
        pooling = self.pooling
        check_dimensions(dimensions, pooling)
        prompts = tuple(
            replace(prompt, pooling=prompt.pooling or pooling.spec) for prompt in call.prompts
        )
        outputs = await self._runner.collect(replace(call, prompts=prompts))
        answers = []
        for output in outputs:
            last = output.last
            if last is None or last.pooled is None:
                raise RequestError("The request was aborted and has no answer.", 499)
            if not np.isfinite(last.pooled).all():
                raise RequestError("The model's hidden states are not finite numbers.", 500)
            answers.append(PooledAnswer(finished(last.pooled, pooling, dimensions), last))
        return answers


def check_dimensions(dimensions: int | None, pooling: PoolingConfig) -> None:
    """Raise RequestError 400 for a number of dimensions that no vector has."""
    if dimensions is not None and not 1 <= dimensions <= pooling.size:
        raise bad_field(
            "dimensions", f"it must be in [1, {pooling.size}], the model's, got {dimensions}"
        )


def finished(vector: Vector, pooling: PoolingConfig, dimensions: int | None) -> Vector:
    """The first `dimensions` numbers of a pooled vector, brought to length 1 if vectors are so."""
    cut = vector[:dimensions]
    if not pooling.normalize:
        return cut
    whole: Vector = cut / np.maximum(np.linalg.norm(cut), np.float32(_LEAST_NORM))
    return whole


def prompt_requests(
    prompts: Sequence[str | IdArray],
    rid: str,
    *,
    priority: int | None = None,
    extra_key: str | None = None,
) -> tuple[GenerateRequest, ...]:
    """Requests that generate nothing, one for each text or list of ids (int32)."""
    return tuple(
        GenerateRequest(
            rid=rid if len(prompts) == 1 else f"{rid}_{i}",
            text=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            sampling_params=NO_NEW_TOKENS,
            stream=False,
            priority=priority,
            extra_key=extra_key,
        )
        for i, prompt in enumerate(prompts)
    )
