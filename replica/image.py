"""An adapter's weights as ONE flat tensor in the layout and dtype of the device.

    | layer 0: q A, q B, k A, k B, v A, v B, o …, down A, down B | layer 1: … |

A is [rank, in], B is [out, rank], both row by row as PEFT stores them, each projection at its own
rank; what an adapter leaves alone takes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import AdapterFailed, AdapterRefused
from replica.adapter_files import AdapterFiles, read_adapter
from replica.safetensors_header import TensorSpan, open_regular
from replica.shape import PROJECTIONS, ModelShape

# Below ATen's grain size: an operation on a piece runs on the calling thread alone. The pool of
# compute threads belongs to the decoding loop, and a loader that entered it would stall a step.
PIECE_ELEMENTS = 32_768 - 1024

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each projection's matrices lie in an image; all arrays are [layers, projections].

    Offsets are in elements from the image's start. rank 0: the projection is untouched.
    """

    a_offset: npt.NDArray[np.int64]
    b_offset: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Image:
    """flat: 1-D, on the CPU, in the device's dtype."""

    flat: torch.Tensor
    layout: Layout

    @property
    def bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def read_image(path: str, shape: ModelShape, dtype: torch.dtype) -> Image:
    """Meant for a loader's thread: reads and converts piece by piece, on that thread alone.

    Raises AdapterFailed when the files are broken or hold values that are not finite.
    """
    try:
        files = read_adapter(path, shape)
        with open_regular(files.tensors_path) as file:
            flat = _read_flat(file, files, dtype)
    except AdapterRefused as error:
        raise AdapterFailed(error.message) from error
    except OSError as error:
        raise AdapterFailed(f"{path}: {error}") from error
    return Image(flat, _layout(files, shape))


def _layout(files: AdapterFiles, shape: ModelShape) -> Layout:
    size = (shape.layers, len(PROJECTIONS))
    layout = Layout(
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, np.int32),
        np.zeros(size, np.float32),
    )
    offset = 0
    for (layer, projection), pair in files.pairs.items():
        at = (layer, PROJECTIONS.index(projection))
        layout.a_offset[at] = offset
        layout.b_offset[at] = offset + pair.a.elements
        layout.rank[at] = pair.rank
        layout.scale[at] = pair.scale
        offset += pair.a.elements + pair.b.elements
    return layout


def _read_flat(file: BinaryIO, files: AdapterFiles, dtype: torch.dtype) -> torch.Tensor:
    flat = torch.empty(files.parameters, dtype=dtype)
    piece = bytearray(PIECE_ELEMENTS * 4)
    offset = 0
    for (layer, projection), pair in files.pairs.items():
        for span in (pair.a, pair.b):
            target = flat[offset : offset + span.elements]
            if not _read_tensor(file, span, target, piece):
                raise AdapterFailed(
                    f"{files.tensors_path}: layer {layer} {projection} holds values that are not "
                    f"finite in {str(dtype).removeprefix('torch.')}"
                )
            offset += span.elements
    return flat


def _read_tensor(file: BinaryIO, span: TensorSpan, target: torch.Tensor, piece: bytearray) -> bool:
    """False when a value is not finite.

    Such a value would reach other adapters' rows: one matmul covers them all, and 0 · inf is nan.
    """
    stored = _STORED[span.dtype]
    file.seek(span.begin)
    for start in range(0, span.elements, PIECE_ELEMENTS):
        part = target[start : start + PIECE_ELEMENTS]
        view = memoryview(piece)[: part.numel() * stored.itemsize]
        _fill(file.readinto, view)  # type: ignore[attr-defined]
        part.copy_(torch.frombuffer(view, dtype=stored))
        # A sum is finite only if all its terms are.
        if not torch.isfinite(part.sum(dtype=torch.float32)):
            return False
    return True


def _fill(readinto: Callable[[memoryview], int], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise OSError("the tensors file ended early")
        done += count
