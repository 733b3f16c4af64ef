"""Health, models, information, cache, aborts, metrics and the tokenizer's doors."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.scheduler_pulse import SchedulerPulse
from srt.entrypoints.fake_service import ANSWER, CONTEXT_LENGTH, LiveServer


def test_root(server: LiveServer) -> None:
    assert "running" in server.request("GET", "/").text
    head = server.request("HEAD", "/")
    assert (head.status_code, head.content) == (200, b"")


def test_health_follows_the_signs_of_life(server: LiveServer) -> None:
    reply = server.request("GET", "/health")
    assert (reply.status_code, reply.content) == (200, b"")
    server.service.healthy = False
    assert server.request("GET", "/health").status_code == 503
    assert server.request("GET", "/health_generate").status_code == 503


def test_health_generate_really_generates(server: LiveServer) -> None:
    assert server.request("GET", "/health_generate").status_code == 200
    sent = server.service.requests[0]
    assert sent.sampling_params.max_new_tokens == 1
    server.service.refusals["HEALTH"] = FinishReason("abort", message="x", status_code=503)
    assert server.request("GET", "/health_generate").status_code == 503


def test_health_generate_of_a_stuck_and_of_a_busy_scheduler(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.service.hold_at["HEALTH"] = 0
    assert server.request("GET", "/health_generate").status_code == 503

    class Advancing:
        """A heartbeat that has made progress whenever one looks."""

        def __init__(self) -> None:
            self.progress_seen = 0

        @property
        def progress(self) -> int:
            self.progress_seen += 1
            return self.progress_seen

    beat = Advancing()
    monkeypatch.setattr(SchedulerPulse, "last_heartbeat", property(lambda _self: beat))
    assert server.request("GET", "/health_generate").status_code == 200


def test_models(server: LiveServer) -> None:
    body = server.request("GET", "/v1/models").json()
    card = body["data"][0]
    assert card.pop("created") > 1_600_000_000
    assert body["object"] == "list"
    assert card == {
        "id": "tiny",
        "object": "model",
        "owned_by": "sglang",
        "root": "tiny",
        "parent": None,
        "max_model_len": CONTEXT_LENGTH,
    }
    assert server.request("GET", "/v1/models/tiny").json()["id"] == "tiny"
    server.service.context_length = 100
    assert server.request("GET", "/v1/models").json()["data"][0]["max_model_len"] == 100


@pytest.mark.parametrize("name", ["x", "a/b", "tiny/x"])
def test_unknown_model(server: LiveServer, name: str) -> None:
    reply = server.request("GET", f"/v1/models/{name}")
    assert reply.status_code == 404
    assert reply.json() == {
        "error": {
            "message": f"The model '{name}' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(server: LiveServer, path: str) -> None:
    info = server.request("GET", path).json()
    assert info["served_model_name"] == "tiny"
    assert info["is_generation"] is True
    assert info["architectures"] == ["LlamaForCausalLM"]
    assert info["model_type"] == "llama"
    assert info["weight_version"] == "default"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(server: LiveServer, path: str) -> None:
    info = server.request("GET", path).json()
    assert info["memory"] == {"capacity_tokens": 4096}
    assert info["internal_states"] == [server.service.state]
    assert info["served_model_name"] == "tiny"
    assert info["schedule_policy"] == "fcfs"
    assert info["max_total_num_tokens"] == 4096
    assert info["max_req_input_len"] == 511
    assert info["startup_time"] >= 0
    assert info["frontend"] == "python"
    assert info["version"]
    assert "api_key" not in info


def test_load(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}
    assert server.request("GET", "/get_load").json() == [idle]
    waits = {"rid": "a", "state": "waiting", "prompt_tokens": 50}
    runs = {"rid": "b", "state": "decode", "prompt_tokens": 900}
    memory = {"pages": {"used": 15, "cached": 3}, "page_size": 64}
    busy = {
        "memory": memory,
        "num_running_reqs": 1,
        "num_queue_reqs": 1,
        "requests": [runs, waits],
    }
    monkeypatch.setattr(server.service, "state", {"replicas": [busy, {}]})
    assert server.request("GET", "/get_load").json() == [
        {"dp_rank": 0, "num_reqs": 2, "num_waiting_reqs": 1, "num_tokens": 15 * 64 + 50},
        {**idle, "dp_rank": 1},
    ]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(server: LiveServer, method: str) -> None:
    reply = server.request(method, "/flush_cache?timeout=1.5")
    assert (reply.status_code, reply.text) == (200, "Cache flushed.\n")
    server.service.flushable = False
    assert server.request(method, "/flush_cache").status_code == 400
    for timeout in ("x", "-1", "nan", "inf", "1e99"):
        assert server.request(method, f"/flush_cache?timeout={timeout}").status_code == 400


def test_abort_request(server: LiveServer) -> None:
    reply = server.post("/abort_request", {"rid": "unknown"})
    assert (reply.status_code, reply.content) == (200, b"")
    assert server.post("/abort_request", {"abort_all": True}).status_code == 200
    assert server.service.aborts == [("unknown", False), ("", True)]
    for body in ({}, {"rid": ""}, {"rid": 5}, {"rid": "a", "x": 1}):
        assert server.post("/abort_request", body).status_code == 400


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_tokenize(server: LiveServer, path: str) -> None:
    reply = server.post(path, {"model": "m", "prompt": "ab"}).json()
    assert reply == {"tokens": [1, 97, 98], "count": 3, "max_model_len": CONTEXT_LENGTH}
    plain = server.post(path, {"prompt": "ab", "add_special_tokens": False}).json()
    assert plain["tokens"] == [97, 98]
    batch = server.post(path, {"prompt": ["a", "bc"]}).json()
    assert (batch["tokens"], batch["count"]) == ([[1, 97], [1, 98, 99]], [2, 3])
    chat = server.post(path, {"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] == len("<user>a")
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 5}):
        assert server.post(path, body).status_code == 400


def test_detokenize(server: LiveServer) -> None:
    assert server.post("/detokenize", {"tokens": [1, 97, 98]}).json() == {"text": "ab"}
    whole = {"tokens": [1, 97], "skip_special_tokens": False}
    assert server.post("/v1/detokenize", whole).json() == {"text": "\x01a"}
    bad: list[Any] = [{}, {"tokens": []}, {"tokens": "a"}, {"tokens": ["a"]}, {"tokens": [-1]}]
    for body in [*bad, {"tokens": None}, {"tokens": [[97], []]}, {"tokens": [97, [98]]}]:
        assert server.post("/detokenize", body).status_code == 400


@pytest.mark.parametrize("times", [1, 20_000])
def test_detokenize_of_several_lists(server: LiveServer, times: int) -> None:
    """Short ones, and those of a body that is read in pieces."""
    reply = server.post("/detokenize", {"tokens": [[1, 97, 98] * times, [99]]})
    assert reply.json() == {"text": ["ab" * times, "c"]}
    assert server.post("/detokenize", {"tokens": [[97]]}).json() == {"text": ["a"]}


@pytest.mark.parametrize(
    ("tokens", "name"), [([97, 1 << 12], "tokens[1]"), ([[97], [1 << 12]], "tokens[1][0]")]
)
def test_detokenize_names_an_id_outside_the_vocabulary(
    server: LiveServer, tokens: list[Any], name: str
) -> None:
    reply = server.post("/detokenize", {"tokens": tokens})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message == f"{name} is 4096, but the vocabulary has 4096 ids."


def samples(text: str) -> dict[str, float]:
    """Metric values by name, labels cut off; buckets left out."""
    values = {}
    for line in text.splitlines():
        if not line.startswith("#") and "_bucket" not in line:
            name, _, value = line.partition("{")
            assert 'model_name="tiny"' in value
            values[name] = float(value.rpartition(" ")[2])
    return values


def test_metrics(server: LiveServer) -> None:
    before = samples(server.request("GET", "/metrics").text)
    server.service.state = {
        "num_running_reqs": 2,
        "num_queue_reqs": 1,
        "prompt_tokens_total": 100,
        "cached_tokens_total": 25,
        "num_retracted_requests_total": 3,
        "num_preempted_requests_total": 2,
        "num_drafted_tokens_total": 40,
        "num_correct_drafted_tokens_total": 30,
        "avg_spec_accept_length": 3.5,
        "memory": {
            "capacity_tokens": 1024,
            "page_size": 16,
            "mapped_bytes": 5000,
            "pages": {"free": 1, "used": 8, "cached": 4},
        },
    }
    server.post("/generate", {"text": "ab"})
    server.service.refusals["r"] = FinishReason("abort", message="x", status_code=503)
    server.post("/generate", {"text": "ab", "rid": "r"})
    reply = server.request("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    after = samples(reply.text)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["sglang:num_requests_total"] == 2
    assert grown["sglang:num_aborted_requests_total"] == 1
    assert grown["sglang:prompt_tokens_total"] == 3
    assert grown["sglang:cached_tokens_total"] == 3
    assert grown["sglang:generation_tokens_total"] == len(ANSWER)
    assert grown["sglang:time_to_first_token_seconds_count"] == 1
    assert grown["sglang:inter_token_latency_seconds_count"] == len(ANSWER) - 1
    assert grown["sglang:e2e_request_latency_seconds_count"] == 1
    assert grown["sglang:num_retracted_requests_total"] == 3
    assert grown["sglang:num_preempted_requests_total"] == 2
    assert grown["sglang:spec_drafted_tokens_total"] == 40
    assert grown["sglang:spec_correct_tokens_total"] == 30
    assert after["sglang:spec_accept_length"] == 3.5
    assert after["sglang:num_running_reqs"] == 2
    assert after["sglang:num_queue_reqs"] == 1
    assert after["sglang:num_used_tokens"] == 128
    assert after["sglang:kv_evictable_tokens"] == 64
    assert after["sglang:kv_available_tokens"] == 1024 - 128 - 64
    assert after["sglang:token_usage"] == 0.125
    assert after["sglang:cache_hit_rate"] == 0.25
    assert after["sglang:max_total_num_tokens"] == 1024
    server.service.state_error = RequestError("gone", 503)
    assert server.request("GET", "/metrics").status_code == 200


def test_no_metrics_unless_enabled(tmp_path: Any) -> None:
    with LiveServer(tmp_path) as server:
        assert server.request("GET", "/metrics").status_code == 404
