"""Files that a caller of the Engine names as images: read here, in the caller's own process.

A server reads no files for its clients; see multimodal/image_source.py.
"""

from __future__ import annotations

import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.http_errors import bad_field

_NOT_FILES = ("data:", "http://", "https://")
_MAX_PATH_CHARS = 4096


def with_files(value: Any) -> Any:
    """`value` of `image_data` with bytes in place of paths and of file: URLs.

    Texts that name no file stay, as do lists' shapes. Raises RequestError 400 for a file: URL or
    file that can't be read.
    """
    if isinstance(value, list | tuple):
        return [with_files(item) for item in value]
    if isinstance(value, Path):
        return _read(value)
    if not isinstance(value, str) or value.lower().startswith(_NOT_FILES):
        return value
    if value.startswith("file:"):
        return _read(Path(urllib.request.url2pathname(urllib.parse.urlsplit(value).path)))
    if len(value) <= _MAX_PATH_CHARS:
        try:
            is_file = Path(value).is_file()
        except (OSError, ValueError):  # base64 text is no path: too long a name
            is_file = False
        if is_file:
            return _read(Path(value))
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise bad_field("image_data", f"cannot read {path}: {error.strerror}") from None
