"""A module's packed integers, by who wrote them: GPTQ, AWQ, compressed-tensors.

Called by weight_forms.py with the tensors of one module by role. What doesn't fit raises ValueError
that names the tensor; layers/quantization/grouped_integers.py computes.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from sglang.srt.configs.quantization_config import WeightScheme
from sglang.srt.layers.quantization.grouped_integers import GroupedIntegers, unpack, unpack_awq

_AWQ_COLUMNS = 8  # of one word


def open_gptq(
    scheme: WeightScheme, module: str, tensors: Mapping[str, torch.Tensor]
) -> GroupedIntegers:
    """`qweight` int32 [K * bits / 32, N], `qzeros` int32 [G, N * bits / 32], `scales` [G, N].

    `g_idx` [K] is each input's group. Zeros are stored less `scheme.zero_offset`.
    """
    qweight, qzeros, scales = _parts(module, tensors, "qweight", "qzeros", "scales")
    _check_scales(f"{module}.scales", scales)
    groups, rows = scales.shape
    bits = next((b for b in (4, 8) if tuple(qzeros.shape) == (groups, rows * b // 32)), None)
    if bits is None or qzeros.dtype is not torch.int32:
        raise ValueError(f"weight {module}.qzeros: {_told(qzeros)} does not fit {_told(scales)}")
    if scheme.bits is not None and bits != scheme.bits:
        raise ValueError(f"weight {module}.qzeros: {bits} bits, config.json says {scheme.bits}")
    if qweight.dtype is not torch.int32 or qweight.dim() != 2 or qweight.shape[1] != rows:
        raise ValueError(f"weight {module}.qweight: {_told(qweight)} does not fit {_told(scales)}")
    width = qweight.shape[0] * 32 // bits
    group = _group(f"{module}.scales", scheme, width, groups)
    order = _order(f"{module}.g_idx", tensors.get("g_idx"), width, group, groups)
    if scheme.ordered and "g_idx" not in tensors:
        raise ValueError(f"weight {module}.g_idx is missing")
    zeros = unpack(qzeros, bits).short() + scheme.zero_offset

    def codes(first: int, last: int) -> torch.Tensor:
        return unpack(qweight[:, first:last].t(), bits)

    return GroupedIntegers((rows, width), bits, codes, scales.t(), zeros.t(), group, order)


def open_awq(
    scheme: WeightScheme, module: str, tensors: Mapping[str, torch.Tensor]
) -> GroupedIntegers:
    """`qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales` [G, N]; four bits."""
    qweight, qzeros, scales = _parts(module, tensors, "qweight", "qzeros", "scales")
    _check_scales(f"{module}.scales", scales)
    groups, rows = scales.shape
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        fits = words.dim() == 2 and words.shape[1] * _AWQ_COLUMNS == rows
        if words.dtype is not torch.int32 or not fits:
            raise ValueError(f"weight {module}.{name}: {_told(words)} does not fit {_told(scales)}")
    if len(qzeros) != groups:
        raise ValueError(f"weight {module}.qzeros: {_told(qzeros)} does not fit {_told(scales)}")
    width = len(qweight)
    group = _group(f"{module}.scales", scheme, width, groups)

    def codes(first: int, last: int) -> torch.Tensor:
        begin = first // _AWQ_COLUMNS
        some = unpack_awq(qweight[:, begin : -(-last // _AWQ_COLUMNS)])
        skipped = begin * _AWQ_COLUMNS
        return some[:, first - skipped : last - skipped].t().contiguous()

    zeros = unpack_awq(qzeros).short()
    return GroupedIntegers((rows, width), 4, codes, scales.t(), zeros.t(), group)


def open_packed(module: str, tensors: Mapping[str, torch.Tensor]) -> GroupedIntegers:
    """compressed-tensors' pack-quantized: `weight_packed` int32 [N, ceil(K * bits / 32)].

    `weight_scale` [N, G] or one number; `weight_shape` (N, K); `weight_zero_point`, where zeros are
    not all the middle, is packed along N. Codes and zeros are stored plus the middle.
    """
    packed, scales, shape = _parts(module, tensors, "weight_packed", "weight_scale", "weight_shape")
    if shape.numel() != 2 or shape.is_floating_point():
        raise ValueError(f"weight {module}.weight_shape: {_told(shape)} is no shape")
    rows, width = (int(size) for size in shape.flatten())
    words = packed.shape[1] if packed.dim() == 2 and len(packed) == rows else 0
    bits = next((b for b in (4, 8) if words == -(-width * b // 32)), None)
    if bits is None or packed.dtype is not torch.int32:
        raise ValueError(
            f"weight {module}.weight_packed: {_told(packed)} is not {(rows, width)} of 4 or 8 bits"
        )
    scales, group = _by_row(f"{module}.weight_scale", scales, rows, width)
    groups = scales.shape[1]
    order = _order(f"{module}.weight_g_idx", tensors.get("weight_g_idx"), width, group, groups)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = _zeros(f"{module}.weight_zero_point", zeros, bits, rows, groups)

    def codes(first: int, last: int) -> torch.Tensor:
        return unpack(packed[first:last], bits)[:, :width].contiguous()

    return GroupedIntegers((rows, width), bits, codes, scales, zeros, group, order)


def open_bytes(module: str, tensors: Mapping[str, torch.Tensor]) -> GroupedIntegers:
    """compressed-tensors' int-quantized: `weight` int8 [N, K], `weight_scale` [N, G] or one number.

    `weight_zero_point` int8 like the scales, or all are 0.
    """
    weight, scales = _parts(module, tensors, "weight", "weight_scale")
    if weight.dim() != 2:
        raise ValueError(f"weight {module}.weight: {_told(weight)} is no matrix")
    rows, width = weight.shape
    scales, group = _by_row(f"{module}.weight_scale", scales, rows, width)
    groups = scales.shape[1]
    order = _order(f"{module}.weight_g_idx", tensors.get("weight_g_idx"), width, group, groups)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = _zeros(f"{module}.weight_zero_point", zeros, 8, rows, groups)

    def codes(first: int, last: int) -> torch.Tensor:
        return weight[first:last].view(torch.uint8) ^ 128

    return GroupedIntegers((rows, width), 8, codes, scales, zeros, group, order)


def _parts(module: str, tensors: Mapping[str, torch.Tensor], *roles: str) -> Iterable[torch.Tensor]:
    for role in roles:
        if role not in tensors:
            raise ValueError(f"weight {module}.{role} is missing")
    return [tensors[role] for role in roles]


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_scales(name: str, scales: torch.Tensor) -> None:
    if scales.dim() != 2 or not scales.is_floating_point() or not scales.numel():
        raise ValueError(f"weight {name}: {_told(scales)} is no scale of groups and outputs")


def _group(name: str, scheme: WeightScheme, width: int, groups: int) -> int:
    """Inputs of a group, as config.json says or, where it does not, the scales."""
    group = scheme.group or -(-width // groups)
    group = width if group < 0 else group
    if -(-width // group) != groups:
        raise ValueError(f"weight {name}: {groups} groups of {group} are not {width} inputs")
    return group


def _order(
    name: str, given: torch.Tensor | None, width: int, group: int, groups: int
) -> torch.Tensor | None:
    """Each input's group, int64 [K], None where groups follow one another."""
    if given is None:
        return None
    if tuple(given.shape) != (width,) or given.is_floating_point():
        raise ValueError(f"weight {name}: {_told(given)} is no group of {width} inputs")
    order = given.long()
    if torch.equal(order, torch.arange(width, device="cpu") // group):
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise ValueError(f"weight {name}: groups are 0 to {groups - 1}")
    return order


def _by_row(name: str, scales: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, int]:
    """Scales [N, G], and how many inputs one is for."""
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(rows, 1)
    elif scales.dim() == 1:
        scales = scales.unsqueeze(1)
    if scales.dim() != 2 or len(scales) != rows or not scales.is_floating_point():
        raise ValueError(f"weight {name}: {_told(scales)} scales no {rows} outputs")
    if width % scales.shape[1]:
        raise ValueError(f"weight {name}: {scales.shape[1]} groups are not {width} inputs")
    return scales, width // scales.shape[1]


def _zeros(name: str, given: torch.Tensor, bits: int, rows: int, groups: int) -> torch.Tensor:
    """Zeros int16 [N, G] as codes count; packed ones have outputs along 32 bits."""
    middle = 1 << bits - 1
    if given.dtype is torch.int8 and given.numel() in (1, rows * groups):
        return given.short().reshape(-1, groups).expand(rows, groups) + middle
    if given.dtype is torch.int32 and tuple(given.shape) == (-(-rows * bits // 32), groups):
        return unpack(given.t(), bits)[:, :rows].t().short()
    raise ValueError(f"weight {name}: {_told(given)} does not fit {rows} outputs, {groups} groups")
