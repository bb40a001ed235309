"""An adapter's weights as ONE flat tensor in the layout and dtype of the device.

    | layer 0: q A, q B, k A, k B, v A, v B, o …, down A, down B | layer 1: … |

A is [rank, in], B is [out, rank], both row by row as PEFT stores them, each projection at its own
rank; what an adapter leaves alone takes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import AdapterFailed, AdapterRefused
from replica.adapter_files import AdapterFiles, check_ranks, read_adapter
from replica.safetensors_header import open_regular
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
    """flat: 1-D, on the CPU, in the device's dtype. digest: of the files, as they were read."""

    flat: torch.Tensor
    layout: Layout
    digest: str = ""

    @property
    def bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def _nothing() -> None:
    pass


def read_image(
    path: str,
    shape: ModelShape,
    dtype: torch.dtype,
    *,
    into: torch.Tensor | None = None,
    rank_max: int | None = None,
    pause: Callable[[], None] = _nothing,
) -> Image:
    """Meant for a loader's thread: reads, hashes and converts in pieces, on that thread alone.

    into: where the image goes; None: memory of its own. pause: called after every piece.
    Raises AdapterFailed when the files are broken, do not fit or hold values that are not finite.
    """
    try:
        files = read_adapter(path, shape)
        if rank_max is not None:
            check_ranks(files, rank_max)
        if into is None:
            into = torch.empty(files.parameters, dtype=dtype)
        if into.numel() < files.parameters:
            raise AdapterFailed(f"{path}: larger than when it was registered")
        flat = into[: files.parameters]
        with open_regular(files.tensors_path) as file:
            digest = _read_flat(file, files, flat, pause)
    except AdapterRefused as error:
        raise AdapterFailed(error.message) from error
    except OSError as error:
        raise AdapterFailed(f"{path}: {error}") from error
    return Image(flat, _layout(files, shape), digest)


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


def _read_flat(
    file: BinaryIO, files: AdapterFiles, flat: torch.Tensor, pause: Callable[[], None]
) -> str:
    """The digest. Reads the file once, from its first byte to its last."""
    places = []
    offset = 0
    for where, pair in files.pairs.items():
        for span in (pair.a, pair.b):
            places.append((span, flat[offset : offset + span.elements], where))
            offset += span.elements
    places.sort(key=lambda place: place[0].begin)
    digest = files.hash()
    piece = memoryview(bytearray(PIECE_ELEMENTS * 4))
    # There are no holes: the header ends where the first tensor begins.
    header_bytes = places[0][0].begin
    for start in range(0, header_bytes, len(piece)):
        view = piece[: header_bytes - start]
        _fill(file.readinto, view)  # type: ignore[attr-defined]
        digest.update(view)
    for span, target, (layer, projection) in places:
        stored = _STORED[span.dtype]
        for part in torch.split(target, PIECE_ELEMENTS):
            view = piece[: part.numel() * stored.itemsize]
            _fill(file.readinto, view)  # type: ignore[attr-defined]
            digest.update(view)
            part.copy_(torch.frombuffer(view, dtype=stored))
            # Such a value would reach other adapters' rows: one matmul covers them all, and
            # 0 · inf is nan. A sum is finite only if all its terms are.
            if not math.isfinite(part.sum(dtype=torch.float32).item()):
                raise AdapterFailed(
                    f"{files.tensors_path}: layer {layer} {projection} holds values that are not "
                    f"finite in {str(flat.dtype).removeprefix('torch.')}"
                )
            pause()
    return digest.hexdigest()


def _fill(readinto: Callable[[memoryview], int], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise OSError("the tensors file ended early")
        done += count
