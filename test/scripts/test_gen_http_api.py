"""The page on the HTTP API says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gen_http_api
from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.environ import Environ
from sglang.srt.server_args import ServerArgs


def test_the_page_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gen_http_api.main(["--check"]) == 0
    page = gen_http_api.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "http_api.md"
    copy.write_text(page.replace("`image_data`", "`picture`"), encoding="utf-8")
    monkeypatch.setattr(gen_http_api, "PAGE", copy)
    assert gen_http_api.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert gen_http_api.main([]) == 0
    assert copy.read_text(encoding="utf-8") == page


def test_the_page_names_every_path() -> None:
    args = ServerArgs(model_path="none", enable_metrics=True)
    app = build_app(ServerContext(args, Environ()))
    page = gen_http_api.PAGE.read_text(encoding="utf-8")
    table = page.split("## Endpoints")[1].split("## What")[0]
    named = {path.partition("?")[0] for path in re.findall(r"`(/[^`]*)`", table)} - {"/v1"}
    paths = [route.path for route in app.routes]  # type: ignore[attr-defined]
    served = {re.sub(r"\{[^}]*\}", "{id}", path) for path in paths}
    assert named | {"/v1/tokenize", "/v1/detokenize"} == served
