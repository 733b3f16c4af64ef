"""The flags of LoRA adapters: how adapters are written, and what contradicts what."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.configs.lora_args import LoraRef, parse_lora_ref
from sglang.srt.server_args import ServerArgs, prepare_server_args

A, B = LoraRef("a", "/a"), LoraRef("b", "/b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=/a", A),
        ("/a", LoraRef("/a", "/a")),
        ("a=/x=y", LoraRef("a", "/x=y")),
        ('{"lora_name": "a", "lora_path": "/a"}', A),
        ('{"lora_name": "a", "lora_path": "/a", "pinned": true}', LoraRef("a", "/a", True)),
    ],
)
def test_forms_of_an_adapter(text: str, expected: LoraRef) -> None:
    assert parse_lora_ref(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME=PATH, got ''"),
        ("a=", "expected NAME=PATH, got 'a='"),
        ("=b", "expected NAME=PATH, got '=b'"),
        ("{", "is not JSON"),
        ('{"lora_name": "a"}', 'expected {"lora_name"'),
        ('{"lora_name": "a", "lora_path": "/a", "rank": 1}', 'expected {"lora_name"'),
        ('{"lora_name": "a", "lora_path": "/a", "pinned": "yes"}', "pinned is true or false"),
    ],
)
def test_what_is_no_adapter(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_lora_ref(text)


def test_the_command_line() -> None:
    words = ["--model-path", "m", "--lora-paths", "a=/a", '{"lora_name":"b","lora_path":"/b"}']
    args = prepare_server_args([*words, "--lora-target-modules", "q_proj", "v_proj"])
    assert args.lora_paths == (A, B)
    assert args.lora_target_modules == ("q_proj", "v_proj")
    assert args.serves_lora
    assert (args.enable_lora, args.max_loras_per_batch, args.lora_eviction_policy) == (
        False,
        8,
        "lru",
    )
    assert not prepare_server_args(["--model-path", "m"]).serves_lora


@pytest.mark.parametrize(
    "paths",
    [
        ["a=/a", "b=/b"],
        ("a=/a", {"lora_name": "b", "lora_path": "/b"}),
        {"a": "/a", "b": "/b"},
    ],
)
def test_keywords(paths: Any) -> None:
    assert ServerArgs.from_kwargs(model_path="m", lora_paths=paths).lora_paths == (A, B)


def test_one_text_is_one_adapter() -> None:
    assert ServerArgs.from_kwargs(model_path="m", lora_paths="a=/a").lora_paths == (A,)
    args = ServerArgs.from_kwargs(
        model_path="m", enable_lora=True, lora_target_modules="all", max_lora_rank=8
    )
    assert args.lora_target_modules == ("all",)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lora_paths": 3}, "lora_paths cannot be 3"),
        ({"lora_paths": [3]}, "lora_paths cannot be 3"),
        ({"lora_paths": ["a="]}, "lora_paths: expected NAME=PATH"),
        ({"max_lora_rank": 8}, "--max-lora-rank needs --enable-lora"),
        ({"lora_target_modules": ["all"]}, "--lora-target-modules needs --enable-lora"),
        ({"max_loaded_loras": 9}, "--max-loaded-loras needs --enable-lora"),
        (
            {"enable_lora": True},
            "--enable-lora without --lora-paths needs --max-lora-rank and --lora-target-modules",
        ),
        ({"lora_paths": ["a=/a", "a=/b"]}, "--lora-paths: two adapters are called 'a'"),
        (
            {"lora_paths": ["a=/a"], "max_loaded_loras": 2},
            "--max-loaded-loras 2 is less than --max-loras-per-batch 8",
        ),
        (
            {"lora_paths": ["a", "b"], "max_loaded_loras": 1, "max_loras_per_batch": 1},
            "--lora-paths: 2 adapters, but --max-loaded-loras is 1",
        ),
        (
            {
                "lora_paths": [{"lora_name": "a", "lora_path": "/a", "pinned": True}],
                "max_loras_per_batch": 1,
            },
            "--lora-paths: 1 pinned adapters leave no place for others: --max-loras-per-batch is 1",
        ),
        ({"lora_paths": ["a"], "lora_eviction_policy": "x"}, "--lora-eviction-policy must be one"),
    ],
)
def test_contradictions(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerArgs.from_kwargs(model_path="m", **kwargs)
