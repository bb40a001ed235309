"""Reads the header of an untrusted safetensors file: bounded, and checked against the file."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from cluster.file_copies import open_regular

HEADER_BYTES_MAX = 8 * 2**20
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ELEMENT_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class HeaderInvalid(Exception):
    """The file violates the format."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """begin: first byte of the data, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * ELEMENT_BYTES[self.dtype]


def read_header(path: str) -> dict[str, TensorSpan]:
    """Tensor name → span. Raises OSError, HeaderInvalid.

    As the format demands, tensors must cover the data without gaps, overlaps or trailing bytes.
    """
    return parse_header(*header_text(path))


def header_text(path: str) -> tuple[bytes, int]:
    """The header as it stands, and how many bytes follow. Raises OSError, HeaderInvalid."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(GIT_LFS_POINTER))
        if start == GIT_LFS_POINTER:
            raise HeaderInvalid("a Git LFS pointer: run `git lfs pull` there")
        if not start:
            raise HeaderInvalid("empty; copy or download it again")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise HeaderInvalid(
                f"not a safetensors file: a header of {length} bytes in a file of {size}"
            )
        if length > HEADER_BYTES_MAX:
            raise HeaderInvalid(f"the header has {length} bytes, the maximum is {HEADER_BYTES_MAX}")
        file.seek(8)
        return file.read(length), size - 8 - length


def parse_header(text: bytes, size: int) -> dict[str, TensorSpan]:
    """Of what `header_text` returns. Raises HeaderInvalid."""
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise HeaderInvalid(f"not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise HeaderInvalid("not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    spans: dict[str, TensorSpan] = {}
    ends: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        begin, end, span = _span(name, entry, 8 + len(text))
        spans[name] = span
        ends.append((begin, end, name))
    _check_cover(sorted(ends), size)
    return spans


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key appears twice")
    return unique


def _span(name: str, entry: Any, data_start: int) -> tuple[int, int, TensorSpan]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderInvalid(f"tensor {name[:120]!r}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise HeaderInvalid(f"tensor {name[:120]!r}: dtype {str(dtype)[:40]!r} is not supported")
    if not _is_sizes(shape) or len(shape) > 8 or not _is_sizes(offsets) or len(offsets) != 2:
        raise HeaderInvalid(f"tensor {name[:120]!r}: shape or data_offsets are invalid")
    begin, end = offsets
    size = math.prod(shape) * ELEMENT_BYTES[dtype]
    if end - begin != size:
        raise HeaderInvalid(
            f"tensor {name[:120]!r}: {dtype} {shape} takes {size} bytes, "
            f"its data_offsets span {end - begin}"
        )
    return begin, end, TensorSpan(dtype, tuple(shape), data_start + begin)


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for size in value:  # noqa: SIM110 -- called twice a tensor, and a generator takes twice as long
        if type(size) is not int or not 0 <= size < 2**48:
            return False
    return True


def _check_cover(spans: list[tuple[int, int, str]], size: int) -> None:
    reached = 0
    for begin, end, name in spans:
        if begin != reached:
            raise HeaderInvalid(
                f"tensor {name[:120]!r} starts at byte {begin} of the data, not at {reached}"
            )
        reached = end
    if reached != size:
        raise HeaderInvalid(f"the tensors take {reached} bytes, the file holds {size}")
