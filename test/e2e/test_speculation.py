"""Drafted tokens of a real server with the demo model: the text of one without drafts, sooner."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from e2e.server_process import ServerProcess, running_server
from srt.models.hf_models import make_hf_model, save

PLANETS = "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune. "
PROMPTS = [f"The planets: {PLANETS * 3}", "for i in range(10):\n    print(i)\nfor i in range("]


def answer(url: str, prompt: str, **params: object) -> dict[str, object]:
    sampling = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True, **params}
    body = {"text": prompt, "sampling_params": sampling}
    reply = httpx.post(f"{url}/generate", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    found: dict[str, object] = reply.json()
    return found


def test_a_server_with_drafts_says_what_one_without_says(server: ServerProcess) -> None:
    sampled = {"temperature": 0.4, "sampling_seed": 5, "presence_penalty": 0.1}
    flags = ("--dtype", "float32", "--speculative-algorithm", "NGRAM")
    with running_server(*flags, "--enable-metrics") as drafted:
        told = []
        for prompt in PROMPTS:
            for params in ({}, sampled):
                plain, fast = (answer(one.url, prompt, **params) for one in (server, drafted))
                assert fast["output_ids"] == plain["output_ids"]
                assert fast["text"] == plain["text"]
                assert not any("spec" in name for name in plain["meta_info"])  # type: ignore[attr-defined]
                told.append(fast["meta_info"])
        # Nothing is known yet of what steps cost when the first answer begins: it is drafted. On a
        # machine that does much else later ones may not be.
        info: dict[str, float] = told[0]  # type: ignore[assignment]
        assert 0 < info["spec_verify_ct"] < 40
        assert 0 < info["spec_num_correct_drafts"] <= info["spec_num_proposed_drafts"]
        assert 1 < info["spec_accept_length"] <= 9
        metrics = httpx.get(f"{drafted.url}/metrics").text
        (line,) = [x for x in metrics.splitlines() if x.startswith("sglang:spec_accept_length{")]
        assert float(line.split()[-1]) > 1


@pytest.mark.slow
def test_a_draft_model_of_its_vocabulary_changes_no_text(
    server: ServerProcess, tmp_path: Path
) -> None:
    """One that knows nothing: random weights, and other heads and layers than the demo model's."""
    path = save(make_hf_model("llama", vocab_size=49152, num_hidden_layers=1), tmp_path)
    flags = ("--dtype", "float32", "--speculative-algorithm", "STANDALONE")
    with running_server(*flags, "--speculative-draft-model-path", path) as drafted:
        for params in ({}, {"temperature": 0.4, "sampling_seed": 5}):
            plain, other = (answer(one.url, PROMPTS[0], **params) for one in (server, drafted))
            assert other["output_ids"] == plain["output_ids"]
            info: dict[str, float] = other["meta_info"]  # type: ignore[assignment]
            assert 0 < info["spec_verify_ct"] < 60
            assert info["spec_num_correct_drafts"] <= info["spec_num_proposed_drafts"]
        told = httpx.get(f"{drafted.url}/server_info").json()
        assert told["speculative_draft_model_path"] == path
        groups = told["memory"]["groups"]
        assert [group["num_layers"] for group in groups] == [30, 1]
