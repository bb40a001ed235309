"""Small quantized checkpoints, each beside the fp32 checkpoint that it stands for.

Codes are packed one by one, in the loops of AutoGPTQ's `QuantLinear.pack`, AutoAWQ's
`WQLinear_GEMM.from_linear` and compressed-tensors' definition (element i at bit i · bits).
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]
Quantize = Callable[[Array], tuple[Tensors, Array]]
"""A weight [outputs, inputs] → the tensors that store it, and what they stand for."""


@dataclass(frozen=True)
class Scheme:
    config: Mapping[str, Any]
    quantize: Quantize
    architecture: str = "llama"
    bits: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_quantized(plain: str, directory: Path, scheme: Scheme, left: Sequence[str] = ()) -> str:
    """Quantizes the layers' linear modules, experts too, but those whose names contain one of
    `left`. Writes what the tensors stand for back into `plain`.
    """
    shutil.copytree(plain, directory)
    exact = load_file(Path(plain) / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in list(exact.items()):
        module, _, kind = name.rpartition(".")
        linear = kind == "weight" and ("_proj" in module or ".experts." in module)
        if not linear or any(part in module for part in left):
            stored[name] = tensor
            continue
        tensors, meant = scheme.quantize(tensor.numpy())
        stored |= {f"{module}.{last}": each for last, each in tensors.items()}
        exact[name] = torch.from_numpy(np.ascontiguousarray(meant, np.float32))
    save_file(exact, Path(plain) / "model.safetensors")
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = dict(scheme.config)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def change_tensors(model_dir: str, **tensors: torch.Tensor | None) -> None:
    """Adds or replaces tensors by name. None removes a tensor."""
    path = Path(model_dir) / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: each for name, each in held.items() if each is not None}, path)


def integers(
    weight: Array, block: tuple[int, int], least: int, most: int
) -> tuple[Array, Array, Array]:
    """Codes in [least, most], and each block's scale (float16) and zero point."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales, zeros = np.empty((rows, columns), np.float16), np.empty((rows, columns), np.int64)
    for r in range(rows):
        for c in range(columns):
            part = _block(weight, block, r, c)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scales[r, c] = (high - low) / (most - least)
            zeros[r, c] = np.clip(round(least - low / scales[r, c]), least, most)
    steps = weight / spread(scales, block, weight.shape) + spread(zeros, block, weight.shape)
    return np.clip(np.rint(steps), least, most).astype(np.int64), scales, zeros


def symmetric(weight: Array, block: tuple[int, int], most: float) -> Array:
    """Each block's scale, for codes up to `most`."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    peaks = [[abs(_block(weight, block, r, c)).max() for c in range(columns)] for r in range(rows)]
    return np.asarray(peaks, np.float32) / most


def spread(values: Array, block: tuple[int, int], size: tuple[int, ...]) -> Array:
    """Each block's value at each of its places."""
    wide = np.repeat(np.repeat(values, block[0], 0), block[1], 1)
    return wide[: size[0], : size[1]].astype(np.float32)


def _block(weight: Array, block: tuple[int, int], r: int, c: int) -> Array:
    return weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]


def words(codes: Array, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Packs each row's codes. order: a word's codes from the lowest bits up."""
    each = 32 // bits
    packed = np.zeros((len(codes), -(-codes.shape[1] // each)), np.uint32)
    for word in range(packed.shape[1]):
        for place, code in enumerate(order or range(each)):
            if word * each + code < codes.shape[1]:
                packed[:, word] |= codes[:, word * each + code].astype(np.uint32) << np.uint32(
                    bits * place
                )
    return torch.from_numpy(packed.view(np.int32).copy())


def awq(group: int | None) -> Quantize:
    def quantize(weight: Array) -> tuple[Tensors, Array]:
        block = (1, group or weight.shape[1])
        codes, scales, zeros = integers(weight, block, 0, 15)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(codes.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return tensors, (codes - spread(zeros, block, weight.shape)) * spread(
            scales, block, weight.shape
        )

    return quantize


def gptq(
    bits: int, group: int | None, *, less_one: bool = True, shuffled: bool = False
) -> Quantize:
    def quantize(weight: Array) -> tuple[Tensors, Array]:
        inputs = weight.shape[1]
        block = (1, group or inputs)
        order = np.random.default_rng(0).permutation(inputs) if shuffled else np.arange(inputs)
        # Groups are of consecutive columns in this order.
        codes, scales, zeros = integers(weight[:, order], block, 0, 2**bits - 1)
        meant = (codes - spread(zeros, block, weight.shape)) * spread(scales, block, weight.shape)
        back = np.argsort(order)
        packed = words(zeros.T, bits)
        if less_one:
            packed = packed - (0x11111111 if bits == 4 else 0x01010101)
        tensors = {
            "qweight": words(codes[:, back], bits).T.contiguous(),
            "qzeros": packed,
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy((back // block[1]).astype(np.int32)),
        }
        return tensors, meant[:, back]

    return quantize


def packed(
    bits: int, group: int | None, *, zeros: bool = False, shuffled: bool = False
) -> Quantize:
    half = 2 ** (bits - 1)

    def quantize(weight: Array) -> tuple[Tensors, Array]:
        inputs = weight.shape[1]
        block = (1, group or inputs)
        order = np.random.default_rng(0).permutation(inputs) if shuffled else np.arange(inputs)
        back = np.argsort(order)
        tensors: Tensors = {}
        if zeros:
            codes, scales, points = integers(weight[:, order], block, -half, half - 1)
            tensors["weight_zero_point"] = words((points + half).T, bits).T.contiguous()
        else:
            scales = symmetric(weight[:, order], block, half - 0.5).astype(np.float16)
            steps = np.rint(weight[:, order] / spread(scales, block, weight.shape))
            codes, points = np.clip(steps, -half, half - 1).astype(np.int64), np.zeros(scales.shape)
        meant = (codes - spread(points, block, weight.shape)) * spread(scales, block, weight.shape)
        tensors |= {
            "weight_packed": words(codes[:, back] + half, bits),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if shuffled:
            tensors["weight_g_idx"] = torch.from_numpy((back // block[1]).astype(np.int32))
        return tensors, meant[:, back]

    return quantize


def int8(*, whole: bool = False, zeros: bool = False) -> Quantize:
    def quantize(weight: Array) -> tuple[Tensors, Array]:
        block = (len(weight) if whole else 1, weight.shape[1])
        tensors: Tensors = {}
        if zeros:
            codes, half, points = integers(weight, block, -128, 127)
            tensors["weight_zero_point"] = torch.from_numpy(points.astype(np.int8))
            scales = torch.from_numpy(half)
        else:
            scales = torch.from_numpy(symmetric(weight, block, 127.0)).bfloat16()
            codes = np.rint(weight / spread(scales.float().numpy(), block, weight.shape))
            points = np.zeros(scales.shape)
        tensors["weight"] = torch.from_numpy(codes.astype(np.int8))
        tensors["weight_scale"] = scales.flatten() if whole else scales
        tensors["input_scale"] = torch.ones(1)
        meant = codes - spread(points, block, weight.shape)
        return tensors, meant * spread(scales.float().numpy(), block, weight.shape)

    return quantize


def fp8(
    given: tuple[int | None, int | None],
    name: str = "weight_scale",
    kind: torch.dtype = torch.float32,
) -> Quantize:
    """given: the block; None for all rows or columns."""

    def quantize(weight: Array) -> tuple[Tensors, Array]:
        block = (given[0] or weight.shape[0], given[1] or weight.shape[1])
        scales = torch.from_numpy(symmetric(weight, block, 448.0)).to(kind)
        wide = spread(scales.float().numpy(), block, weight.shape)
        codes = torch.from_numpy(weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {"weight": codes, name: scales[0, 0].clone() if given == (None, None) else scales}
        return tensors, codes.float().numpy() * wide

    return quantize


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    activations = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    group = {
        "targets": ["Linear"],
        "weights": args | {"group_size": None, "observer": "minmax"} | weights,
        "input_activations": None if form == "pack-quantized" else activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
SCHEMES = {
    "awq": Scheme(_AWQ, awq(32)),
    "awq, whole rows": Scheme(_AWQ | {"group_size": -1}, awq(None), "qwen2"),
    "gptq": Scheme(_GPTQ, gptq(4, 32)),
    "gptq, 8 bits": Scheme(_GPTQ | {"bits": 8}, gptq(8, 32), "mistral"),
    "gptq, whole rows": Scheme(_GPTQ | {"group_size": -1}, gptq(4, None), "qwen3"),
    "gptq, act-order": Scheme(_GPTQ | {"desc_act": True}, gptq(4, 32, shuffled=True), "qwen2"),
    "gptq_v2": Scheme(_GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 32, less_one=False)),
    "packed": Scheme(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32), packed(4, 32)
    ),
    "packed, 8 bits, channels": Scheme(
        compressed("pack-quantized", strategy="channel"), packed(8, None), "qwen3"
    ),
    "packed, asymmetric": Scheme(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        packed(4, 32, zeros=True),
        "mistral",
    ),
    "packed, act-order": Scheme(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
        packed(4, 32, shuffled=True),
    ),
    "int8": Scheme(compressed("int-quantized", strategy="channel"), int8(), "qwen2"),
    "int8, whole tensor": Scheme(compressed("int-quantized", strategy="tensor"), int8(whole=True)),
    "int8, asymmetric": Scheme(
        compressed("int-quantized", strategy="channel", symmetric=False), int8(zeros=True)
    ),
    "fp8 channels": Scheme(
        compressed("float-quantized", type="float", strategy="channel"), fp8((1, None)), "qwen3"
    ),
    "fp8 whole tensor": Scheme(
        compressed("float-quantized", type="float", strategy="tensor"), fp8((None, None))
    ),
    "fp8 blocks of compressed-tensors": Scheme(
        compressed("naive-quantized", type="float", strategy="block", block_structure=[16, 40]),
        fp8((16, 40)),
    ),
    "fp8 blocks": Scheme(
        _FP8 | {"weight_block_size": [48, 40], "fmt": "e4m3"},
        fp8((48, 40), "weight_scale_inv", torch.bfloat16),
        "qwen3",
    ),
    "fp8 of vLLM": Scheme(_FP8 | {"activation_scheme": "static"}, fp8((None, None)), "mistral"),
}
