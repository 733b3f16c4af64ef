from __future__ import annotations

import json

import pytest

from sglang.srt.configs.kv_events_config import KVEventsConfig
from sglang.srt.server_args import ServerArgs, prepare_server_args


def test_defaults_publish_nothing() -> None:
    config = KVEventsConfig.from_json("{}")
    nothing = KVEventsConfig("null", "tcp://*:5557", "", 100_000, 100_000, None, 10_000)
    assert config == nothing
    assert not config.enabled


def test_a_whole_configuration() -> None:
    text = (
        '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://router:5557",'
        ' "topic": "kv@10.0.0.1:8000@m", "hwm": 7, "max_queue_size": 8,'
        ' "replay_endpoint": "tcp://*:5558", "buffer_steps": 9}'
    )
    config = KVEventsConfig.from_json(text)
    topic = "kv@10.0.0.1:8000@m"
    assert config == KVEventsConfig("zmq", "tcp://router:5557", topic, 7, 8, "tcp://*:5558", 9)
    assert config.enabled


@pytest.mark.parametrize(
    ("endpoint", "binds"),
    [
        ("tcp://*:5557", True),
        ("tcp://0.0.0.0:5557", True),
        ("tcp://[::]:5557", True),
        ("tcp://127.0.0.1:*", True),
        ("ipc:///tmp/events", True),
        ("tcp://127.0.0.1:5557", False),
        ("tcp://router.example:5557", False),
    ],
)
def test_an_own_address_is_bound_and_another_connected_to(endpoint: str, binds: bool) -> None:
    assert KVEventsConfig("zmq", endpoint).binds is binds


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"publisher": "kafka"}', "one of null, zmq"),
        ('{"publisher": 1}', "publisher must be a string"),
        ('{"endpoint": "5557"}', "tcp://"),
        ('{"hwm": 0}', "at least 1"),
        ('{"hwm": true}', "whole number"),
        ('{"max_queue_size": "9"}', "whole number"),
        ('{"port": 1}', "unknown key 'port'"),
        ('{"replay_endpoint": 5558}', "replay_endpoint must be a string"),
        ('{"replay_endpoint": "5558"}', "replay_endpoint must look like tcp://"),
        ('{"replay_endpoint": "tcp://*:5557"}', "another address than endpoint"),
        ('{"replay_endpoint": "tcp://0.0.0.0:5557"}', "another address than endpoint"),
        ('{"endpoint": "ipc:///a", "replay_endpoint": "ipc:///a"}', "another address"),
        ('{"buffer_steps": 0}', "buffer_steps must be a whole number of at least 1"),
        ('{"buffer_steps": 2.5}', "whole number"),
        ('{"replay_endpont": "tcp://*:5558"}', "unknown key 'replay_endpont'; known are .*replay"),
    ],
)
def test_a_mistake_is_one_line_at_start(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        ServerArgs.from_kwargs(model_path="m", kv_events_config=text)
    assert str(caught.value).startswith("--kv-events-config")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "replay_endpoint"),
    [
        ("tcp://*:5557", None),
        ("tcp://*:5557", "tcp://*:5558"),
        ("tcp://router:5557", "tcp://*:5557"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
        ("ipc:///tmp/events", "ipc:///tmp/replay"),
    ],
)
def test_a_replay_address_of_its_own(endpoint: str, replay_endpoint: str | None) -> None:
    text = json.dumps({"endpoint": endpoint, "replay_endpoint": replay_endpoint})
    config = KVEventsConfig.from_json(text)
    assert (config.endpoint, config.replay_endpoint) == (endpoint, replay_endpoint)


def test_the_command_line_keeps_the_text() -> None:
    args = prepare_server_args(["--model-path", "m", "--kv-events-config", '{"publisher": "zmq"}'])
    assert args.kv_events_config == '{"publisher": "zmq"}'
    assert prepare_server_args(["--model-path", "m"]).kv_events_config is None
