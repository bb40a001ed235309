"""An adapter's weights as ONE flat tensor in the layout and dtype of the device.

    | layer 0: q A, q B, k A, k B, v A, v B, o …, down A, down B | layer 1: … |

A is [rank, in], B is [out, rank], both row by row as PEFT stores them, each projection at its own
rank; what an adapter leaves alone takes nothing. With tensor parallelism, a rank's image has B's
rows of the outputs and A's columns of the inputs that the rank has; both whole, where it has all.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import AdapterFailed, AdapterRefused
from replica.adapters.adapter_files import AdapterFiles, check_ranks, read_adapter
from replica.adapters.host_pool import Piece
from replica.adapters.safetensors_header import TensorSpan, open_regular
from replica.model.shape import PROJECTIONS, ROW_PARALLEL, ModelShape, Shard

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
    """flat: 1-D, on the CPU, in the device's dtype. digest: of the files, as they were read.
    piece: of page-locked memory, where `flat` lies in one; it is not given to others meanwhile.
    """

    flat: torch.Tensor
    layout: Layout
    digest: str = ""
    piece: Piece | None = None

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
    into: torch.Tensor | Piece | None = None,
    rank_max: int | None = None,
    shard: Shard = Shard(),
    pause: Callable[[], None] = _nothing,
) -> Image:
    """Meant for a loader's thread: reads, hashes and converts in pieces, on that thread alone.

    into: where the image goes; None: memory of its own. shard: what to keep of it; `shape` is the
    whole model's. pause: called after every piece.
    Raises AdapterFailed when the files are broken, do not fit or hold values that are not finite.
    """
    try:
        files = read_adapter(path, shape)
        if rank_max is not None:
            check_ranks(files, rank_max)
        local = shape.divided(shard.ranks)
        parameters = files.parameters_of(local)
        flat = _place(into, parameters, dtype)
        if len(flat) < parameters:
            raise AdapterFailed(f"{path}: larger than when it was registered")
        layout = _layout(files, local)
        with open_regular(files.tensors_path) as file:
            digest = _read_flat(file, files, flat, shard, pause)
    except AdapterRefused as error:
        raise AdapterFailed(error.message) from error
    except OSError as error:
        raise AdapterFailed(f"{path}: {error}") from error
    return Image(flat, layout, digest, into if isinstance(into, Piece) else None)


def _place(into: torch.Tensor | Piece | None, parameters: int, dtype: torch.dtype) -> torch.Tensor:
    """As many parameters, or less where there is no room."""
    if into is None:
        return torch.empty(parameters, dtype=dtype)
    flat = into.memory.view(dtype) if isinstance(into, Piece) else into
    return flat[:parameters]


def _layout(files: AdapterFiles, shape: ModelShape) -> Layout:
    """shape: of one rank."""
    size = (shape.layers, len(PROJECTIONS))
    layout = Layout(
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, np.int32),
        np.zeros(size, np.float32),
    )
    projections = shape.projections
    offset = 0
    for (layer, projection), pair in files.pairs.items():
        inputs, outputs = projections[projection]
        at = (layer, PROJECTIONS.index(projection))
        layout.a_offset[at] = offset
        layout.b_offset[at] = offset + pair.rank * inputs
        layout.rank[at] = pair.rank
        layout.scale[at] = pair.scale
        offset += pair.rank * (inputs + outputs)
    return layout


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A or B of `where` in the file: `rows` and `columns` of it go to target [rows, columns]."""

    span: TensorSpan
    where: tuple[int, str]
    rows: slice
    columns: slice
    target: torch.Tensor

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Which rows and columns, in the file's order: some whole rows, or a part of one."""
        rows, columns = self.span.shape
        height = max(1, PIECE_ELEMENTS // columns)
        for row in range(0, rows, height):
            for column in range(0, columns, PIECE_ELEMENTS):
                yield (
                    slice(row, min(row + height, rows)),
                    slice(column, min(column + PIECE_ELEMENTS, columns)),
                )


def _matrices(files: AdapterFiles, flat: torch.Tensor, shard: Shard) -> list[_Matrix]:
    """In the file's order; side by side in `flat` in the image's."""
    matrices = []
    offset = 0
    for where, pair in files.pairs.items():
        by_inputs = where[1] in ROW_PARALLEL
        for span, cut_dim in (
            (pair.a, 1 if by_inputs else None),
            (pair.b, None if by_inputs else 0),
        ):
            rows, columns = (
                shard.cut(size) if dim == cut_dim else slice(0, size)
                for dim, size in enumerate(span.shape)
            )
            size = (rows.stop - rows.start, columns.stop - columns.start)
            end = offset + size[0] * size[1]
            matrices.append(_Matrix(span, where, rows, columns, flat[offset:end].view(size)))
            offset = end
    matrices.sort(key=lambda matrix: matrix.span.begin)
    return matrices


def _overlap(piece: slice, kept: slice) -> tuple[slice, slice]:
    """What both have of a dimension: counted from the kept's start, and from the piece's."""
    begin = max(piece.start, kept.start)
    end = max(begin, min(piece.stop, kept.stop))
    return (
        slice(begin - kept.start, end - kept.start),
        slice(begin - piece.start, end - piece.start),
    )


def _read_flat(
    file: BinaryIO,
    files: AdapterFiles,
    flat: torch.Tensor,
    shard: Shard,
    pause: Callable[[], None],
) -> str:
    """The digest. Reads the file once, from its first byte to its last."""
    matrices = _matrices(files, flat, shard)
    digest = files.hash()
    buffer = memoryview(bytearray(PIECE_ELEMENTS * 4))
    # There are no holes: the header ends where the first tensor begins.
    header_bytes = matrices[0].span.begin
    for start in range(0, header_bytes, len(buffer)):
        view = buffer[: header_bytes - start]
        _fill(file.readinto, view)  # type: ignore[attr-defined]
        digest.update(view)
    for matrix in matrices:
        stored = _STORED[matrix.span.dtype]
        for piece in matrix.pieces():
            height, width = (cut.stop - cut.start for cut in piece)
            view = buffer[: height * width * stored.itemsize]
            _fill(file.readinto, view)  # type: ignore[attr-defined]
            digest.update(view)
            rows, own_rows = _overlap(piece[0], matrix.rows)
            columns, own_columns = _overlap(piece[1], matrix.columns)
            part = matrix.target[rows, columns]
            if part.numel():
                values = torch.frombuffer(view, dtype=stored).view(height, width)
                part.copy_(values[own_rows, own_columns])
                _check_finite(part, files, matrix.where)
            pause()
    return digest.hexdigest()


def _check_finite(part: torch.Tensor, files: AdapterFiles, where: tuple[int, str]) -> None:
    """Such a value would reach other adapters' rows: one matmul covers them all, and 0 · inf is
    nan. A sum is finite only if all its terms are.
    """
    if not math.isfinite(part.sum(dtype=torch.float32).item()):
        raise AdapterFailed(
            f"{files.tensors_path}: layer {where[0]} {where[1]} holds values that are not finite "
            f"in {str(part.dtype).removeprefix('torch.')}"
        )


def _fill(readinto: Callable[[memoryview], int], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise OSError("the tensors file ended early")
        done += count
