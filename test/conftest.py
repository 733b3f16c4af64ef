"""Fixtures for all tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory for sockets, whose paths must be short; pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield Path(path)
