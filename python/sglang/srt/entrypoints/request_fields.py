"""What a door does with every field of its request: one table per endpoint.

A field is served (it is an attribute of the endpoint's body struct), accepted (it cannot change
the answer here) or refused (the answer would differ from what the client asked: 400 naming it,
unless it holds a neutral value). Null means "not given" unless the field's type has a None of its
own. Unknown fields are refused or ignored, as the endpoint says. A field of a union with
`msgspec.Raw` is left as it comes: JSON text, or what `split_body` has read of it.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

import msgspec
import numpy as np

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.request_body import Fields, FieldValue, decode_field
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.errors import RequestError

S = TypeVar("S", bound=msgspec.Struct)

# What msgpack and the scheduler can carry; anything larger is a client's mistake in any field.
Int = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
NULL = b"null"
_ANY = msgspec.json.Decoder(Any)


@dataclass(frozen=True)
class Refusal:
    """Why a field is not served, and which values of it ask for nothing (null always does)."""

    reason: str
    neutral: tuple[Any, ...] = ()


class FieldTable(Generic[S]):
    """The fields of one endpoint; `read` turns raw fields into the body struct."""

    def __init__(
        self,
        body: type[S],
        *,
        accepted: Iterable[str],
        refused: Mapping[str, Refusal],
        refuse_unknown: bool,
    ) -> None:
        hints = typing.get_type_hints(body, include_extras=True)
        self._body = body
        self._served = {name: hints[name] for name in body.__struct_fields__}
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {
            name: msgspec.json.Decoder(_json_type(hint)) for name, hint in self._served.items()
        }
        self._nullable = frozenset(n for n, hint in self._served.items() if _takes_none(hint))
        self._accepted = frozenset(accepted)
        self._refused = dict(refused)
        self._refuse_unknown = refuse_unknown

    @property
    def served(self) -> frozenset[str]:
        """Names of the fields that are served."""
        return frozenset(self._served)

    @property
    def accepted(self) -> frozenset[str]:
        """Names of the fields that are accepted without effect on the answer."""
        return self._accepted

    @property
    def refused(self) -> Mapping[str, Refusal]:
        """The fields that are refused, and why."""
        return self._refused

    def read(self, fields: Fields, prefix: str = "") -> S:
        """The body struct, defaults where a field is absent.

        `prefix` stands before a field's name in messages. Raises RequestError 400 naming the
        first field that is refused, unknown (where that is refused) or of a wrong type.
        """
        values: dict[str, Any] = {}
        for name, raw in fields.items():
            if name in self._served:
                if not isinstance(raw, msgspec.Raw):
                    values[name] = raw
                elif not is_null(raw):
                    values[name] = decode_field(prefix + name, raw, self._decoders[name])
                elif name in self._nullable:
                    values[name] = None
            elif name in self._refused:
                self._check_refused(prefix + name, self._refused[name], raw)
            elif name not in self._accepted and self._refuse_unknown:
                raise RequestError(f"Unknown field '{prefix}{name}'.", 400, "BadRequestError")
        return self._body(**values)

    def _check_refused(self, name: str, refusal: Refusal, raw: FieldValue) -> None:
        if not isinstance(raw, msgspec.Raw):
            raise bad_field(name, refusal.reason)
        value = decode_field(name, raw, _ANY)
        if value is None or any(value == x and type(value) is type(x) for x in refusal.neutral):
            return
        raise bad_field(name, refusal.reason)


def is_null(raw: msgspec.Raw) -> bool:
    """True for JSON's null."""
    return bytes(memoryview(raw)[:5]) == NULL


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; none for any other type."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else ()


def _takes_none(hint: Any) -> bool:
    return type(None) in _members(hint)


def _json_type(hint: Any) -> Any:
    return msgspec.Raw if msgspec.Raw in _members(hint) else hint


def raw_from_python(values: Mapping[str, Any]) -> dict[str, FieldValue]:
    """Python values as the fields of a JSON object, for callers that are no HTTP client.

    None counts as not given; an array of int32 token ids is copied, other numpy arrays become
    lists. Raises RequestError 400 naming a value that JSON cannot carry.
    """
    fields: dict[str, FieldValue] = {}
    for name, value in values.items():
        if name == "input_ids" and _is_id_array(value):
            fields[name] = IdLists((value.copy(),), False)  # the caller may go on writing to it
        elif value is not None:
            try:
                _check_finite(name, value)
                fields[name] = msgspec.Raw(msgspec.json.encode(value, enc_hook=_array_to_list))
            except (TypeError, NotImplementedError, OverflowError, UnicodeError) as error:
                raise bad_field(name, str(error).removesuffix(".")) from None
    return fields


def _is_id_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.int32 and value.ndim == 1


def _array_to_list(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise NotImplementedError(f"a {type(value).__name__} is not served")


def _check_finite(name: str, value: Any) -> None:
    """JSON has no NaN and no infinity: encoding would silently turn them into null."""
    if isinstance(value, float) and not math.isfinite(value):
        raise bad_field(name, f"{value} is not a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(f"{name}.{key}", item)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            _check_finite(name, item)
