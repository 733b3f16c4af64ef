"""Reads the tensors of Hugging Face checkpoints, one at a time, whatever files they lie in.

The loader asks for a `WeightSource` and walks it once. Nothing here knows models or shards, and
no file is held whole in memory: safetensors and zip-format .bin files are mapped, so that who takes
a slice of a tensor reads that slice. What was read of a safetensors file leaves this process with
its tensor, and not only with the file; the system may keep it for the next rank.
"""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.mem_cache.segment_backing.host_calls import MADV_DONTNEED, HostCalls

SAFETENSORS_INDEX = "model.safetensors.index.json"
PT_INDEX = "pytorch_model.bin.index.json"
# Files that trainers leave beside a model and that hold no weights of it.
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt"})

WeightIterator = Iterator[tuple[str, LoadedWeight]]
Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class WeightSource:
    """(checkpoint name, whole tensor) pairs to be walked once, and how many (None: unknown).

    Walking raises ValueError, one line naming the file, when a file turns out to be damaged.
    """

    weights: Iterable[tuple[str, LoadedWeight]]
    num_weights: int | None


def find_safetensors(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order; empty when there are none.

    An index decides; else `model.safetensors` alone (other files beside it are other formats of
    the same weights); else all. Raises ValueError when a file that the index names is missing.
    """
    return _find(folder, SAFETENSORS_INDEX, "model.safetensors", ("*.safetensors",))


def find_pt_files(folder: Path) -> list[Path]:
    """As `find_safetensors`, for files written by torch.save."""
    return _find(folder, PT_INDEX, "pytorch_model.bin", ("*.bin", "*.pt"))


def safetensors_weights(files: list[Path], wanted: Wanted | None = None) -> WeightSource:
    """The tensors of `files`, or those that are `wanted` by name (None: all).

    Raises ValueError at once when a file's header is damaged.
    """
    found = {file: _safetensors_names(file) for file in files}
    names = {file: [n for n in some if wanted is None or wanted(n)] for file, some in found.items()}
    return WeightSource(_walk_safetensors(names), sum(len(n) for n in names.values()))


def pt_weights(files: list[Path], wanted: Wanted | None = None) -> WeightSource:
    """As `safetensors_weights`, read with torch.load(weights_only=True)."""
    weights = (pair for pair in _walk_pt(files) if wanted is None or wanted(pair[0]))
    return WeightSource(weights, None)


class SafetensorsIndex:
    """Tensors of several files by name, in whatever order they are asked for.

    Raises ValueError when a file's header is damaged or two files have a tensor of one name.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, Path] = {}
        for file in files:
            for name in _safetensors_names(file):
                if name in self._files:
                    raise ValueError(f"weight {name} is in the checkpoint twice")
                self._files[name] = file
        self._readers: dict[Path, Any] = {}
        self._mapped: dict[Path, range] = {}
        self._calls = HostCalls()

    @property
    def names(self) -> list[str]:
        """Of all tensors, file by file."""
        return list(self._files)

    @contextmanager
    def read(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Whole tensors by name, whose pages leave this process with the context.

        Raises ValueError, one line naming the file, for a damaged file.
        """
        tensors = {name: self._tensor(name) for name in names}
        yield tensors
        for name, tensor in tensors.items():
            file = self._files[name]
            if not self._mapped.get(file):
                self._mapped[file] = _mapped_range(file)
            if tensor.data_ptr() in self._mapped[file]:
                _let_go(tensor, self._calls)

    def _tensor(self, name: str) -> torch.Tensor:
        file = self._files[name]
        try:
            if file not in self._readers:
                self._readers[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._readers[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from error
        return tensor


def _find(folder: Path, index_name: str, single: str, patterns: tuple[str, ...]) -> list[Path]:
    index = folder / index_name
    if index.is_file():
        return [_existing(folder, name) for name in _files_of_index(index)]
    if (folder / single).is_file():
        return [folder / single]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name not in _NOT_WEIGHTS)


def _files_of_index(index: Path) -> list[str]:
    try:
        value = json.loads(index.read_bytes())
        files = set(value["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is damaged: {error!r}") from error
    if not files or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{index.name} is damaged: weight_map must map names to file names")
    return sorted(files)


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise ValueError(f"{folder}: the index names {name}, which is missing")
    return path


def _safetensors_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def _walk_safetensors(names: dict[Path, list[str]]) -> WeightIterator:
    calls = HostCalls()
    for file, keys in names.items():
        try:
            with safe_open(file, framework="pt") as reader:
                mapped = range(0)
                for key in keys:
                    tensor = reader.get_tensor(key)
                    yield key, tensor
                    mapped = mapped or _mapped_range(file)
                    if tensor.data_ptr() in mapped:
                        _let_go(tensor, calls)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from error


def _mapped_range(file: Path) -> range:
    """Addresses at which this process has the file mapped; empty where the system does not tell.

    Only pages of such a range come back by reading.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return range(0)
    path = str(file.resolve())
    for line in maps:
        if line.endswith(path):
            return range(*(int(end, 16) for end in line.split(maxsplit=1)[0].split("-")))
    return range(0)


def _let_go(tensor: torch.Tensor, calls: HostCalls) -> None:
    """Drop the whole pages of this window on a file: unchanged copies that it still has."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - first
    if length > 0:
        calls.advise(first, length, MADV_DONTNEED)


def _walk_pt(files: list[Path]) -> WeightIterator:
    for file in files:
        state = _load_pt(file)
        for key in list(state):
            tensor = state.pop(key)
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{file}: entry {key!r} is not a tensor")
            yield str(key), tensor


def _load_pt(file: Path) -> dict[str, object]:
    try:
        with file.open("rb") as stream:
            mapped = stream.read(2) == b"PK"  # the older, unzipped format can't be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file} is truncated, damaged or unsafe: {reason[0]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} does not hold a dict of tensors")
    return state
