"""A few random cases every day, many when asked for; see `python -m stress` and `stress.doors`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from e2e.server_process import ServerProcess
from sglang.srt.managers.io_struct import ControlReply
from srt.entrypoints.fake_service import LiveServer
from stress import doors
from stress.cases import draw_case
from stress.judge import Counts, Finding
from stress.runs import run_case
from stress.worlds import Worlds

# Two ranks; a device over its host; windows with drafts and a disk; recurrent states.
EVERYDAY = (304, 389, 386, 363)
# Whose cached prefixes end inside of pages.
COPIED = 320


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(tmp_path_factory.mktemp("worlds"))
    yield made
    made.close()


def run(worlds: Worlds, seed: int) -> Counts:
    world = worlds.of(draw_case(seed).family)
    return run_case(draw_case(seed, lambda ask: world.answer(ask).ids), world)


def test_a_case_is_its_seed() -> None:
    assert draw_case(5) == draw_case(5)
    assert draw_case(5).told() != draw_case(6).told()


@pytest.mark.parametrize("seed", EVERYDAY)
def test_a_few_cases(worlds: Worlds, seed: int) -> None:
    counts = run(worlds, seed)
    assert counts.answers > 3
    assert counts.tokens > 50


def test_a_wrong_token_is_found(worlds: Worlds) -> None:
    """Pages whose beginnings are said to be copied are not: what the plain engine is there for."""
    with (
        mock.patch("sglang.srt.mem_cache.allocation.copy_pages"),
        pytest.raises(Finding, match=r"^tokens"),
    ):
        run(worlds, COPIED)


def test_a_page_that_stays_is_found(worlds: Worlds) -> None:
    with (
        mock.patch("sglang.srt.mem_cache.radix_cache.RadixCache.clear", return_value=0),
        pytest.raises(Finding, match=r"^left behind"),
    ):
        run(worlds, COPIED)


def test_bodies_of_all_doors(tmp_path: Path) -> None:
    """No 500, whatever is sent: on a service without an engine, which answers at once."""
    with LiveServer(tmp_path, enable_metrics=True, skip_server_warmup=True) as server:
        for op in ("set_kv_budget", "compact_kv"):
            server.service.pool_replies[op] = ControlReply(1, True, "done")
        findings, counts = doors.storm(server.url, range(400), threads=1)
    assert findings == []
    assert counts["calls"] == 400
    assert counts["200"] > 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_many_cases(worlds: Worlds, part: int) -> None:
    for seed in range(20_000 + 100 * part, 20_100 + 100 * part):
        try:
            run(worlds, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bodies_of_a_real_server(tmp_path: Path) -> None:
    path, refs = doors.make_model(tmp_path)
    server = ServerProcess("--model-path", path, *doors.FLAGS, *refs)
    try:
        server.wait_ready()
        findings, counts = doors.storm(server.url, range(50_000, 51_500))
        findings += doors.aftermath(server)
    finally:
        server.close()
    assert findings == []
    assert isinstance(counts, Counter)
    assert counts["calls"] == 1500
