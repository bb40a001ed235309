"""The tensors of an HF checkpoint's safetensors, dequantized where they are quantized."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import ModelUnsupported
from replica.model.dequantization import StoredModule
from replica.model.quantization import Layout, Quantization

_PLAIN_TYPES = ("F32", "BF16", "F16", "F64")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")
"""Tensors of quantized modules that have no use here: activations are not quantized."""


class StoredCheckpoint:
    """The tensors of a directory. Each is taken once, so that unknown tensors remain."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
    ) -> None:
        self._path, self._dtype, self._device = path, dtype, device
        self._quantization = quantization
        self._files = ExitStack()
        self._where = {name: file for file, names in self._open() for name in names}

    def _open(self) -> Iterator[tuple[safe_open, list[str]]]:
        for name in _file_names(self._path):
            if not (self._path / name).is_file():
                raise ModelUnsupported(f"{self._path}: no {name}", field="model")
            try:
                file = self._files.enter_context(safe_open(self._path / name, framework="pt"))
            except SafetensorError as error:
                raise ModelUnsupported(f"{self._path / name}: {error}", field="model") from error
            yield file, list(file.keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def take(self, name: str, size: tuple[int, ...], part: tuple[slice, ...] = ()) -> torch.Tensor:
        """size: expected size of the whole tensor. part: a slice per dimension; () takes all."""
        if self._quantization is not None and len(size) == 2:
            module = name.removesuffix(".weight")
            if self._is_quantized(module, self._quantization):
                weight = self._dequantized(module, self._quantization, (size[0], size[1]))
                return weight if is_whole(part) else weight[part].clone()
        file = self._where.pop(name, None)
        if file is None:
            raise ModelUnsupported(f"{self._path}: no tensor {name!r}", field="model")
        stored = file.get_slice(name)  # type: ignore[no-untyped-call]
        found = tuple(stored.get_shape())
        if found != size:
            raise ModelUnsupported(
                f"{self._path}: tensor {name!r} has shape {found}, config.json says {size}",
                field="model",
            )
        if stored.get_dtype() not in _PLAIN_TYPES:
            raise ModelUnsupported(
                f"{self._path}: tensor {name!r} is {stored.get_dtype()}, and config.json does not "
                "say how it is quantized",
                field="model",
            )
        tensor: torch.Tensor
        if is_whole(part):
            tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
        else:
            tensor = stored[part]
        return tensor.to(self._device, self._dtype)

    def _is_quantized(self, module: str, quantization: Quantization) -> bool:
        """False for modules that a checkpoint leaves as they were."""
        codes = quantization.layout.codes
        name = f"{module}.{codes}"
        if name not in self._where or codes != "weight":
            return name in self._where
        stored = self._where[name].get_slice(name)  # type: ignore[no-untyped-call]
        return stored.get_dtype() not in _PLAIN_TYPES

    def _dequantized(
        self, module: str, quantization: Quantization, size: tuple[int, int]
    ) -> torch.Tensor:
        def take(kind: str) -> torch.Tensor | None:
            file = self._where.pop(f"{module}.{kind}", None)
            if file is None:
                return None
            tensor: torch.Tensor
            tensor = file.get_tensor(f"{module}.{kind}")  # type: ignore[no-untyped-call]
            return tensor.to(self._device)

        for kind in _OF_ACTIVATIONS:
            self.skip(f"{module}.{kind}")
        stored = StoredModule(f"{self._path}: {module}", quantization, take)
        return stored.weight(size, self._dtype)

    def skip(self, name: str) -> None:
        """Marks a tensor, which may be absent, as known but unused."""
        self._where.pop(name, None)

    def check_empty(self) -> None:
        """Raises ModelUnsupported if a tensor remains: this decoder would ignore it, and its
        outputs would be wrong.
        """
        if self._quantization is not None and self._quantization.layout is Layout.GPTQ:
            self._skip_zero_biases()
        if self._where:
            raise ModelUnsupported(
                f"{self._path}: tensor {min(self._where)!r} is not part of the architecture",
                field="model",
            )

    def _skip_zero_biases(self) -> None:
        """AutoGPTQ writes a bias of zeros for modules that have none."""
        for name in [name for name in self._where if name.endswith(".bias")]:
            if not self._where[name].get_tensor(name).any():  # type: ignore[no-untyped-call]
                self.skip(name)


def is_whole(part: tuple[slice, ...]) -> bool:
    return all(cut == slice(None) for cut in part)


def _file_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnsupported(f"{index}: {error!r}", field="model") from error
