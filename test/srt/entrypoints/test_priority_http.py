"""The field `priority` at every door: a number arrives as it is, and none as none."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.entrypoints.generate_request_body import read_generate
from sglang.srt.entrypoints.request_fields import raw_from_python
from srt.entrypoints.fake_service import LiveServer
from srt.entrypoints.test_prefix_keys import DOORS


@pytest.mark.parametrize("door", DOORS)
def test_it_arrives(server: LiveServer, door: str) -> None:
    bodies: list[dict[str, Any]] = [{}, {"priority": None}, {"priority": 0}, {"priority": -7}]
    for fields in bodies:
        reply = server.post(door, {**DOORS[door], **fields})
        assert reply.status_code == 200, reply.text
    assert [request.priority for request in server.service.requests] == [None, None, 0, -7]


def test_an_engine_takes_it_as_a_field() -> None:
    call = read_generate(raw_from_python({"text": ["a", "b"], "priority": 3}))
    assert [request.priority for request in call.call.prompts] == [3, 3]
