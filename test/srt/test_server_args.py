"""Flags: values, refusals, warnings, the configuration file, and one definition for all."""

from __future__ import annotations

import ast
import dataclasses
import logging
from collections import Counter
from pathlib import Path

import pytest

import gen_server_arguments
import sglang
from sglang.srt.configs.flag_spec import Arity, FlagKind, FlagSpec, specs_of
from sglang.srt.configs.flag_tables import OTHER_FLAGS
from sglang.srt.configs.speculative_args import draft_length
from sglang.srt.server_args import ServerArgs, all_flags, prepare_server_args

REFUSED = [spec for spec in OTHER_FLAGS if spec.kind is FlagKind.REFUSED]
NGRAM = ("--speculative-algorithm", "NGRAM")
STANDALONE = ("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", "d")
ACCEPTED = [spec for spec in OTHER_FLAGS if spec.kind is FlagKind.ACCEPTED]


def words(spec: FlagSpec, value: str = "7") -> list[str]:
    return [spec.name] if spec.arity is Arity.SWITCH else [spec.name, value]


def parse(*argv: str) -> ServerArgs:
    return prepare_server_args(["--model-path", "m", *argv])


def parse_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a bad command line prints."""
    with pytest.raises(SystemExit) as stop:
        prepare_server_args(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_defaults_are_sglangs() -> None:
    args = parse()
    assert (args.host, args.port) == ("127.0.0.1", 30000)
    assert (args.tokenizer_path, args.served_model_name) == ("m", "m")
    assert (args.max_prefill_tokens, args.schedule_policy) == (16384, "fcfs")
    assert (args.radix_eviction_policy, args.load_format, args.dtype) == ("lru", "auto", "auto")
    assert args.watchdog_timeout == 300
    assert args.context_length is None
    assert args.page_size is None


def test_defaults_on_a_cpu() -> None:
    args = parse()
    assert (args.device, args.attention_backend) == ("cpu", "auto")
    assert args.mem_fraction_static == 0.7
    assert args.chunked_prefill_size == 2048
    assert args.kv_segment_reserve == 0
    assert (args.kv_idle_release_seconds, args.prefix_cache_idle_seconds) == (30.0, 300.0)


def test_defaults_on_a_gpu() -> None:
    args = parse("--device", "cuda")
    assert (args.device, args.attention_backend) == ("cuda", "auto")
    assert args.mem_fraction_static is None
    assert (args.chunked_prefill_size, args.cuda_graph_max_bs) == (8192, 256)
    assert args.kv_segment_reserve == 1
    assert parse("--device", "cuda", "--kv-backing", "static").kv_segment_reserve == 0


def test_the_device_is_the_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.server_args.detect_device", lambda: "cuda")
    assert parse().device == "cuda"
    assert parse().kv_segment_reserve == 1
    assert parse("--device", "cpu").device == "cpu"


def test_only_a_default_chunk_adapts() -> None:
    args = parse()
    assert (args.chunked_prefill_size, args.chunk_adaptation) == (2048, True)
    assert dataclasses.replace(args, port=1).chunk_adaptation
    assert not parse("--chunked-prefill-size", "2048").chunk_adaptation
    assert not parse("--chunked-prefill-size", "-1").chunk_adaptation


def test_sizes_are_human_readable() -> None:
    args = parse(
        *("--context-length", "10M", "--max-total-tokens", "1Mi", "--max-prefill-tokens", "16k"),
        *("--kv-memory-budget", "4GiB", "--max-request-bytes", "64MB", "--kv-segment-size", "8Ki"),
    )
    assert args.context_length == 10_000_000
    assert args.max_total_tokens == 1 << 20
    assert args.max_prefill_tokens == 16_000
    assert args.kv_memory_budget == 4 << 30
    assert args.max_request_bytes == 64_000_000
    assert args.kv_segment_size == 8192


def test_segment_size_auto_is_none() -> None:
    assert parse("--kv-segment-size", "auto").kv_segment_size is None


def test_aliases_mean_the_same() -> None:
    args = prepare_server_args(["--model", "x", "--tp", "1"])
    assert args.model_path == "x"
    assert prepare_server_args(["--model=x", "--tensor-parallel-size=2"]).tp_size == 2


def test_dtype_names_are_resolved() -> None:
    args = parse("--dtype", "half", "--kv-cache-dtype", "bf16")
    assert (args.dtype, args.kv_cache_dtype) == ("float16", "bfloat16")
    assert parse("--dtype", "float").dtype == "float32"
    assert parse("--kv-cache-dtype", "fp8_e5m2").kv_cache_dtype == "fp8_e5m2"
    assert parse("--kv-cache-dtype", "int8").kv_cache_dtype == "int8"
    assert parse("--attention-backend", "flex_attention").attention_backend == "torch_native"


def test_a_seed_is_drawn_once_and_kept() -> None:
    args = parse()
    assert 0 <= args.random_seed < 1 << 30
    assert dataclasses.replace(args, port=1).random_seed == args.random_seed
    assert parse("--random-seed", "5").random_seed == 5


def test_request_byte_limit_follows_the_context() -> None:
    args = parse()
    assert args.request_byte_limit(8192) == 32 << 20
    assert args.request_byte_limit(10_000_000) == 160_000_000 + (1 << 20)
    assert parse("--max-request-bytes", "1000").request_byte_limit(10_000_000) == 1000


def test_public_settings_hold_no_key() -> None:
    public = parse("--api-key", "secret-word", "--admin-api-key", "secret-word2").public_dict()
    assert "secret-word" not in str(public)
    assert public["port"] == 30000


def test_model_overrides_are_an_object() -> None:
    args = parse("--json-model-override-args", '{"num_hidden_layers": 2}')
    assert args.model_overrides() == {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "0"], "--port must be at least 1, got 0"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--port", "http"], "--port: invalid literal"),
        (["--context-length", "long"], "'long' is not a count"),
        (["--context-length", "0"], "--context-length must be at least 1"),
        (["--kv-memory-budget", "4 bananas"], "is not a size"),
        (["--mem-fraction-static", "1.0"], "--mem-fraction-static must be below 1"),
        (["--mem-fraction-static", "0"], "--mem-fraction-static must be above 0"),
        (["--mem-fraction-static", "nan"], "--mem-fraction-static must be above 0"),
        (["--chunked-prefill-size", "0"], "--chunked-prefill-size must be at least 1 (or -1)"),
        (["--prefix-cache-idle-seconds", "-2"], "must be at least 0 (or -1)"),
        (["--page-size", "0"], "--page-size must be at least 1"),
        (["--kv-segment-size", "0"], "--kv-segment-size must be at least 1"),
        (["--schedule-policy", "dfs-weight"], "--schedule-policy must be one of fcfs, lpm"),
        (["--device", "tpu"], "--device must be one of cpu, cuda"),
        (
            ["--attention-backend", "fa3"],
            "--attention-backend must be one of auto, cpu, torch_native",
        ),
        (["--kv-cache-dtype", "fp4_e2m1"], "--kv-cache-dtype must be one of"),
        (["--load-format", "bitsandbytes"], "--load-format must be one of"),
        (["--tp-size", "0"], "--tp-size must be at least 1"),
        (["--dist-timeout", "0"], "--dist-timeout must be at least 1"),
        (["--dp-size", "0"], "--dp-size must be at least 1"),
        (["--load-balance-method", "luck"], "must be one of auto, round_robin, shortest_queue"),
        (["--node-rank", "1"], "--node-rank 1 does not belong to --nnodes 1"),
        (["--nnodes", "2", "--tp", "2"], "--nnodes needs --dist-init-addr, the address of node 0"),
        (
            ["--nnodes", "2", "--tp", "3", "--dist-init-addr", "a:1"],
            "--tp-size 3 cannot be divided among --nnodes 2",
        ),
        (
            ["--nnodes", "2", "--dp-size", "2", "--dist-init-addr", "a:1"],
            "--dp-size: replicas share one machine; drop --nnodes",
        ),
        (["--dist-init-addr", "a"], "--dist-init-addr must look like 10.0.0.1:5000, got 'a'"),
        (["--dist-init-addr", "a:0"], "--dist-init-addr must look like"),
        (["--dist-init-addr", "fe80::1:5000"], "--dist-init-addr must look like"),
        (["--json-model-override-args", "{"], "--json-model-override-args is not JSON"),
        (["--json-model-override-args", "[]"], "must be a JSON object"),
        (["--default-chat-template-kwargs", "{"], "--default-chat-template-kwargs is not JSON"),
        (["--default-chat-template-kwargs", "3"], "must be a JSON object"),
        (["--preferred-sampling-params", "[1]"], "must be a JSON object"),
        (["--skip-tokenizer-init", "--chat-template", "x"], "needs a tokenizer"),
        (["--skip-tokenizer-init", "--tool-call-parser", "auto"], "needs a tokenizer"),
        (["--tool-call-parser", "kimi"], "--tool-call-parser must be one of auto, qwen, "),
        (["--reasoning-parser", "kimi"], "--reasoning-parser must be one of auto, deepseek-r1, "),
        (["--kv-backing", "static", "--kv-segment-reserve", "1"], "maps every segment at start"),
        (["--kv-backing", "cuda_vmm"], "cuda_vmm needs a CUDA device, this is --device cpu"),
        (["--device", "cuda", "--kv-backing", "mmap"], "--kv-backing mmap is memory of the host"),
        (["--kv-disk-size", "1GiB"], "--kv-disk-size needs --kv-disk-path, the directory to use"),
        (["--device", "cuda", "--kv-disk-path", "/d"], "on --device cpu, has a disk tier"),
        (["--kv-backing", "static", "--kv-disk-path", "/d"], "only --kv-backing mmap"),
        (
            ["--kv-parallel-size", "2", "--kv-disk-path", "/d"],
            "--kv-disk-path and --kv-parallel-size don't go together",
        ),
        (["--enable-hierarchical-cache"], "on --device cpu the host's memory comes first"),
        (
            ["--device", "cuda", "--kv-backing", "static", "--enable-hicache"],
            "only --kv-backing cuda_vmm has a host tier",
        ),
        (
            ["--device", "cuda", "--kv-parallel-size", "2", "--enable-hierarchical-cache"],
            "--enable-hierarchical-cache and --kv-parallel-size don't go together",
        ),
        (["--hicache-ratio", "0"], "--hicache-ratio must be above 0"),
        (["--hicache-storage-backend", "file"], "what lies below memory is the host's"),
        (["--quantization-param-path", "scales.json"], "set --kv-cache-dtype"),
        (["--device", "cuda", "--kv-cache-dtype", "int8"], "read by the backends of a CPU"),
        (["--attention-backend", "triton", "--kv-cache-dtype", "int8"], "take an fp8 one"),
        (["--device", "cuda", "--kv-parallel-size", "2"], "--kv-parallel-size spreads KV on"),
        (["--disable-radix-cache", "--max-cached-tokens", "5"], "drop --disable-radix-cache"),
        (["--schedule-low-priority-values-first"], "needs --enable-priority-scheduling"),
        (["--default-priority-value", "1"], "needs --enable-priority-scheduling"),
        (["--speculative-algorithm", "UNO"], "must be one of NGRAM, STANDALONE,"),
        (["--speculative-algorithm", "EAGLE3"], "needs --speculative-draft-model-path"),
        (
            ["--speculative-algorithm", "NEXTN", "--speculative-draft-model-path", "d"],
            "drop the draft model's path",
        ),
        (["--speculative-num-draft-tokens", "4"], "needs --speculative-algorithm"),
        (
            [
                *("--speculative-algorithm", "NGRAM"),
                *("--speculative-ngram-min-match-window-size", "9"),
                *("--speculative-ngram-max-match-window-size", "8"),
            ],
            "--speculative-ngram-min-match-window-size 9 is above",
        ),
        (["--speculative-algorithm", "STANDALONE"], "needs --speculative-draft-model-path"),
        (["--speculative-draft-model-path", "d"], "needs --speculative-algorithm"),
        ([*NGRAM, "--speculative-draft-model", "d"], "needs --speculative-algorithm STANDALONE"),
        ([*NGRAM, "--speculative-num-steps", "3"], "needs --speculative-algorithm STANDALONE"),
        ([*STANDALONE, "--speculative-eagle-topk", "2"], "must be at most 1, got 2"),
        ([*STANDALONE, "--speculative-num-draft-tokens", "1"], "leaves a draft model nothing"),
        (
            [*STANDALONE, "--speculative-ngram-min-match-window-size", "3"],
            "needs --speculative-algorithm NGRAM",
        ),
        ([*STANDALONE, "--kv-canary", "chain"], "can't know what a draft model reads"),
        ([*STANDALONE, "--kv-parallel-size", "2"], "don't go together, so far"),
        (
            ["--priority-scheduling-preemption-threshold", "-1"],
            "--priority-scheduling-preemption-threshold must be at least 0",
        ),
        (["--disable-radix-cache", "--schedule-policy", "lpm"], "drop --disable-radix-cache"),
        (["--grammar-backend", "xgrammar"], "--grammar-backend must be one of llguidance, none"),
        (
            [
                *("--constrained-json-whitespace-pattern", " "),
                "--constrained-json-disable-any-whitespace",
            ],
            "drop --constrained-json-disable-any-whitespace",
        ),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--context", "5"], "unrecognized arguments: --context 5"),
        (["--host"], "expected one argument"),
    ],
)
def test_bad_values_get_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in parse_error(capsys, "--model-path", "m", *argv)


def test_the_model_path_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model-path is required" in parse_error(capsys, "--port", "1")


@pytest.mark.parametrize("spec", REFUSED, ids=lambda spec: spec.name)
def test_refused_flags_stop_the_start(capsys: pytest.CaptureFixture[str], spec: FlagSpec) -> None:
    line = parse_error(capsys, "--model-path", "m", *words(spec, "no-such-value"))
    assert f"{spec.name} is refused: {spec.help}" in line


@pytest.mark.parametrize("spec", ACCEPTED, ids=lambda spec: spec.name)
def test_accepted_flags_are_named_in_a_warning(
    caplog: pytest.LogCaptureFixture, spec: FlagSpec
) -> None:
    with caplog.at_level(logging.WARNING):
        parse(*words(spec))
    (record,) = caplog.records
    assert record.getMessage() == f"{spec.name} is accepted without effect: {spec.help}"


@pytest.mark.parametrize("spec", [s for s in REFUSED if s.noops], ids=lambda spec: spec.name)
def test_a_refused_flag_may_ask_for_what_is_the_case(
    caplog: pytest.LogCaptureFixture, spec: FlagSpec
) -> None:
    for value in spec.noops:
        parse(spec.name, value)
    assert not caplog.records


def test_flags_that_must_not_pass_silently_are_refused() -> None:
    refused = {name for spec in REFUSED for name in spec.names}
    assert refused >= {
        *("--torchao-config", "--speculative-token-map", "--disaggregation-mode"),
        *("--hicache-storage-backend", "--pp-size", "--ep-size"),
        *("--hf-chat-template-name", "--tool-server", "--ssl-keyfile"),
    }


def test_no_two_flags_share_a_name() -> None:
    names = Counter(name for spec in all_flags() for name in spec.names)
    assert [name for name, count in names.items() if count > 1] == []
    assert all(name.startswith("--") for name in names)


def test_every_setting_has_a_flag() -> None:
    fields = [field.name for field in dataclasses.fields(ServerArgs)]
    fields.remove("chunk_adaptation")  # derived from --chunked-prefill-size
    fields.remove("has_nodes_given")  # derived from --nnodes
    assert [spec.dest for spec in specs_of(ServerArgs)] == fields


def test_help_shows_the_working_flags_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_server_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for spec in specs_of(ServerArgs):
        assert spec.name in text
        assert f"\n{spec.group}:\n" in text
    assert "--torchao-config" not in text


def test_a_config_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(
        "model-path: from-file\nport: 1234\nenable-metrics: true\nkv_backing: static\n"
        "disable-radix-cache: false\nchunked-prefill-size: -1\ncuda-graph-bs: [1, 2]\n"
    )
    args = prepare_server_args(["--config", str(config), "--port", "99"])
    assert (args.model_path, args.port, args.enable_metrics) == ("from-file", 99, True)
    assert (args.kv_backing, args.disable_radix_cache) == ("static", False)
    assert args.chunked_prefill_size == -1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "must be a mapping"),
        ("a: [1\n", "not YAML"),
        ("port: {a: 1}\n", "port must be a plain value"),
        ("config: other.yaml\n", "must not name another"),
        ("no-such-flag: 1\n", "unrecognized arguments: --no-such-flag=1"),
    ],
)
def test_a_bad_config_file_gets_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(content)
    assert message in parse_error(capsys, "--model-path", "m", "--config", str(config))


def test_a_missing_config_file_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in parse_error(capsys, "--model-path", "m", "--config", "nowhere.yaml")


def test_keywords_are_the_same_flags() -> None:
    args = ServerArgs.from_kwargs(
        model="m", tp=1, context_length="1M", kv_memory_budget="1GiB", port=5, api_key=None
    )
    assert (args.model_path, args.context_length, args.port) == ("m", 1_000_000, 5)
    assert args.kv_memory_budget == 1 << 30
    assert args.disable_radix_cache is False


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, TypeError, "model_path is required"),
        ({"no_such": 1}, TypeError, "unknown argument 'no_such'"),
        ({"model_path": "m", "model": "m"}, TypeError, "given twice"),
        ({"port": "x"}, ValueError, "port: invalid literal"),
        ({"port": 0}, ValueError, "--port must be at least 1"),
        ({"port": 1.5}, ValueError, "port: invalid literal"),
        ({"port": True}, ValueError, "port cannot be True"),
        ({"host": b"x"}, ValueError, "host cannot be"),
        ({"enable_metrics": "yes"}, ValueError, "must be True or False"),
        ({"pp_size": 2}, ValueError, "--pp-size is refused"),
        ({"tool_server": "a"}, ValueError, "--tool-server is refused"),
    ],
)
def test_bad_keywords_raise(
    kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    model = {} if not kwargs or "model_path" in kwargs else {"model_path": "m"}
    with pytest.raises(error, match=message):
        ServerArgs.from_kwargs(**model, **kwargs)


def test_keywords_that_change_nothing_pass(caplog: pytest.LogCaptureFixture) -> None:
    ServerArgs.from_kwargs(model_path="m", pp_size=1, enable_lora=False, torchao_config=None)
    assert not caplog.records
    ServerArgs.from_kwargs(model_path="m", disable_cuda_graph_padding=True)
    assert "--disable-cuda-graph-padding" in caplog.text


def test_a_direct_instance_is_validated_too() -> None:
    with pytest.raises(ValueError, match="--stream-interval"):
        ServerArgs(model_path="m", stream_interval=0)
    assert ServerArgs(model_path="m").tokenizer_path == "m"


def test_every_working_flag_is_read_somewhere() -> None:
    """A field that nobody reads would be a flag that is silently ignored."""
    package = Path(sglang.__file__).parent
    read: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _holds_arguments(node.value, path):
                read.add(node.attr)
    unread = {field.name for field in dataclasses.fields(ServerArgs)} - read
    assert unread == set()


def _holds_arguments(node: ast.expr, path: Path) -> bool:
    """True for `server_args`, `args`, `self._args` and, where fields feed methods, `self`."""
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name.endswith("args") or (name == "self" and path.name.endswith("_args.py"))


def test_the_page_is_generated_from_the_definitions() -> None:
    assert gen_server_arguments.main(["--check"]) == 0
    page = gen_server_arguments.PAGE.read_text(encoding="utf-8")
    for spec in all_flags():
        for name in spec.names:
            assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ((), 4),
        (("--speculative-num-steps", "2"), 2),
        (("--speculative-num-draft-tokens", "8"), 7),
        (("--speculative-num-steps", "3", "--speculative-num-draft-tokens", "4"), 3),
        (("--speculative-num-steps", "5", "--speculative-num-draft-tokens", "4"), 3),
    ],
)
def test_what_a_draft_model_says_at_most(flags: tuple[str, ...], length: int) -> None:
    assert draft_length(parse(*STANDALONE, "--speculative-eagle-topk", "1", *flags)) == length
