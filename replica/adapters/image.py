"""An adapter's weights as one flat tensor in the layout and dtype of the device.

    | layer 0: q A, q B, k A, k B, v A, v B, o …, down A, down B | layer 1: … |

A is [rank, in] and B is [out, rank], row-major as PEFT stores them. Each projection has its own
rank; a projection without a delta takes no memory. With tensor parallelism, a rank's image has only
the rows of B for its outputs, or the columns of A for its inputs (`ROW_PARALLEL`).
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

# Below ATen's grain size, so that an operation on a piece runs on the calling thread alone. A
# loader that used torch's thread pool would stall the engine's steps.
PIECE_ELEMENTS = 32_768 - 1024

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets, ranks and scales of each projection's matrices; arrays are [layers, projections].

    Offsets are in elements from the start of the image. rank 0: the projection has no delta.
    """

    a_offset: npt.NDArray[np.int64]
    b_offset: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Image:
    """flat: 1-D, on the host, in the engine's dtype. digest: of the files that were read.
    piece: the page-locked memory of `flat`, if it is in a pool. The reference keeps it allocated.
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
    """Reads, hashes and converts the files in pieces, on the calling thread alone.

    shape: of the whole model. into: memory for the image; None allocates it. shard: the part to
    keep. pause: called after every piece.
    Raises AdapterFailed if the files are invalid, too large or contain values that are not finite.
    """
    try:
        files = read_adapter(path, shape)
        if rank_max is not None:
            check_ranks(files, rank_max)
        local = shape.divided(shard.ranks)
        parameters = files.parameters_of(local)
        flat = _memory_for(into, parameters, dtype)
        if len(flat) < parameters:
            raise AdapterFailed(f"{path}: the adapter is larger than when it was registered")
        layout = _layout(files, local)
        with open_regular(files.tensors_path) as file:
            digest = _read_flat(file, files, flat, shard, pause)
    except AdapterRefused as error:
        raise AdapterFailed(error.message) from error
    except OSError as error:
        raise AdapterFailed(f"{path}: {error}") from error
    return Image(flat, layout, digest, into if isinstance(into, Piece) else None)


def _memory_for(
    into: torch.Tensor | Piece | None, parameters: int, dtype: torch.dtype
) -> torch.Tensor:
    """Memory for `parameters` elements, or fewer if `into` is too small."""
    if into is None:
        return torch.empty(parameters, dtype=dtype)
    flat = into.memory.view(dtype) if isinstance(into, Piece) else into
    return flat[:parameters]


def _layout(files: AdapterFiles, shape: ModelShape) -> Layout:
    """shape: of one rank's part of the model."""
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
    """A or B of `where`. `rows` and `columns` of the stored matrix go to target [rows, columns]."""

    span: TensorSpan
    where: tuple[int, str]
    rows: slice
    columns: slice
    target: torch.Tensor

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each piece, in file order: several whole rows, or part of a row."""
        rows, columns = self.span.shape
        height = max(1, PIECE_ELEMENTS // columns)
        for row in range(0, rows, height):
            for column in range(0, columns, PIECE_ELEMENTS):
                yield (
                    slice(row, min(row + height, rows)),
                    slice(column, min(column + PIECE_ELEMENTS, columns)),
                )


def _matrices(files: AdapterFiles, flat: torch.Tensor, shard: Shard) -> list[_Matrix]:
    """Sorted by their order in the file. In `flat` they have the order of the image."""
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
    """The intersection, relative to the start of `kept` and to the start of `piece`."""
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
    """Reads the file once, from start to end, and returns the digest."""
    matrices = _matrices(files, flat, shard)
    digest = files.hash()
    buffer = memoryview(bytearray(PIECE_ELEMENTS * 4))
    # The file has no holes, so the header ends where the first tensor begins.
    header_bytes = matrices[0].span.begin
    for start in range(0, header_bytes, len(buffer)):
        view = buffer[: header_bytes - start]
        _read_into(file.readinto, view)  # type: ignore[attr-defined]
        digest.update(view)
    for matrix in matrices:
        stored = _STORED[matrix.span.dtype]
        for piece in matrix.pieces():
            height, width = (cut.stop - cut.start for cut in piece)
            view = buffer[: height * width * stored.itemsize]
            _read_into(file.readinto, view)  # type: ignore[attr-defined]
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
    """Raises AdapterFailed if a value is not finite. It would spread to other adapters' rows, which
    share a matmul with it: 0 · inf is NaN. The sum is finite only if all values are.
    """
    if not math.isfinite(part.sum(dtype=torch.float32).item()):
        raise AdapterFailed(
            f"{files.tensors_path}: layer {where[0]} {where[1]} holds values that are not finite "
            f"in {str(part.dtype).removeprefix('torch.')}"
        )


def _read_into(readinto: Callable[[memoryview], int], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise OSError("the tensors file ended early")
        done += count
