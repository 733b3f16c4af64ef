"""move_to_huge_pages: where weights lie afterwards, and that they are the same."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sglang.srt.layers.quantization.matrix import QuantizedMatrix
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.model_loader.huge_pages import move_to_huge_pages
from sglang.srt.utils.native import native_kernels

HUGE = 2 << 20


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            low, high = (int(end, 16) for end in key.split("-"))
            inside = low <= address < high
        elif inside and key == "VmFlags:":
            return rest
    raise AssertionError(f"nothing is mapped at {address:#x}")


def owners(*shapes: tuple[int, int]) -> nn.ModuleList:
    model = nn.ModuleList(WeightOwner(*shape, torch.bfloat16) for shape in shapes)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def test_parameters_share_advised_memory_that_begins_with_a_huge_page() -> None:
    model = owners((2000, 999), (3, 5), (500, 64))
    shapes = [parameter.shape for parameter in model.parameters()]
    assert move_to_huge_pages(model, copy=False) == 3_996_032 + 64 + 64_000
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert addresses[0] % HUGE == 0
    assert [address - addresses[0] for address in addresses] == [0, 3_996_032, 3_996_096]
    assert [parameter.shape for parameter in model.parameters()] == shapes
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert all("hg" in flags_at(address) for address in addresses)


def test_copies_are_the_same() -> None:
    model = owners((2000, 999), (700, 64))
    before = [parameter.data.clone() for parameter in model.parameters()]
    assert move_to_huge_pages(model, copy=True)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.data, old)


def test_less_than_a_huge_page_stays_where_it_is() -> None:
    model = owners((100, 100))
    address = next(model.parameters()).data_ptr()
    assert move_to_huge_pages(model, copy=True) == 0
    assert next(model.parameters()).data_ptr() == address


@pytest.mark.parametrize("with_mins", [False, True])
def test_codes_move_with_their_scales(with_mins: bool) -> None:
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    codes = torch.randint(-128, 128, (5000, 512), dtype=torch.int8)
    scales = torch.rand(5000, 16).half()
    # rows of a wider weight: neither codes nor scales lie in one piece
    weight = kernels.QuantizedWeight(codes, scales, -scales if with_mins else None)
    model = owners((16, 480))
    matrix = QuantizedMatrix([weight.columns(32, 512)])
    owner = model[0]
    assert isinstance(owner, WeightOwner)
    owner.quantized = matrix
    x = torch.randn(3, 480)
    before, old = matrix.product(x), [tensor.data_ptr() for tensor in matrix.tensors()]
    used = move_to_huge_pages(model, copy=True)
    assert used >= matrix.nbytes > 0
    assert all(tensor.is_contiguous() for tensor in matrix.tensors())
    assert not {tensor.data_ptr() for tensor in matrix.tensors()} & set(old)
    assert torch.equal(matrix.product(x), before)
