"""The weight that a module's quantized tensors stand for: (code - zero point) · scale.

A code is a stored value. Blocks of rows and columns share a scale and a zero point. Sources:
compressed-tensors (`pack_quantized/helpers.py`), AutoAWQ (`utils/packing_utils.py`), GPTQModel
(`convert_gptq_v1_to_v2_format_module`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.errors import ModelUnsupported
from replica.model.quantization import Layout, Quantization

_ROWS = 512
"""Rows computed at once, which bounds the memory for their values in float32."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
# Where AWQ packs each of 8 neighbours, counted from the lowest bits.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class _Parts:
    """codes: [out_features, in_features]. scales, zeros: in float32, one for each block. order: the
    block of each column; None: blocks are consecutive.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StoredModule:
    """name: for errors. take: gives a tensor by the last part of its name, or None."""

    name: str
    quantization: Quantization
    take: Callable[[str], torch.Tensor | None]

    def weight(self, size: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        """Computed in float32 and rounded once. size: (out_features, in_features); None: as its
        tensors say. Raises ModelUnsupported naming a tensor that is missing or contradicts
        `config.json`.
        """
        parts, of = self._parts(size), self.quantization.block
        if size is None:
            size = self._matrix("codes", parts.codes)
        block = (of[0] or size[0], of[1] or size[1])
        self._check_parts(parts, size, (-(-size[0] // block[0]), -(-size[1] // block[1])))

        def spread(blocks: torch.Tensor) -> torch.Tensor:
            """[rows, blocks] → [rows, in_features]"""
            if parts.order is not None:
                return blocks.index_select(1, parts.order)
            return blocks[..., None].expand(-1, -1, block[1]).flatten(1)[:, : size[1]]

        weight = torch.empty(size, dtype=dtype, device=parts.codes.device)
        for start in range(0, size[0], _ROWS):
            values = parts.codes[start : start + _ROWS].float()
            rows = torch.arange(start, start + len(values), device=weight.device) // block[0]
            if parts.zeros is not None:
                values -= spread(parts.zeros[rows])
            values *= spread(parts.scales[rows])
            if not values.isfinite().all():
                raise self._refused("not all of its values are finite")
            weight[start : start + _ROWS] = values
        return weight

    def _check_parts(self, parts: _Parts, size: tuple[int, int], grid: tuple[int, int]) -> None:
        self._check("codes", parts.codes, size)
        self._check("scales", parts.scales, grid)
        if parts.zeros is not None:
            self._check("zero points", parts.zeros, grid)
        if parts.order is not None:
            self._check("groups of columns", parts.order, (size[1],))
            if parts.order.min() < 0 or parts.order.max() >= grid[1]:
                raise self._refused(f"a column's group is not one of {grid[1]}")

    def _parts(self, size: tuple[int, int] | None) -> _Parts:
        bits = self.quantization.bits
        match self.quantization.layout:
            case Layout.AWQ:
                return self._awq()
            case Layout.GPTQ:
                return self._gptq(bits)
            case Layout.PACKED:
                return self._packed(bits, size)
        scales = self._take("weight_scale_inv", *_FLOATS)
        if scales is None:
            scales = self._need("weight_scale", *_FLOATS)
        zeros = None
        if self.quantization.has_zeros:
            zeros = _grid(self._need("weight_zero_point", torch.int8))
        fp8 = self.quantization.layout is Layout.FP8
        codes = self._need("weight", torch.float8_e4m3fn if fp8 else torch.int8)
        return _Parts(codes, _grid(scales), zeros, self._order("weight_g_idx"))

    def _packed(self, bits: int, size: tuple[int, int] | None) -> _Parts:
        """Codes and zero points are stored plus 2 ** (bits - 1)."""
        scales = _grid(self._need("weight_scale", *_FLOATS))
        shape = self._need("weight_shape", torch.int64, torch.int32)
        found = shape.flatten().tolist()
        if len(found) != 2 or found != [*(size or found)]:
            right = "not that of a matrix" if size is None else f"config.json says {size}"
            raise self._refused(f"weight_shape is {shape.tolist()}, {right}")
        outputs, inputs = found
        if self.quantization.has_zeros:
            packed = self._words("weight_zero_point")
            zeros = _unpacked(packed.T, bits)[:, :outputs].T.float()
        else:
            zeros = torch.full_like(scales, 2 ** (bits - 1))
        codes = _unpacked(self._words("weight_packed"), bits)
        if not inputs <= codes.shape[1] < inputs + 32 // bits:
            raise self._refused(f"weight_packed has {codes.shape[1]} columns, not {inputs}")
        return _Parts(codes[:, :inputs], scales, zeros, self._order("weight_g_idx"))

    def _awq(self) -> _Parts:
        def values(name: str) -> torch.Tensor:
            """[rows, outputs]"""
            packed = _unpacked(self._words(name), 4)
            return packed.view(len(packed), -1, 8)[..., _AWQ_PLACES].flatten(1)

        scales = _grid(self._need("scales", *_FLOATS))
        return _Parts(values("qweight").T, scales.T, values("qzeros").T.float())

    def _gptq(self, bits: int) -> _Parts:
        scales = _grid(self._need("scales", *_FLOATS))
        zeros = self._words("qzeros")
        if self.quantization.zeros_less_one:
            # Writers subtract from whole words, so a zero point of 0 borrows from its neighbour.
            zeros = zeros + sum(1 << shift for shift in range(0, 32, bits))
        codes = _unpacked(self._words("qweight").T, bits)
        # Stored without `desc_act` too.
        order = self._order("g_idx")
        if order is None:
            order = self._take("g_idx", *_INTEGERS)
        return _Parts(codes, scales.T, _unpacked(zeros, bits).T.float(), order)

    def _order(self, name: str) -> torch.Tensor | None:
        return self._need(name, *_INTEGERS) if self.quantization.has_order else None

    def _need(self, name: str, *dtypes: torch.dtype) -> torch.Tensor:
        tensor = self._take(name, *dtypes)
        if tensor is None:
            raise self._refused(f"no tensor {name!r}")
        return tensor

    def _take(self, name: str, *dtypes: torch.dtype) -> torch.Tensor | None:
        tensor = self.take(name)
        if tensor is not None and tensor.dtype not in dtypes:
            raise self._refused(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
        return tensor

    def _words(self, name: str) -> torch.Tensor:
        """A matrix of packed values."""
        tensor = self._need(name, torch.int32)
        self._matrix(name, tensor)
        return tensor

    def _matrix(self, name: str, tensor: torch.Tensor) -> tuple[int, int]:
        if tensor.dim() != 2 or not tensor.numel():
            raise self._refused(f"{name} has shape {tuple(tensor.shape)}, not that of a matrix")
        return tensor.shape[0], tensor.shape[1]

    def _check(self, what: str, tensor: torch.Tensor, size: tuple[int, ...]) -> None:
        if tensor.shape != size:
            found = tuple(tensor.shape)
            raise self._refused(f"{what} have shape {found}, config.json says {size}")

    def _refused(self, why: str) -> ModelUnsupported:
        return ModelUnsupported(f"{self.name}: {why}", field="model")


def _grid(blocks: torch.Tensor) -> torch.Tensor:
    """A number for a whole tensor may be stored without dimensions."""
    return (blocks.view(1, 1) if blocks.numel() == 1 else blocks).float()


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned values of `bits` (4 or 8) bits, from the lowest bits of each int32 up: [rows, words]
    → [rows, words · 32 / bits].
    """
    parts = packed.contiguous().view(torch.uint8)  # safetensors are little-endian, as are our CPUs
    return parts if bits == 8 else torch.stack((parts & 15, parts >> 4), -1).flatten(1)
