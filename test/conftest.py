"""Fixtures for all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Triton's kernels are tested in its interpreter, which it chooses when it is imported. Tests on a
# GPU set 0.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory for sockets, whose paths must be short; pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield Path(path)
