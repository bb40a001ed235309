"""Rewrites adapters that PEFT or mlx-lm wrote in other forms as PEFT's safetensors.

    adapter_model.bin        a pickle                            ──> the same tensors
    adapters.safetensors     mlx-lm: lora_a, lora_b transposed   ──> lora_A, lora_B
    lora_A.default.weight    names with the adapter's name       ──> lora_A.weight
    lm_head.weight, …        equal to the base's vocabulary      ──> left out

The result depends on the files and the base model alone, so every replica gets the same digest.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cluster.adapter_paths import CONFIG_FILE, MLX_FILE, PICKLE_FILE, TENSORS_FILE
from cluster.file_copies import open_regular
from replica.adapters.adapter_config import only_vocabulary, read_config, refused, saves, short
from replica.adapters.pickled import rewrite
from replica.adapters.safetensors_header import (
    ELEMENT_BYTES,
    GIT_LFS_POINTER,
    HeaderInvalid,
    TensorSpan,
    header_text,
    parse_header,
    read_header,
)

_NAMED_ADAPTER = re.compile(
    r"(.*\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.default(\.weight)?"
)
_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<base>\.base_layer)?\.weight")
_MLX_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_COMPARED_ELEMENTS = 2**20
_COPIED_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write. transposed: the file has it the other way round."""

    span: TensorSpan
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape[::-1] if self.transposed else self.span.shape


def foreign(directory: str, vocabulary: Collection[str]) -> bool:
    """True if `rewritten` has something to do, as far as names tell. Reads headers only.

    vocabulary: paths of the model's embedding and head.
    """
    source = f"{directory}/{TENSORS_FILE}"
    if not os.path.exists(source):
        return True
    try:
        text, size = header_text(source)
        # Most have none of these names, and what is not parsed here is parsed once less.
        if b"\\" not in text and not any(n.encode() in text for n in (".default", *vocabulary)):
            return False
        names = parse_header(text, size).keys()
    except (HeaderInvalid, OSError):
        return False
    return any(_of_vocabulary(n, vocabulary) or _NAMED_ADAPTER.fullmatch(n) for n in names)


def rewrite_foreign(directory: str, model: str, vocabulary: Collection[str]) -> None:
    """Does nothing if the adapter has PEFT's form already. Blocking.

    directory: of copies that may be changed. model: the base model's directory.
    Raises AdapterRefused, or OSError.
    """
    target = f"{directory}/{TENSORS_FILE}"
    found = os.path.exists(target)
    if not found and os.path.exists(f"{directory}/{PICKLE_FILE}"):
        _read_pickle(f"{directory}/{PICKLE_FILE}", target)
    elif not found and os.path.exists(f"{directory}/{MLX_FILE}"):
        _read_mlx(directory)
        return
    _tidy(directory, model, vocabulary)


def _read_pickle(source: str, target: str) -> None:
    with open_regular(source) as file:
        start = file.read(len(GIT_LFS_POINTER))
    if start == GIT_LFS_POINTER:
        raise refused(source, "a Git LFS pointer: run `git lfs pull` there")
    reason = "it is empty" if not start else rewrite(source, target)
    if reason is not None:
        raise refused(
            source, f"{reason}; load it with PEFT and save it with safe_serialization=True"
        )
    os.chmod(target, 0o444)
    os.unlink(source)


def _read_mlx(directory: str) -> None:
    source, config_path = f"{directory}/{MLX_FILE}", f"{directory}/{CONFIG_FILE}"
    config = read_config(config_path)
    kind = "dora" if config.get("use_dora") else config.get("fine_tune_type", "lora")
    parameters = config.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise refused(
            config_path,
            f"mlx-lm's fine_tune_type = {short(kind)}, lora_parameters = {short(parameters)}: "
            "only lora is supported",
        )
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if (
        type(rank) is not int
        or rank < 1
        or isinstance(scale, bool)
        or not isinstance(scale, int | float)
    ):
        raise refused(config_path, f"lora_parameters: rank = {short(rank)}, scale = {short(scale)}")
    for name in ("alpha", "lora_alpha"):
        # Early mlx-lm multiplied the scale by alpha / rank, later ones do not look at it.
        if name in parameters and parameters[name] != rank:
            raise refused(
                config_path,
                f"lora_parameters: {name} = {short(parameters[name])}, rank = {rank}: another "
                f"{name} than the rank is not supported; remove it if scale alone is meant",
            )
    tensors, modules = {}, set()
    for name, span in _header(source).items():
        match = _MLX_NAME.fullmatch(name)
        if match is None or len(span.shape) != 2:
            raise refused(source, f"tensor {short(name)} is not supported")
        modules.add(match["module"])
        peft = f"base_model.model.{match['module']}.lora_{match['side'].upper()}.weight"
        tensors[peft] = _Tensor(span, transposed=True)
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(modules),
    }
    _write(directory, source, tensors, described)


def _of_vocabulary(name: str, vocabulary: Collection[str]) -> re.Match[str] | None:
    match = _WEIGHT.fullmatch(name)
    return match if match is not None and match["module"] in vocabulary else None


def _tidy(directory: str, model: str, vocabulary: Collection[str]) -> None:
    source, config_path = f"{directory}/{TENSORS_FILE}", f"{directory}/{CONFIG_FILE}"
    config = read_config(config_path)
    spans = _header(source)
    tensors: dict[str, _Tensor] = {}
    saved = config.get("modules_to_save")
    whole = only_vocabulary(config, vocabulary)
    kept: set[str] = set()
    for name, span in spans.items():
        match = _of_vocabulary(name, vocabulary)
        named = _NAMED_ADAPTER.fullmatch(name)
        if match is not None:
            module = match["module"]
            if _equals_base(source, name, span, module, model, vocabulary):
                continue
            if match["base"] or not (whole and saves(config, module, vocabulary)):
                raise refused(
                    source,
                    f"tensor {name} differs from the base model's; a trained {module} is supported "
                    "in modules_to_save alone",
                )
            kept.add(module)
        peft = named[1] + (named[2] or "") if named is not None else name
        if peft in tensors:
            raise refused(source, f"tensor {short(peft)} is there twice")
        tensors[peft] = _Tensor(span)
    changed = dict(config)
    if saved and whole:
        changed["modules_to_save"] = sorted(kept)
    if tensors.keys() != spans.keys() or changed != config:
        _write(directory, source, tensors, changed)


def _header(path: str) -> dict[str, TensorSpan]:
    try:
        return read_header(path)
    except HeaderInvalid as error:
        raise refused(path, str(error)) from error


def _write(
    directory: str, source: str, tensors: Mapping[str, _Tensor], config: Mapping[str, Any]
) -> None:
    """Replaces the adapter's files."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.span.bytes
        header[name] = {
            "dtype": tensor.span.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    new = f"{directory}/.new"
    with open_regular(source) as old, open(new, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in _data(old, tensor):
                file.write(piece)
    os.unlink(source)
    _replace(new, f"{directory}/{TENSORS_FILE}")
    Path(new).write_text(json.dumps(config))
    _replace(new, f"{directory}/{CONFIG_FILE}")


def _replace(new: str, target: str) -> None:
    os.chmod(new, 0o444)
    os.replace(new, target)


def _data(file: BinaryIO, tensor: _Tensor) -> Iterator[bytes]:
    span = tensor.span
    file.seek(span.begin)
    if tensor.transposed:
        kind = f"V{ELEMENT_BYTES[span.dtype]}"
        yield np.frombuffer(_exactly(file, span.bytes), kind).reshape(span.shape).T.tobytes()
        return
    left = span.bytes
    while left:
        piece = _exactly(file, min(left, _COPIED_BYTES))
        left -= len(piece)
        yield piece


def _exactly(file: BinaryIO, size: int) -> bytes:
    pieces = []
    while size:
        piece = file.read(size)
        if not piece:
            raise OSError("the tensors file ended early")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _equals_base(
    path: str, name: str, span: TensorSpan, module: str, model: str, vocabulary: Collection[str]
) -> bool:
    """True if it equals the base model's tensor. Raises AdapterRefused for another size."""
    file, base = _base_tensor(model, (module, *vocabulary))
    if span.shape != base.shape:
        raise refused(
            path,
            f"tensor {name}: a resized vocabulary, {list(span.shape)} instead of "
            f"{list(base.shape)}, is not supported",
        )
    if span.dtype not in _TO_FLOAT or base.dtype not in _TO_FLOAT:
        raise refused(path, f"tensor {name} is {span.dtype}, the base model's is {base.dtype}")
    with open_regular(path) as ours, open_regular(file) as theirs:
        ours.seek(span.begin)
        theirs.seek(base.begin)
        left = span.elements
        while left:
            count = min(left, _COMPARED_ELEMENTS)
            if not np.array_equal(_values(ours, span, count), _values(theirs, base, count)):
                return False
            left -= count
    return True


def _base_tensor(model: str, modules: Collection[str]) -> tuple[str, TensorSpan]:
    """The base model's file and the first module's weight in it. A tied head is the embedding."""
    for name in (f"{module}.weight" for module in modules):
        index = Path(model, "model.safetensors.index.json")
        file = "model.safetensors"
        if index.exists():
            file = json.loads(index.read_text())["weight_map"].get(name, "")
        path = str(Path(model, file))
        if file and os.path.exists(path):
            try:
                spans = read_header(path)
            except HeaderInvalid as error:
                raise refused(path, str(error)) from error
            if name in spans:
                return path, spans[name]
    raise refused(model, f"has no {next(iter(modules))}.weight in safetensors to compare with")


_Floats = npt.NDArray[np.float32]
_TO_FLOAT: Mapping[str, Callable[[bytes], _Floats]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype(np.float32),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),
}


def _values(file: BinaryIO, span: TensorSpan, count: int) -> _Floats:
    return _TO_FLOAT[span.dtype](_exactly(file, count * ELEMENT_BYTES[span.dtype]))
