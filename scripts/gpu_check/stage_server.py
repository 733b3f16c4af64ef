"""Stage 3: a server end to end, with generated weights: transformers' greedy tokens."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_check.records import Journal
from gpu_check.setting import Setting
from haystack.server import Server, started_server

VOCAB = 512
NEW_TOKENS = 24
_TWO_SERVERS_S = 20.0  # to start both, at least


def write_model(folder: Path) -> LlamaForCausalLM:
    """A small random Llama without a tokenizer, saved as a checkpoint; float32."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def prompts() -> list[list[int]]:
    """Short and long ones, two with a common prefix."""
    rng = np.random.default_rng(7)
    common = rng.integers(0, VOCAB, 150).tolist()
    lengths = (1, 5, 64, 65, 300)
    own = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    return [*own, [*common, 3], [*common, 4, 5]]


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """What transformers takes, in float32 on the CPU."""
    ids = torch.tensor([prompt])
    reply: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    found: list[int] = reply[0, len(prompt) :].tolist()
    return found


def _model_flags(folder: Path) -> list[str]:
    return ["--model-path", str(folder), "--dtype", "float32", "--skip-tokenizer-init"]


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """POST a JSON body, or GET without one; the reply's JSON."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        text = reply.read()
    return json.loads(text) if text else None


def generate(url: str, ids: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of a batch of prompts."""
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
    replies = ask(url, "/generate", {"input_ids": ids, "sampling_params": params})
    return [reply["output_ids"] for reply in replies]


def check_server(setting: Setting, journal: Journal) -> None:
    """The same tokens as transformers with every way to run, and memory that goes back."""
    folder = setting.folder / "tiny_llama"
    folder.mkdir(exist_ok=True)
    model = write_model(folder)
    asked = prompts()
    expected = [greedy(model, prompt) for prompt in asked]
    ways: list[tuple[str, list[str]]] = [("default", [])]
    if not setting.is_dry:
        ways += [
            ("without graphs", ["--disable-cuda-graph"]),
            ("torch_native", ["--attention-backend", "torch_native"]),
            ("static memory", ["--kv-backing", "static"]),
            ("a segment table", ["--kv-backing", "segment_table"]),
        ]
    for name, flags in ways:
        if setting.seconds_left < 15:
            journal.skip(f"server {name}", "no time is left")
            continue
        try:
            _check_way(setting, journal, name, folder, flags, asked, expected)
        except RuntimeError as error:  # the server ended or was not ready
            journal.fail(f"server {name}", str(error)[-400:])


def check_two_servers(setting: Setting, journal: Journal) -> None:
    """Two servers on one device: what one's budget gives up, the other's may take."""
    if setting.seconds_left < _TWO_SERVERS_S:
        journal.skip("two servers trade their budgets", "no time is left")
        return
    folder = setting.folder / "tiny_llama"
    folder.mkdir(exist_ok=True)
    model = write_model(folder)
    asked = prompts()[:3]
    expected = [greedy(model, prompt) for prompt in asked]
    small, large = ("32MiB", "128MiB") if setting.is_dry else ("256MiB", "8GiB")
    flags = [
        *setting.flags,
        *_model_flags(folder),
        "--disable-cuda-graph",
        *("--kv-idle-release-seconds", "0.5", "--prefix-cache-idle-seconds", "0.5"),
    ]
    logs = [setting.folder / f"server_{name}.log" for name in ("first", "second")]
    with (
        started_server([*flags, "--kv-memory-budget", large], logs[0]) as first,
        started_server([*flags, "--kv-memory-budget", small], logs[1]) as second,
    ):
        before = [server.info()["memory"]["budget_bytes"] for server in (first, second)]
        rounds = [generate(first.url, asked) == expected]
        ask(first.url, "/set_kv_budget", {"bytes": small})
        ask(second.url, "/set_kv_budget", {"bytes": large})
        after = [server.info()["memory"]["budget_bytes"] for server in (first, second)]
        rounds += [generate(server.url, asked) == expected for server in (first, second)]
    journal.judge(
        "two servers trade their budgets",
        before == after[::-1] and all(rounds),
        f"budgets {before} then {after}, equal answers {rounds}",
        budgets_mib=str([size >> 20 for size in after]),
    )


def _check_way(
    setting: Setting,
    journal: Journal,
    name: str,
    folder: Path,
    flags: list[str],
    asked: list[list[int]],
    expected: list[list[int]],
) -> None:
    every = [
        *setting.flags,
        *_model_flags(folder),
        *("--kv-memory-budget", "256MiB" if setting.is_dry else "2GiB"),
        *("--kv-idle-release-seconds", "0.5", "--prefix-cache-idle-seconds", "0.5"),
        *("--chunked-prefill-size", "128"),
        *flags,
    ]
    began = time.monotonic()
    log = setting.folder / f"server_{name.replace(' ', '_')}.log"
    with started_server(every, log) as server:
        ready_s = time.monotonic() - began
        found = generate(server.url, asked)
        found_again = [generate(server.url, [one])[0] for one in asked[:2]]
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        journal.judge(
            f"server {name}: transformers' tokens",
            equal == len(expected) and found_again == expected[:2],
            f"{equal} of {len(expected)} answers are equal",
            ready_s=ready_s,
        )
        if "static" not in name:
            _check_idle(setting, journal, name, server)


def _check_idle(setting: Setting, journal: Journal, name: str, server: Server) -> None:
    """A budget change is followed, and idle memory goes back to the reserve."""
    changed = ask(server.url, "/set_kv_budget", {"bytes": "128MiB" if setting.is_dry else "1GiB"})
    deadline = time.monotonic() + 20
    mapped = reserve = -1
    while time.monotonic() < deadline:
        groups = server.info()["memory"]["groups"]
        mapped = sum(group["mapped_bytes"] for group in groups)
        reserve = (0 if setting.is_dry else 1) * sum(group["segment_bytes"] for group in groups)
        if mapped <= reserve:
            break
        time.sleep(0.2)
    journal.judge(
        f"server {name}: idle memory goes back",
        mapped <= reserve,
        f"{mapped} bytes stay mapped",
        reserve_bytes=reserve,
        budget_reply=str(changed)[:60],
    )


PARTS = (("server", check_server), ("two servers", check_two_servers))
