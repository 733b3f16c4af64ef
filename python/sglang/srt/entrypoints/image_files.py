"""Images that only a caller of the Engine can give: files and objects of its own process.

A server reads no files for its clients; see multimodal/image_source.py.
"""

from __future__ import annotations

import io
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.http_errors import bad_field

_NOT_FILES = ("data:", "http://", "https://")
_MAX_PATH_CHARS = 4096


def with_files(value: Any) -> Any:
    """`value` of `image_data` with bytes in place of paths, file: URLs and Pillow's images.

    Texts that name no file stay, as do lists' shapes. Raises RequestError 400 for a file: URL or
    file that can't be read.
    """
    if isinstance(value, list | tuple):
        return [with_files(item) for item in value]
    if isinstance(value, Path):
        return _read(value)
    if value is not None and not isinstance(value, str | bytes):
        return _packed(value)
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


def _packed(value: Any) -> Any:
    """One of Pillow's images as a file; anything else as it is."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        return value
    out = io.BytesIO()
    value.convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise bad_field("image_data", f"cannot read {path}: {error.strerror}") from None
