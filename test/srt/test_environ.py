"""Settings from environment variables."""

import pytest

from sglang.srt.environ import Environ, OllamaRoutes


def test_nothing_set_gives_the_defaults() -> None:
    assert Environ.from_os({}) == Environ()
    assert Environ().health_check_timeout_s == 20.0


def test_variables_are_read() -> None:
    environ = Environ.from_os(
        {
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "SGLANG_HEALTH_CHECK_TIMEOUT": "2.5",
            "SGLANG_KV_DEBUG_PROTECT": "True",
            "SGLANG_KV_CANARY_PERTURB": " mark:0@20",
            "SGLANG_DISABLE_NATIVE_KERNELS": "on",
        }
    )
    assert environ == Environ(True, 2.5, True, "mark:0@20", True)


def test_paths_of_ollamas_api() -> None:
    routes = Environ.from_os({"SGLANG_OLLAMA_CHAT_ROUTE": "/o/chat"}).ollama_routes
    assert routes == OllamaRoutes(chat="/o/chat")
    api = {f"/api/{name}" for name in ("generate", "tags", "show", "ps", "version")}
    assert routes.paths == api | {"/o/chat"}


def test_off_is_off() -> None:
    assert not Environ.from_os({"SGLANG_KV_DEBUG_PROTECT": "0"}).kv_debug_protect


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "maybe"),
        ("SGLANG_DISABLE_NATIVE_KERNELS", "all"),
        ("SGLANG_HEALTH_CHECK_TIMEOUT", "soon"),
        ("SGLANG_HEALTH_CHECK_TIMEOUT", "0"),
        ("SGLANG_HEALTH_CHECK_TIMEOUT", "nan"),
        ("SGLANG_OLLAMA_CHAT_ROUTE", "chat"),
        ("SGLANG_OLLAMA_SHOW_ROUTE", "/show/{id}"),
        ("SGLANG_OLLAMA_TAGS_ROUTE", "/api/chat"),
    ],
)
def test_nonsense_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        Environ.from_os({name: value})


def test_the_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", "7")
    assert Environ.from_os().health_check_timeout_s == 7.0
