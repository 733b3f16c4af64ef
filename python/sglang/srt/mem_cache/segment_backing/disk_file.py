"""The file that holds segments of the disk tier: as long as the address range, and mostly holes.

A byte of the range has one place in the file, so that neighbouring segments on disk are one
mapping of the system's, and a segment that comes back to disk needs no look for room. Owned by the
mmap backing; decides nothing. The file has no name: whatever ends the process, the space is free
again. See docs/kv_segments.md, Note [The tier below].
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls

WRITE_BYTES: Final = 4 << 20  # one system call's work


class DiskFile:
    """An unnamed sparse file in `directory`. Raises BackingError when none can be made there."""

    def __init__(
        self,
        directory: Path,
        *,
        calls: HostCalls | None = None,
        allocate: Callable[[int, int, int], None] = os.posix_fallocate,
        write: Callable[[int, memoryview, int], int] = os.pwrite,
    ) -> None:
        self.directory = directory
        self._calls = calls or HostCalls()
        self._allocate = allocate
        self._write = write
        try:
            self.fd = _open_unnamed(directory)
        except OSError as error:
            raise BackingError(f"can't keep KV segments in {directory}: {error}") from error

    def extend(self, length: int) -> None:
        """Make the file `length` bytes long, all hole. Raises BackingError: it can't be so long."""
        try:
            os.ftruncate(self.fd, length)
        except OSError as error:
            raise BackingError(
                f"the file system of {self.directory} has no files of {length:,} bytes: {error}"
            ) from error

    def take(self, offset: int, length: int) -> None:
        """Take space for a part of the file, so that no later write can find the disk full.

        Raises OSError: there is none; what was taken of it is given back.
        """
        try:
            self._allocate(self.fd, offset, length)
        except OSError:
            self.give_back(offset, length)
            raise

    def give_back(self, offset: int, length: int) -> None:
        """Give the space of a part of the file back to the file system.

        Where the file system can't, it stays, and serves the same segments again.
        """
        with suppress(OSError):
            self._calls.punch(self.fd, offset, length)

    def write_from(self, address: int, offset: int, length: int) -> None:
        """Copy memory to where its bytes belong. Raises OSError: not all could be written."""
        source = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
        done = 0
        while done < length:
            count = self._write(self.fd, source[done : done + WRITE_BYTES], offset + done)
            if count <= 0:
                raise OSError(errno.EIO, "nothing was written")
            done += count

    def read_into(self, address: int, offset: int, length: int) -> None:
        """Copy a part of the file into memory. Raises OSError: not all could be read."""
        target = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
        done = 0
        while done < length:
            count = os.preadv(self.fd, [target[done : done + WRITE_BYTES]], offset + done)
            if count <= 0:
                raise OSError(errno.EIO, "the file ends early")
            done += count

    def stored_bytes(self) -> int:
        """Bytes that the file takes on its file system, as that counts them."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_unnamed(directory: Path) -> int:
    """A new file without a name, for reading and writing. Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(prefix="sglang-kv-", dir=directory)
    os.unlink(name)
    return fd
