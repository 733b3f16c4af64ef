"""load_model: formats, shards, names, damage, ranks, dummy weights."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.model_loader.loader import load_model, open_weights
from sglang.srt.model_loader.weight_files import SafetensorsIndex, safetensors_weights
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.registry import resolve_model_class
from srt.models.hf_models import make_hf_model, save


def load(path: Path | str, **arguments: Any) -> CausalLM:
    config = ModelConfig.from_path(str(path))
    fields = {
        "dtype": torch.float32,
        "parallel": ParallelState(),
        "show_progress": False,
        "quantization": "none",
    }
    return load_model(config, **{**fields, **arguments})


def hf_weights(model: CausalLM) -> dict[str, torch.Tensor]:
    """What our parameters hold, cut back into checkpoint names by slicing, not by the loader."""
    config = model.config
    q, kv = config.q_size, config.kv_size
    parts = {
        "qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
        "gate_up_proj": (
            ("gate_proj", config.intermediate_size),
            ("up_proj", config.intermediate_size),
        ),
    }
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = parameter
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, WeightOwner) and owner.quantized is not None and not len(parameter):
            tensor = owner.quantized.take(torch.arange(owner.quantized.shape[0]), parameter.dtype)
        merged = next((m for m in parts if m in name), None)
        if merged is None:
            weights[name] = tensor
            continue
        sizes = [size for _, size in parts[merged]]
        for (source, _), piece in zip(parts[merged], torch.split(tensor, sizes), strict=True):
            weights[name.replace(merged, source)] = piece
    return weights


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
    ],
)
def test_every_family_from_one_file(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    hf = make_hf_model(family, **changes)
    model = load(save(hf, tmp_path))
    assert_same(hf_weights(model), hf.state_dict())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_shards_with_an_index(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    path = save(hf, tmp_path, max_shard_size="64KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(hf_weights(load(path)), hf.state_dict())
    assert_same(hf_weights(load(path, load_format="safetensors")), hf.state_dict())


def test_a_single_file_hides_other_formats_beside_it(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    path = save(hf, tmp_path)
    save_file({"layers.0.attention.wq": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert_same(hf_weights(load(path)), hf.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, zipped: bool) -> None:
    hf = make_hf_model("qwen2")
    hf.config.save_pretrained(tmp_path)
    torch.save(
        hf.state_dict(),
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    torch.save({"not": "weights"}, tmp_path / "training_args.bin")
    assert_same(hf_weights(load(tmp_path)), hf.state_dict())
    assert_same(hf_weights(load(tmp_path, load_format="pt")), hf.state_dict())
    with pytest.raises(ValueError, match="no safetensors files"):
        load(tmp_path, load_format="safetensors")


def test_sharded_torch_files(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    hf.config.save_pretrained(tmp_path)
    state = hf.state_dict()
    names = sorted(state)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, keys in halves.items():
        torch.save({key: state[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(hf_weights(load(tmp_path)), state)


def test_a_torch_file_cannot_run_code(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    hf.config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated, damaged or unsafe"):
        load(tmp_path)


def test_tied_embeddings_share_memory_and_a_copy_is_tolerated(tmp_path: Path) -> None:
    hf = make_hf_model("llama", tie_word_embeddings=True)
    path = save(hf, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert "lm_head.weight" not in state
    model = load(path)
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(state, file)
    again = load(path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_missing_and_unexpected_weights_are_named(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.self_attn.k_proj.weight"]
    state["model.layers.9.surprise.weight"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(ValueError, match="1 missing weight") as caught:
        load(path)
    assert "model.layers.1.self_attn.k_proj.weight" in str(caught.value)
    assert "1 unexpected weight(s): model.layers.9.surprise.weight" in str(caught.value)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing weight\(s\): lm_head\.weight"):
        load(path)


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"30 missing weight\(s\): lm_head.* and 22 more; 1 unex"):
        load(path)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "input_layernorm"])
def test_a_wrong_shape_names_the_weight(tmp_path: Path, name: str) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    full = f"model.layers.2.{name}.weight"
    state[full] = torch.zeros(3, 3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"weight {full}: "):
        load(path)


def test_a_weight_that_comes_twice(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in the checkpoint twice"):
        load(path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
            load(path)


def test_truncated_torch_file(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    hf.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(hf.state_dict(), file)
    whole = file.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_damaged_index_and_a_missing_shard(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path, max_shard_size="64KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"the index names {shard.name}, which is missing"):
        load(path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load(path)


def test_no_weights_and_wrong_formats(tmp_path: Path) -> None:
    make_hf_model("llama").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no safetensors, \.bin or \.pt files"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"no \.bin or \.pt files"):
        load(tmp_path, load_format="pt")
    with pytest.raises(ValueError, match="Hugging Face directory; --load-format gguf"):
        load(tmp_path, load_format="gguf")
    with pytest.raises(ValueError, match="unknown load format 'npz'"):
        load(tmp_path, load_format="npz")


def test_weights_are_converted_to_the_wanted_type(tmp_path: Path) -> None:
    hf = make_hf_model("qwen3")
    model = load(save(hf, tmp_path), dtype=torch.bfloat16)
    halved = {name: tensor.bfloat16() for name, tensor in hf.state_dict().items()}
    assert_same(hf_weights(model), halved)


def test_ranks_together_hold_the_model(tmp_path: Path) -> None:
    hf = make_hf_model("qwen2")
    path = save(hf, tmp_path)
    ranks = [load(path, parallel=ParallelState(rank, 2)) for rank in range(2)]
    state = hf.state_dict()
    prefix = "model.layers.1."
    for name, dim in [("self_attn.o_proj.weight", 1), ("mlp.down_proj.weight", 1)]:
        parts = [rank.get_parameter(prefix + name) for rank in ranks]
        assert torch.equal(torch.cat(parts, dim), state[prefix + name])
    for kind in ("weight", "bias"):
        parts = [rank.get_parameter(f"{prefix}self_attn.qkv_proj.{kind}") for rank in ranks]
        q, k, v = (
            torch.cat(pieces)
            for pieces in zip(*(torch.split(part, [32, 16, 16]) for part in parts), strict=True)
        )
        for leaf, whole in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            assert torch.equal(whole, state[f"{prefix}self_attn.{leaf}.{kind}"])


class _Allocations(TorchDispatchMode):
    """Notes the storages that operations make, by address; views of `known` tensors make none."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: dict[int, int] = {}  # the largest at each address, in bytes

    def know(self, tensor: torch.Tensor) -> None:
        """This one is a window on a file."""
        self._known.add(tensor.untyped_storage().data_ptr())
        self.made.pop(tensor.untyped_storage().data_ptr(), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            at = storage.data_ptr()
            if at not in self._known:
                self.made[at] = max(self.made.get(at, 0), storage.nbytes())
        return result


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "llama4", "gpt_oss"])
def test_a_rank_holds_its_own_slices_and_no_whole_tensor(tmp_path: Path, family: str) -> None:
    """What the files give are windows on them; what is made of these is no larger than a part."""
    path = save(make_hf_model(family), tmp_path)
    config = ModelConfig.from_path(path)
    model = resolve_model_class(config.architecture)(config, ParallelState(1, 4), torch.float32)
    watch = _Allocations(list(model.parameters()))
    largest_whole = 0

    def windows() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal largest_whole
        for name, tensor in open_weights(config, "safetensors", torch.float32).weights:
            assert isinstance(tensor, torch.Tensor)
            maps = Path("/proc/self/maps").read_text().splitlines()
            ranges = [line.split()[0].split("-") for line in maps if path in line]
            at = tensor.data_ptr()
            assert any(int(first, 16) <= at < int(last, 16) for first, last in ranges), name
            watch.know(tensor)
            largest_whole = max(largest_whole, tensor.nbytes)
            yield name, tensor

    with watch, torch.no_grad():
        model.load_weights(windows())
    assert max(watch.made.values(), default=0) * 2 <= largest_whole


def test_pages_of_a_file_go_with_their_tensor_and_come_back_by_reading(tmp_path: Path) -> None:
    tensors = {name: torch.randn(1 << 10, 1 << 10) for name in ("a", "b")}
    save_file(tensors, tmp_path / "model.safetensors")
    given = []
    for name, tensor in safetensors_weights([tmp_path / "model.safetensors"]).weights:
        for _, before in given:
            assert mapped_bytes(before) < tensor.nbytes // 8, "no more than its edges"
        assert torch.equal(tensor, tensors[name])
        assert mapped_bytes(tensor) > tensor.nbytes // 2
        given.append((name, tensor))
    assert [name for name, _ in given] == ["a", "b"]
    for name, tensor in given:
        assert torch.equal(tensor, tensors[name]), "read again"


def test_tensors_of_several_files_by_name(tmp_path: Path) -> None:
    tensors = {name: torch.randn(1 << 10, 1 << 10) for name in ("a", "b", "c")}
    for file, names in (("1.safetensors", ("a", "c")), ("2.safetensors", ("b",))):
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    index = SafetensorsIndex(sorted(tmp_path.glob("*.safetensors")))
    assert sorted(index.names) == ["a", "b", "c"]
    kept = {}
    for names in (("b", "a"), ("c",), ("a",)):
        with index.read(names) as found:
            assert list(found) == list(names)
            for name, tensor in found.items():
                assert torch.equal(tensor, tensors[name])
                assert mapped_bytes(tensor) > tensor.nbytes // 2
            kept.update(found)
        for tensor in kept.values():
            assert mapped_bytes(tensor) < tensor.nbytes // 8, "no more than its edges"


def mapped_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's pages that this process has in its page table."""
    page = mmap.PAGESIZE
    first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.nbytes) // page)
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(8 * first)
        entries = np.frombuffer(table.read(8 * (last - first)), dtype=np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * page


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    hf = make_hf_model("qwen2")
    hf.config.architectures = ["Qwen2ForCausalLM"]
    hf.config.save_pretrained(tmp_path)  # no weight file at all
    one, same = (load(tmp_path, load_format="dummy", seed=1) for _ in range(2))
    other = load(tmp_path, load_format="dummy", seed=2)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name
        assert parameter.isfinite().all()
    name = "model.layers.0.mlp.down_proj.weight"
    weight = one.get_parameter(name)
    assert not torch.equal(weight, other.get_parameter(name))
    assert 0.015 < float(weight.std()) < 0.025
    assert torch.equal(one.get_parameter("model.norm.weight"), torch.ones(64))
    assert not one.get_parameter("model.layers.0.self_attn.qkv_proj.bias").any()


def test_progress_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    capsys.readouterr()
    load(path, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Loading weights: 100%" in shown.err
    assert "30/30" in shown.err
