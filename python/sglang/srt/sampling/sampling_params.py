"""What a user may ask of sampling, under SGLang's field names, and its validation.

Built by the HTTP doors and the Engine, checked once by `verify`, then carried unchanged to the
scheduler and the sampler. It knows no tokenizer and no tensor.
"""

from __future__ import annotations

import math

import msgspec

from sglang.srt.errors import RequestError

TOP_K_ALL = 1 << 30
MAX_SEED = (1 << 63) - 1
# What the library does not bound by itself, compiling and the work of a mask, grows with the text,
# part of it squared. The translator of EBNF is Python and holds the interpreter as well.
MAX_CONSTRAINT_CHARS = {
    "json_schema": 1 << 17,
    "regex": 1 << 14,
    "ebnf": 1 << 16,
    "structural_tag": 1 << 17,
}


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """What a generated text must match: `kind` is the field's name, `text` what it says."""

    kind: str
    text: str


# What a text is held to that nothing but its reasoning's length bounds.
FREE_TEXT = Constraint("max_thinking_tokens", "")


class ReasoningFirst(msgspec.Struct, frozen=True, array_like=True):
    """Reasoning that a text begins with, before it is held to its constraint.

    It ends with the text `end`. `inside`: the text is reasoning from its first character; else it
    is if it begins with `begin`.
    """

    begin: str
    end: str
    inside: bool


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SGLang's sampling parameters.

    temperature 0 means greedy. top_k -1 means all. `max_new_tokens` None means up to the context
    limit. `stop` holds stop strings, `stop_regex` patterns that end a text likewise;
    `stop_token_ids` ends a request when sampled (ignored under `ignore_eos`, as end-of-text ids
    are). `sampling_seed` None means one drawn by the scheduler. `logit_bias` maps token id to an
    addend of the logit. At most one of `json_schema` (a schema as
    JSON text), `regex`, `ebnf` and `structural_tag` (JSON text, too) says what the whole generated
    text must match, or what follows `reasoning` (None: there is none), which the doors set and no
    client. After `max_thinking_tokens` tokens of it its end is forced (None: never).
    """

    max_new_tokens: int | None = 128
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[int, float] = {}
    sampling_seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    reasoning: ReasoningFirst | None = None
    max_thinking_tokens: int | None = None

    @property
    def constraint(self) -> Constraint | None:
        """What the generated text must match; None: anything goes."""
        for kind in MAX_CONSTRAINT_CHARS:
            text: str | None = getattr(self, kind)
            if text is not None:
                return Constraint(kind, text)
        return None

    @property
    def held_to(self) -> Constraint | None:
        """What its tokens are chosen by, FREE_TEXT if only its reasoning is bounded; None: free."""
        is_bounded = self.reasoning is not None and self.max_thinking_tokens is not None
        return self.constraint or (FREE_TEXT if is_bounded else None)

    @property
    def greedy(self) -> bool:
        """True when the largest logit is taken: temperature 0 or top_k 1."""
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """True when the tokens seen so far change the logits."""
        return (
            self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def verify(self, vocab_size: int) -> None:
        """Raise `RequestError` (400) naming the first field whose value cannot be served."""
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("min_p", 0.0, 1.0),
            ("frequency_penalty", -2.0, 2.0),
            ("presence_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name} must be in [{low:g}, {high:g}], got {value}.")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not 0.0 < self.repetition_penalty <= 2.0:
            raise RequestError(
                f"repetition_penalty must be in (0, 2], got {self.repetition_penalty}."
            )
        if self.top_k != -1 and not 1 <= self.top_k <= TOP_K_ALL:
            raise RequestError(f"top_k must be -1 (all) or at least 1, got {self.top_k}.")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise RequestError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}.")
        if self.min_new_tokens < 0:
            raise RequestError(f"min_new_tokens must be at least 0, got {self.min_new_tokens}.")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}."
            )
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 0:
            raise RequestError(
                f"max_thinking_tokens must be at least 0, got {self.max_thinking_tokens}."
            )
        if not 1 <= self.n <= 128:
            raise RequestError(f"n must be in [1, 128], got {self.n}.")
        if self.sampling_seed is not None and not -MAX_SEED <= self.sampling_seed <= MAX_SEED:
            raise RequestError("sampling_seed must fit in 64 bits.")
        self._verify_constraint()
        self._verify_ids(vocab_size)

    def _verify_constraint(self) -> None:
        given = [k for k in MAX_CONSTRAINT_CHARS if getattr(self, k) is not None]
        if len(given) > 1:
            raise RequestError(f"Only one constraint can be given, not {' and '.join(given)}.")
        constraint = self.constraint
        if constraint is None:
            return
        kind, text = constraint.kind, constraint.text
        most = MAX_CONSTRAINT_CHARS[kind]
        if len(text) > most:
            raise RequestError(f"{kind} has {len(text)} characters, at most {most} are served.")
        if kind in ("json_schema", "structural_tag"):
            _check_object(kind, text)

    def _verify_ids(self, vocab_size: int) -> None:
        if any(not s for s in self.stop):
            raise RequestError("stop must not contain an empty string.")
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} has token id {token_id}, but the vocabulary has {vocab_size} ids."
                    )
        for token_id, bias in self.logit_bias.items():
            if math.isnan(bias) or not -1e6 <= bias <= 1e6:
                raise RequestError(
                    f"logit_bias of token {token_id} must be in [-1e6, 1e6], got {bias}."
                )


def _check_object(kind: str, text: str) -> None:
    """Raise RequestError (400) unless `text` is a JSON object; what it says is checked later."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise RequestError(f"{kind} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{kind} must be a JSON object.")
