"""How a checkpoint's weights are quantized, read from its `config.json` without torch.

Only weights matter here: where a checkpoint quantizes activations too (W8A8), they are computed in
the engine's dtype all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from cluster.errors import ModelUnsupported

Block = tuple[int | None, int | None]
_STEP = "use a checkpoint that is not quantized, or quantized in another way"


class Layout(Enum):
    """What a module stores, by the last part of its tensors' names.

    INT8    weight in int8, weight_scale
    FP8     weight in fp8, weight_scale or weight_scale_inv
    PACKED  weight_packed, weight_scale, weight_shape
    AWQ     qweight [in, packed out], qzeros, scales
    GPTQ    qweight [packed in, out], qzeros, scales, g_idx
    """

    INT8 = "int8"
    FP8 = "fp8"
    PACKED = "packed"
    AWQ = "awq"
    GPTQ = "gptq"

    @property
    def codes(self) -> str:
        """The tensor of quantized values."""
        match self:
            case Layout.PACKED:
                return "weight_packed"
            case Layout.AWQ | Layout.GPTQ:
                return "qweight"
        return "weight"


@dataclass(frozen=True, slots=True)
class Quantization:
    """block: rows and columns of a weight that share a scale; None: all of them.
    has_zeros: zero points are stored. zeros_less_one: each is stored less 1.
    has_order: the group of each column is stored.
    stored_bytes: size of the checkpoint's files.
    """

    method: str
    layout: Layout
    bits: int
    block: Block
    has_zeros: bool = False
    zeros_less_one: bool = False
    has_order: bool = False
    stored_bytes: int = 0


def read_quantization(config: Mapping[str, Any], model_dir: str) -> Quantization | None:
    """config: content of `config.json`. None if the checkpoint is not quantized. Raises
    ModelUnsupported naming what is not supported.
    """
    where, given = f"{Path(model_dir) / 'config.json'}", config.get("quantization_config")
    if given is None:
        return None
    method = str(given.get("quant_method", "unknown") if isinstance(given, Mapping) else given)
    if method not in _METHODS or not isinstance(given, Mapping):
        raise ModelUnsupported(
            f"{where}: quantization {method!r} is not supported "
            f"(supported: {', '.join(_METHODS)}): {_STEP}",
            field="model",
        )
    fields = _Fields(f"{where}: quantization_config", given)
    for name in ("kv_cache_scheme", "transform_config", "adapter"):
        if given.get(name):
            raise fields.refused(f"{name} is not supported: {_STEP}")
    stored = sum(file.stat().st_size for file in Path(model_dir).glob("*.safetensors"))
    return replace(_METHODS[method](fields), stored_bytes=stored)


@dataclass(frozen=True, slots=True)
class _Fields:
    """A mapping of the configuration. Its methods raise ModelUnsupported naming a field."""

    where: str
    values: Mapping[str, Any]

    def one_of(self, name: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        found = self.values.get(name)
        found = default if found is None else found
        if found not in supported:
            choices = ", ".join(map(str, supported))
            raise self.refused(f"{name} {found!r} is not supported (supported: {choices}): {_STEP}")
        return found

    def group(self, default: int | None = None) -> int | None:
        """Columns that share a scale; None: all."""
        size = self.values.get("group_size", default)
        if size != -1 and not _is_size(size):
            raise self.refused(f"group_size {size!r} is neither a positive integer nor -1")
        return None if size == -1 else int(size)

    def block(self, name: str) -> Block:
        size = self.values.get(name)
        if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(_is_size, size)):
            raise self.refused(f"{name} {size!r} are not two positive integers")
        return size[0], size[1]

    def mapping(self, name: str) -> "_Fields":
        found = self.values.get(name)
        if not isinstance(found, Mapping):
            raise self.refused(f"{name} {found!r} is not a mapping")
        return _Fields(f"{self.where}: {name}", found)

    def refused(self, why: str) -> ModelUnsupported:
        return ModelUnsupported(f"{self.where}: {why}", field="model")


def _awq(fields: _Fields) -> Quantization:
    fields.one_of("version", ("gemm", "GEMM"), fields.values.get("format", "gemm"))
    fields.one_of("zero_point", (True,), True)
    fields.one_of("backend", ("auto", "autoawq"), "auto")
    bits = fields.one_of("bits", (4,), 4)
    return Quantization("awq", Layout.AWQ, bits, (1, fields.group(128)), has_zeros=True)


def _gptq(fields: _Fields) -> Quantization:
    version = fields.values.get("format", "gptq")
    version = fields.one_of("checkpoint_format", ("gptq", "gptq_v2"), version)
    fields.one_of("is_marlin_format", (False,), False)
    dynamic = fields.values.get("dynamic") or {}
    for pattern in dynamic if isinstance(dynamic, Mapping) else [dynamic]:
        if not str(pattern).startswith("-:"):  # those leave modules as they are
            raise fields.refused(f"dynamic {pattern!r} is not supported: {_STEP}")
    return Quantization(
        method="gptq",
        layout=Layout.GPTQ,
        bits=fields.one_of("bits", (4, 8)),
        block=(1, fields.group(128)),
        has_zeros=True,
        zeros_less_one=version == "gptq",
        has_order=bool(fields.values.get("desc_act")),
    )


def _fp8(fields: _Fields) -> Quantization:
    fields.one_of("fmt", ("e4m3",), "e4m3")
    whole = fields.values.get("weight_block_size") is None
    block = (None, None) if whole else fields.block("weight_block_size")
    return Quantization("fp8", Layout.FP8, 8, block)


def _compressed_tensors(fields: _Fields) -> Quantization:
    if fields.values.get("sparsity_config"):
        fields.mapping("sparsity_config").one_of("format", ("dense",), "dense")
    groups = fields.mapping("config_groups")
    found = {_config_group(fields, groups.mapping(name)) for name in groups.values}
    if len(found) != 1:
        names = ", ".join(groups.values) or "none"
        raise groups.refused(f"{names}: only one way to quantize weights is supported: {_STEP}")
    return found.pop()


def _config_group(fields: _Fields, group: _Fields) -> Quantization:
    stored = group.one_of("format", tuple(_TYPES), fields.values.get("format"))
    weights = group.mapping("weights")
    kind = weights.one_of("type", _TYPES[stored], "int")
    weights.one_of("dynamic", (False,), False)
    order = weights.one_of("actorder", (*_ORDERED, False, "weight", "static"), False)
    return Quantization(
        method="compressed-tensors",
        layout=_LAYOUTS.get(stored, _LAYOUTS[kind]),
        bits=weights.one_of("num_bits", (8,) if kind == "float" else (4, 8)),
        block=_strategy(weights),
        has_zeros=not weights.values.get("symmetric", True),
        has_order=order in _ORDERED,
    )


def _strategy(weights: _Fields) -> Block:
    size = weights.values.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    match weights.one_of("strategy", ("tensor", "channel", "group", "block"), implied):
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, weights.group()
    return weights.block("block_structure")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


_METHODS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
}
# Formats of compressed-tensors → the types of values they may have.
_TYPES = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
_LAYOUTS = {"pack-quantized": Layout.PACKED, "int": Layout.INT8, "float": Layout.FP8}
_ORDERED = (True, "group", "dynamic")
