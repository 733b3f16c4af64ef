"""The table of contents of a GGUF file: metadata and tensor places, read in one pass.

Used for the model's configuration, by the weight loader and wherever a tokenizer's tables are
wanted. It maps the file, so nothing of the weights is read here. A reader of our own because start
up reads the header several times, and because a damaged file must give one clear line.

Source: the public GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, tuple[struct.Struct, str]] = {  # type id -> (one value, numpy type)
    0: (struct.Struct("<B"), "<u1"),
    1: (struct.Struct("<b"), "<i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (struct.Struct("<I"), "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    7: (struct.Struct("<?"), "?"),
    10: (struct.Struct("<Q"), "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}
_PLAIN_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where one tensor lies. `shape` is row-major (as torch has it), `offset` from file start."""

    name: str
    shape: tuple[int, ...]
    quant_type: Any  # gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of one file.

    Metadata values are int, float, bool, str, list[str] or a numpy array of numbers.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Read metadata and tensor table. Raises ValueError when the file is not whole or not GGUF."""
    path = Path(path)
    with _mapped(path) as buffer:
        try:
            return _Parser(path, buffer).parse()
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(f"{path.name} is truncated or not a GGUF file") from error


def read_gguf_rows(
    path: str | Path, info: GGUFTensorInfo, first: int, num_rows: int
) -> npt.NDArray[np.float32]:
    """Rows [first, first + num_rows) of a tensor seen as a matrix of its last dimension.

    Returns float32 [num_rows, last dimension], dequantised; only these rows' bytes are read.
    Raises ValueError for a quantisation type that the gguf package can't dequantise.
    """
    width = info.shape[-1]
    data = _read_rows(path, info, first, num_rows)
    plain = _PLAIN_TYPES.get(info.quant_type.name)
    if plain is not None:
        return data.reshape(-1).view(plain).astype(np.float32).reshape(num_rows, width)
    try:
        values = gguf.quants.dequantize(data, info.quant_type)
    except NotImplementedError as error:
        name = info.quant_type.name
        raise ValueError(f"tensor {info.name} has type {name}, which is not supported") from error
    return np.asarray(values, dtype=np.float32).reshape(num_rows, width)


def read_gguf_bytes(path: str | Path, info: GGUFTensorInfo) -> npt.NDArray[np.uint8]:
    """A tensor's rows as the file has them, uint8 [rows, bytes of a row].

    Raises ValueError when the file ends before the tensor does.
    """
    return _read_rows(path, info, 0, math.prod(info.shape) // info.shape[-1])


def _read_rows(
    path: str | Path, info: GGUFTensorInfo, first: int, num_rows: int
) -> npt.NDArray[np.uint8]:
    row_bytes = info.num_bytes // (math.prod(info.shape) // info.shape[-1])
    with Path(path).open("rb") as file:
        file.seek(info.offset + first * row_bytes)
        data = np.fromfile(file, dtype=np.uint8, count=num_rows * row_bytes)
    if data.size != num_rows * row_bytes:
        raise ValueError(f"{Path(path).name} is truncated inside tensor {info.name}")
    return data.reshape(num_rows, row_bytes)


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
            memoryview(mapping) as view,
        ):
            yield view
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


class _Parser:
    """Walks the header once, front to back; `at` is the next byte."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.buffer = buffer
        self.at = 0

    def parse(self) -> GGUFHeader:
        if bytes(self.buffer[:4]) != b"GGUF":
            raise ValueError(f"{self.path.name} is not a GGUF file")
        self.at = 4
        version = self._u32()
        if version not in (2, 3):
            raise ValueError(f"{self.path.name} has GGUF version {version}; 2 and 3 are supported")
        num_tensors, num_values = self._u64(), self._u64()
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._u32())
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"{self.path.name} has an impossible alignment {alignment}")
        start = -(-self.at // alignment) * alignment
        return GGUFHeader(self.path, metadata, self._place(infos, start))

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self.buffer, self.at)
        self.at += 4
        return int(value)

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self.buffer, self.at)
        self.at += 8
        return int(value)

    def _string(self) -> str:
        length = self._u64()
        end = self.at + length
        if end > len(self.buffer):
            raise IndexError(length)
        text = str(self.buffer[self.at : end], "utf-8", "surrogateescape")
        self.at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"{self.path.name} holds a value of unknown type {kind}")
        scalar = _SCALARS[kind][0]
        (value,) = scalar.unpack_from(self.buffer, self.at)
        self.at += scalar.size
        return value

    def _array(self) -> Any:
        kind, count = self._u32(), self._u64()
        if count > len(self.buffer):
            raise IndexError(count)
        if kind not in _SCALARS:
            return [self._value(kind) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind][1])
        end = self.at + count * dtype.itemsize
        values = np.frombuffer(bytes(self.buffer[self.at : end]), dtype=dtype)
        if values.size != count:
            raise IndexError(count)
        self.at = end
        return values

    def _tensor_info(self) -> GGUFTensorInfo:
        name = self._string()
        num_dims = self._u32()
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"{self.path.name}: tensor {name} has {num_dims} dimensions")
        dims = tuple(self._u64() for _ in range(num_dims))
        if min(dims) < 1:
            raise ValueError(f"{self.path.name}: tensor {name} is empty")
        kind, offset = self._u32(), self._u64()
        try:
            quant_type = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{self.path.name}: tensor {name} has unknown type {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
        if dims[0] % block:
            raise ValueError(
                f"{self.path.name}: tensor {name}: rows of {dims[0]} are not blocks of {block}"
            )
        num_bytes = math.prod(dims) // block * block_bytes
        return GGUFTensorInfo(name, dims[::-1], quant_type, offset, num_bytes)

    def _place(self, infos: list[GGUFTensorInfo], start: int) -> dict[str, GGUFTensorInfo]:
        tensors: dict[str, GGUFTensorInfo] = {}
        for info in infos:
            if info.name in tensors:
                raise ValueError(f"{self.path.name} holds tensor {info.name} twice")
            offset = start + info.offset
            if offset + info.num_bytes > len(self.buffer):
                raise ValueError(f"{self.path.name} is truncated: tensor {info.name} is cut off")
            tensors[info.name] = GGUFTensorInfo(
                info.name, info.shape, info.quant_type, offset, info.num_bytes
            )
        return tensors
