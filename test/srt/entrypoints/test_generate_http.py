"""/generate over a real socket: shapes, batches, n, streams, log probabilities."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sglang.srt.managers.io_struct import FinishReason
from srt.entrypoints.fake_service import ANSWER, LiveServer, http_post, ids_of

IDS = ids_of(ANSWER).tolist()


def test_reply_has_sglangs_shape(server: LiveServer) -> None:
    reply = server.post("/generate", {"text": "Hi", "rid": "r1"})
    assert reply.status_code == 200
    body = reply.json()
    latency = body["meta_info"].pop("e2e_latency")
    assert latency > 0
    assert body == {
        "text": ANSWER,
        "output_ids": IDS,
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 3,
            "weight_version": "default",
            "num_retractions": 0,
            "completion_tokens": len(IDS),
            "cached_tokens": 3,
            "reasoning_tokens": 0,
            "dp_rank": None,
        },
    }


def test_put_works_and_content_type_is_free(server: LiveServer) -> None:
    reply = server.request("PUT", "/generate", content=b'{"text": "Hi"}')
    assert reply.json()["text"] == ANSWER
    assert server.post_raw("/generate", b'{"text": "Hi"}', "text/plain").status_code == 200


def test_sampling_parameters_arrive_unchanged(server: LiveServer) -> None:
    params = {
        "max_new_tokens": 4,
        "stop": ["x", "y"],
        "stop_regex": "z+",
        "stop_token_ids": [7],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "min_new_tokens": 1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
        "logit_bias": {"65": 1.5},
        "sampling_seed": -5,
        "stream_interval": 4,
        "regex": None,
    }
    reply = server.post("/generate", {"text": "Hi", "sampling_params": params})
    assert reply.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    sent = server.service.requests[0].sampling_params
    assert sent.stop == ("x", "y")
    assert sent.stop_regex == ("z+",)
    assert sent.stop_token_ids == (7,)
    assert sent.logit_bias == {65: 1.5}
    skipped = {"stop", "stop_regex", "stop_token_ids", "logit_bias", "stream_interval", "regex"}
    for name in params.keys() - skipped:
        assert getattr(sent, name) == params[name], name


def test_stop_patterns_are_read_as_stop_strings_are(server: LiveServer) -> None:
    """By the OpenAI endpoints, too; "" asks for none."""
    for value, patterns in (("z+", ("z+",)), (["a", "[bc]"], ("a", "[bc]")), ("", ()), ([], ())):
        server.post("/generate", {"text": "Hi", "sampling_params": {"stop_regex": value}})
        server.post("/v1/completions", {"prompt": "Hi", "stop_regex": value})
        messages = [{"role": "user", "content": "Hi"}]
        server.post("/v1/chat/completions", {"messages": messages, "stop_regex": value})
        server.post("/v1/responses", {"input": "Hi", "stop_regex": value})
        sent = [request.sampling_params.stop_regex for request in server.service.requests]
        assert sent == [patterns] * 4
        server.service.requests.clear()


@pytest.mark.parametrize("pattern", ["(", "(a)\\1", "a*", "x{1000}"])
def test_a_stop_pattern_that_is_not_served_is_a_400(server: LiveServer, pattern: str) -> None:
    body = {"text": "Hi", "sampling_params": {"stop_regex": ["fine", pattern]}}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"stop_regex {pattern!r} is not served: ")


@pytest.mark.parametrize("kind", ["json_schema", "regex", "ebnf"])
def test_a_constraint_arrives(server: LiveServer, kind: str) -> None:
    text = '{"type": "object"}'
    server.post("/generate", {"text": "Hi", "sampling_params": {kind: text}})
    server.post("/generate", {"text": "Hi", "sampling_params": {kind: ""}})
    held, free = (request.sampling_params.constraint for request in server.service.requests)
    assert held is not None
    assert (held.kind, held.text) == (kind, text)
    assert free is None


def test_defaults_are_sglangs_not_the_models(server: LiveServer) -> None:
    server.post("/generate", {"text": "Hi"})
    sent = server.service.requests[0].sampling_params
    assert (sent.temperature, sent.top_k, sent.max_new_tokens) == (1.0, -1, 128)


def test_null_max_new_tokens_means_up_to_the_context(server: LiveServer) -> None:
    server.post("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": None}})
    assert server.service.requests[0].sampling_params.max_new_tokens is None


def test_input_ids_arrive_as_int32(server: LiveServer) -> None:
    reply = server.post_raw("/generate", b'{"input_ids": [ 5,6 ,\n7 ]}')
    assert reply.json()["meta_info"]["prompt_tokens"] == 3
    sent = server.service.requests[0].input_ids
    assert sent is not None
    assert sent.dtype == "int32"
    assert sent.tolist() == [5, 6, 7]


@pytest.mark.parametrize("prompts", [{"text": ["a", "bc"]}, {"input_ids": [[97, 5], [98, 99, 5]]}])
def test_batch_gives_a_list_in_order(server: LiveServer, prompts: dict[str, Any]) -> None:
    body = {**prompts, "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}]}
    replies = server.post("/generate", {**body, "rid": ["x", "y"]}).json()
    assert [one["text"] for one in replies] == [ANSWER[:1], ANSWER[:2]]
    assert [one["meta_info"]["id"] for one in replies] == ["x", "y"]
    assert [one["meta_info"]["prompt_tokens"] for one in replies] == [2, 3]


def test_batch_of_one_is_still_a_list(server: LiveServer) -> None:
    assert len(server.post("/generate", {"text": ["a"]}).json()) == 1


def test_one_rid_for_a_batch_is_numbered(server: LiveServer) -> None:
    replies = server.post("/generate", {"text": ["a", "b"], "rid": "call"}).json()
    assert [one["meta_info"]["id"] for one in replies] == ["call_0", "call_1"]


def test_n_gives_choices_with_their_own_ids_and_seeds(server: LiveServer) -> None:
    params = {"n": 3, "sampling_seed": 10, "max_new_tokens": 2}
    replies = server.post("/generate", {"text": "a", "rid": "c", "sampling_params": params}).json()
    assert [one["text"] for one in replies] == [ANSWER[:2]] * 3
    assert [one["meta_info"]["id"] for one in replies] == ["c_0", "c_1", "c_2"]
    seeds = {r.rid: r.sampling_params.sampling_seed for r in server.service.requests}
    assert seeds == {"c_0": 10, "c_1": 11, "c_2": 12}
    assert all(r.sampling_params.n == 1 for r in server.service.requests)


def test_siblings_start_when_the_first_choice_has_news(server: LiveServer) -> None:
    server.service.hold_at["c_0"] = 1
    body = b'{"text":"a","rid":"c","sampling_params":{"n":2}}'
    with server.raw(http_post("/generate", body)):
        assert server.service.started.get(timeout=20) == "c_0"
        assert server.service.started.get(timeout=20) == "c_1"
        assert server.service.ended.get(timeout=20) == ("c_1", True)
        server.post("/abort_request", {"rid": "c"})
        assert server.service.ended.get(timeout=20) == ("c_0", True)


def test_batch_times_n_is_grouped_by_prompt(server: LiveServer) -> None:
    params = [{"n": 2, "max_new_tokens": 1}, {"n": 1, "max_new_tokens": 1}]
    body = {"text": ["a", "bb"], "rid": ["p", "q"], "sampling_params": params}
    replies = server.post("/generate", body).json()
    assert [one["meta_info"]["id"] for one in replies] == ["p_0", "p_1", "q"]
    assert [one["meta_info"]["prompt_tokens"] for one in replies] == [2, 2, 3]


def test_stream_is_cumulative(server: LiveServer) -> None:
    events = server.events("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 3}})
    assert [one["text"] for one in events] == [ANSWER[:1], ANSWER[:2], ANSWER[:3]]
    assert [one["output_ids"] for one in events] == [IDS[:1], IDS[:2], IDS[:3]]
    reasons = [one["meta_info"]["finish_reason"] for one in events]
    assert reasons == [None, None, {"type": "length", "length": 3}]
    assert "e2e_latency" not in events[0]["meta_info"]
    assert "e2e_latency" in events[-1]["meta_info"]


def test_stream_can_be_incremental(tmp_path: Any) -> None:
    with LiveServer(tmp_path, incremental_streaming_output=True) as server:
        body = {"text": "Hi", "sampling_params": {"max_new_tokens": 3}, "return_logprob": True}
        events = server.events("/generate", body)
    assert [one["text"] for one in events] == list(ANSWER[:3])
    assert [one["output_ids"] for one in events] == [[i] for i in IDS[:3]]
    assert [len(one["meta_info"]["output_token_logprobs"]) for one in events] == [1, 1, 1]


def test_stream_of_a_batch_carries_the_index(server: LiveServer) -> None:
    body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 2, "n": 2}}
    events = server.events("/generate", body)
    for index in range(4):
        texts = [one["text"] for one in events if one["index"] == index]
        assert texts == [ANSWER[:1], ANSWER[:2]]


def test_logprobs_of_input_and_output(server: LiveServer) -> None:
    body = {
        "text": "abc",
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 2,
        "top_logprobs_num": 2,
        "token_ids_logprob": [5, 6],
        "return_text_in_logprobs": True,
    }
    info = server.post("/generate", body).json()["meta_info"]
    assert info["input_token_logprobs"] == [[None, 98, "b"], [-0.25, 99, "c"]]
    assert info["output_token_logprobs"] == [[0.0, IDS[0], "P"], [0.0, IDS[1], "a"]]
    assert info["output_token_logprobs_length"] == 2
    assert info["input_top_logprobs"] == [None, [[0.0, 65, "A"], [-1.0, 66, "B"]]]
    assert info["output_top_logprobs"] == [[[0.0, 65, "A"], [-1.0, 66, "B"]]] * 2
    assert info["input_token_ids_logprobs"][0] is None
    assert info["output_token_ids_logprobs"] == [[[-2.5, 5, "\x05"], [-2.5, 6, "\x06"]]] * 2


def test_logprob_fields_only_as_asked(server: LiveServer) -> None:
    body = {"text": "abc", "sampling_params": {"max_new_tokens": 1}}
    info = server.post("/generate", body).json()["meta_info"]
    assert not any("logprob" in name for name in info)
    info = server.post("/generate", {**body, "return_logprob": True}).json()["meta_info"]
    assert {name for name in info if "logprob" in name} == {
        "input_token_logprobs",
        "output_token_logprobs",
        "output_token_logprobs_length",
    }
    assert info["input_token_logprobs"] == []
    assert info["output_token_logprobs"] == [[0.0, IDS[0], None]]


def test_logprobs_of_a_stream_add_up(server: LiveServer) -> None:
    body = {"text": "ab", "return_logprob": True, "logprob_start_len": 0}
    params = {"sampling_params": {"max_new_tokens": 3}}
    events = server.events("/generate", {**body, **params})
    lengths = [len(one["meta_info"]["output_token_logprobs"]) for one in events]
    assert lengths == [1, 2, 3]
    assert all(len(one["meta_info"]["input_token_logprobs"]) == 3 for one in events)


def test_prompt_ids_on_request(server: LiveServer) -> None:
    body = {"text": "ab", "return_prompt_token_ids": True}
    assert server.post("/generate", body).json()["prompt_token_ids"] == [1, 97, 98]


def test_prefix_keys_never_collide(server: LiveServer) -> None:
    pairs = [
        {},
        {"extra_key": "ab"},
        {"cache_salt": "ab"},
        {"cache_salt": "a", "extra_key": "b"},
        {"cache_salt": "", "extra_key": ""},
    ]
    for pair in pairs:
        server.post("/generate", {"text": "a", **pair})
    keys = [request.extra_key for request in server.service.requests]
    assert keys[0] is None
    assert keys[4] is None
    assert len(set(keys[:4])) == 4


def test_without_tokenizer_there_is_no_text(server: LiveServer) -> None:
    server.service.tokenizer = None
    body = server.post("/generate", {"input_ids": [5]}).json()
    assert "text" not in body
    assert body["output_ids"] == IDS
    assert server.post("/generate", {"text": "a"}).status_code == 400


def test_an_engine_abort_becomes_its_status(server: LiveServer) -> None:
    reason = FinishReason("abort", message="No memory: 5 of 4", status_code=503)
    server.service.refusals["r"] = reason
    for stream in (False, True):
        reply = server.post("/generate", {"text": "a", "rid": "r", "stream": stream})
        assert reply.status_code == 503
        assert reply.json() == {"error": {"message": "No memory: 5 of 4"}}


def test_one_refused_prompt_ends_the_batch(server: LiveServer) -> None:
    server.service.hold_at["b_0"] = 1
    server.service.refusals["b_1"] = FinishReason("abort", message="full", status_code=503)
    reply = server.post("/generate", {"text": ["a", "b"], "rid": "b"})
    assert reply.status_code == 503
    ended = {server.service.ended.get(timeout=20) for _ in range(2)}
    assert ended == {("b_0", False), ("b_1", True)}


def test_a_refusal_before_the_first_event_is_the_status(server: LiveServer) -> None:
    server.service.hold_at["s_1"] = 0
    body = {"text": ["a" * 600, "b"], "rid": "s", "stream": True}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert "context length" in reply.json()["error"]["message"]


def test_an_error_inside_a_stream_is_its_last_event(server: LiveServer) -> None:
    server.service.fail_at["s"] = 2
    events = server.events("/generate", {"text": "a", "rid": "s"})
    assert [one["text"] for one in events[:-1]] == [ANSWER[:1], ANSWER[:2]]
    assert events[-1] == {
        "error": {
            "message": "The scheduler process died.",
            "type": "ServiceUnavailable",
            "code": 503,
            "retryable": True,
        }
    }


def test_abort_by_the_client_is_an_ordinary_end(server: LiveServer) -> None:
    server.service.hold_at["mine"] = 2
    replies: list[Any] = []
    thread = threading.Thread(
        target=lambda: replies.append(server.post("/generate", {"text": "a", "rid": "mine"}))
    )
    thread.start()
    assert server.service.started.get(timeout=20) == "mine"
    while ("mine", True) not in list(server.service.ended.queue):
        assert server.post("/abort_request", {"rid": "mine"}).status_code == 200
    thread.join(20)
    body = replies[0].json()
    assert body["text"] == ANSWER[:2]
    assert body["meta_info"]["finish_reason"]["type"] == "abort"
    assert body["meta_info"]["finish_reason"]["status_code"] is None
