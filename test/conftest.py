"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kernels.interpreter import swap_once_per_launch

# Triton's kernels are tested in its interpreter, which it chooses when it is imported. Tests on a
# GPU set 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says something of the machine and what else it does, not of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to processes in the tree's order, real servers first and small units last.

    Else those with the fewest tests come last, which are just the ones that take minutes: one
    process works on such a file when all others have ended.
    """
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection of garbage looks at it again.

    There are millions of objects, and whoever calls gc.collect() would wait half a second for them.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else libraries complain of objects that are still there when the process ends."""
    gc.unfreeze()


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory for sockets, whose paths must be short; pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield Path(path)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Whoever uses Triton has imported it by now, when tests were collected."""
    module = sys.modules.get("triton.runtime.interpreter")
    if module is not None:
        swap_once_per_launch(module)
