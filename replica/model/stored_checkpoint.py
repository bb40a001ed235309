"""The tensors of an HF checkpoint's safetensors, dequantized where they are quantized."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import ModelUnsupported
from replica.model.dequantization import StoredModule
from replica.model.quantization import Layout, Quantization

_PLAIN_TYPES = ("F32", "BF16", "F16", "F64")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")
"""Tensors of quantized modules that have no use here: activations are not quantized."""


class Source(Protocol):
    """Tensors by name: a checkpoint's, or random ones."""

    def holds(self, name: str) -> bool: ...

    def take(
        self, name: str, size: tuple[int, ...], part: tuple[slice, ...] = ()
    ) -> torch.Tensor: ...

    def skip(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Later:
    """A tensor that is read when it is indexed, as transformers indexes a file's slices. It does so
    in threads, which safetensors' files are not made for, hence the lock.
    """

    read: Callable[[], torch.Tensor]
    lock: threading.Lock

    def __getitem__(self, _: object) -> torch.Tensor:
        with self.lock:
            return self.read()


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
        self._files, self._reading = ExitStack(), threading.Lock()
        self._where = {name: file for file, names in self._open() for name in names}
        self._kinds = {name.rpartition(".")[2] for name in self._where} - {"bias"}

    def _open(self) -> Iterator[tuple[safe_open, list[str]]]:
        for name in _file_names(self._path):
            if not (self._path / name).is_file():
                raise ModelUnsupported(
                    f"{self._path}: no {name}{_instead(self._path)}", field="model"
                )
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
        with self._reading:  # after an error, transformers' threads may go on
            self._files.close()

    def holds(self, name: str) -> bool:
        """True if the tensor is there and not taken yet."""
        return name in self._where

    def take(self, name: str, size: tuple[int, ...], part: tuple[slice, ...] = ()) -> torch.Tensor:
        """size: expected size of the whole tensor. part: a slice per dimension; () takes all."""
        if self._quantization is not None and len(size) == 2:
            module = name.removesuffix(".weight")
            if self._is_quantized(module, self._quantization):
                weight = self._dequantized(module, self._quantization, (size[0], size[1]))
                return weight if is_whole(part) else weight[part].clone()
        return self._plain(name, size, part).to(self._device, self._dtype)

    def all_later(self) -> dict[str, Later]:
        """What a checkpoint that is not quantized would store, by name. Of a quantized module, its
        weight and bias; other tensors as they are stored.
        """
        found = {}
        for name in sorted(self._where):
            module, _, kind = name.rpartition(".")
            scheme = self._quantization
            if scheme is None or kind == "bias" or not self._is_quantized(module, scheme):
                found[name] = Later(partial(self._plain, name), self._reading)
            else:
                read = partial(self._dequantized, module, scheme)
                found[f"{module}.weight"] = Later(read, self._reading)
        return found

    def _plain(
        self, name: str, size: tuple[int, ...] | None = None, part: tuple[slice, ...] = ()
    ) -> torch.Tensor:
        """As it is stored. size, part: as for `take`; None: any."""
        file = self._where.pop(name, None)
        if file is None:
            raise ModelUnsupported(f"{self._path}: no tensor {name!r}", field="model")
        stored = file.get_slice(name)  # type: ignore[no-untyped-call]
        found = tuple(stored.get_shape())
        if size is not None and found != size:
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
        return tensor

    def _is_quantized(self, module: str, quantization: Quantization) -> bool:
        """False for modules that a checkpoint leaves as they were."""
        codes = quantization.layout.codes
        name = f"{module}.{codes}"
        if name not in self._where or codes != "weight":
            return name in self._where
        stored = self._where[name].get_slice(name)  # type: ignore[no-untyped-call]
        return stored.get_dtype() not in _PLAIN_TYPES

    def _dequantized(
        self, module: str, quantization: Quantization, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """size: as for `StoredModule.weight`."""

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
        weight = stored.weight(size, self._dtype)
        for kind in sorted(self._kinds):
            if f"{module}.{kind}" in self._where:
                raise self._unknown(f"{module}.{kind}")
        return weight

    def skip(self, name: str) -> None:
        """Marks a tensor, which may be absent, as known but unused."""
        self._where.pop(name, None)

    def check_empty(self) -> None:
        """Raises ModelUnsupported if a tensor remains: this decoder would ignore it, and its
        outputs would be wrong.
        """
        self._skip_zero_biases()
        if self._where:
            raise self._unknown(min(self._where))

    def has_bias(self) -> bool:
        """True if a bias remains."""
        self._skip_zero_biases()
        return any(name.endswith(".bias") for name in self._where)

    def _unknown(self, name: str) -> ModelUnsupported:
        return ModelUnsupported(
            f"{self._path}: tensor {name!r} is not part of the architecture", field="model"
        )

    def _skip_zero_biases(self) -> None:
        """AutoGPTQ writes a bias of zeros for modules that have none."""
        if self._quantization is None or self._quantization.layout is not Layout.GPTQ:
            return
        for name in [name for name in self._where if name.endswith(".bias")]:
            if not self._where[name].get_tensor(name).any():  # type: ignore[no-untyped-call]
                self.skip(name)


def _instead(path: Path) -> str:
    """Weights in another form that are there, and what to do."""
    found = sorted(each.name for each in path.glob("*") if each.suffix in (".bin", ".pt", ".pth"))
    weights = [name for name in found if name.startswith(("pytorch_model", "consolidated"))]
    if not weights:
        return ""
    return f", but {weights[0]}; load it with transformers and save it with save_pretrained"


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
