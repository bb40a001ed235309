"""An adapter's weights as one flat tensor in the layout and dtype of the device.

    | layer 0: q A, q B, k A, k B, v A, v B, o …, down A, down B | layer 1: … | gains of DoRA |
    | embedding | head |

A is [rank, in] and B is [out, rank], row-major as PEFT stores them. Each projection has its own
rank; a projection without a delta takes no memory. Of embedding and head there are A and B, or a
whole weight [vocab, hidden]. With tensor parallelism, a rank's image has these whole, and else only
the rows of B for its outputs, or the columns of A for its inputs (`ROW_PARALLEL`).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import AdapterFailed, AdapterRefused
from cluster.file_copies import open_regular
from lora_kernels.reference import VocabularyDelta
from replica.adapters.adapter_files import AdapterFiles, Pair, check_ranks, read_adapter
from replica.adapters.gains import STORED, BaseWeights, gains_of
from replica.adapters.host_pool import Piece
from replica.adapters.safetensors_header import TensorSpan
from replica.model.shape import ROW_PARALLEL, ModelShape, Shape, Shard

# Files are read in chunks of about this size, so that memory for conversion is bounded.
CHUNK_BYTES = 16 * 2**20
# Linux' limit of buffers in one read.
_BUFFERS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets, ranks and scales of each projection's matrices; arrays are [layers, projections].

    Offsets are in elements from the start of the image. rank 0: the projection has no delta.
    gain_offset: of the gains [2, out], as in `Directory`; None: no projection has any.
    vocabulary: of embedding and head.
    """

    a_offset: npt.NDArray[np.int64]
    b_offset: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    gain_offset: npt.NDArray[np.int64] | None = None
    vocabulary: tuple[VocabularyDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """flat: 1-D, on the host, in the engine's dtype. piece: the page-locked memory of `flat`, if it
    is in a pool. The reference keeps it allocated.
    """

    flat: torch.Tensor
    layout: Layout
    piece: Piece | None = None

    @property
    def bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def _nothing() -> None:
    pass


def read_image(
    path: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    into: torch.Tensor | Piece | None = None,
    rank_max: int | None = None,
    base: BaseWeights | None = None,
    shard: Shard = Shard(),
    chunk_bytes: int = CHUNK_BYTES,
    pause: Callable[[], None] = _nothing,
) -> Image:
    """Reads and converts the files in few, large operations that do without the GIL: between any
    two, a busy thread of this process may keep it for milliseconds.

    shape: of the whole model. into: memory for the image; None allocates it. shard: the part to
    keep. base: the model's weights, for DoRA. chunk_bytes: of the file, for one chunk, which has at
    least one matrix. pause: called after every chunk.
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
        with open_regular(files.tensors_path) as file:
            chunks = list(_chunks(_matrices(files, local, shard, chunk_bytes), chunk_bytes))
            converted = [chunk.bytes for chunk in chunks if not chunk.stored_as_kept(dtype)]
            buffer = torch.empty(max(converted, default=0), dtype=torch.uint8)
            for chunk in chunks:
                _read_chunk(file.fileno(), chunk, flat, buffer)
                _check_finite(flat, chunk, files.tensors_path)
                pause()
            layout = _layout(files, local)
            if layout.gain_offset is not None:
                if base is None or shard.ranks > 1:
                    raise AdapterFailed(f"{path}: DoRA needs the whole model")
                _fill_gains(flat, layout, files, local, base, file, pause)
    except AdapterRefused as error:
        raise AdapterFailed(error.message) from error
    except OSError as error:
        raise AdapterFailed(f"{path}: {error}") from error
    return Image(flat, layout, into if isinstance(into, Piece) else None)


def _memory_for(
    into: torch.Tensor | Piece | None, parameters: int, dtype: torch.dtype
) -> torch.Tensor:
    """Memory for `parameters` elements, or fewer if `into` is too small."""
    if into is None:
        return torch.empty(parameters, dtype=dtype)
    flat = into.memory.view(dtype) if isinstance(into, Piece) else into
    return flat[:parameters]


def _layout(files: AdapterFiles, shape: Shape) -> Layout:
    """shape: of one rank's part of the model."""
    projections = shape.projections
    names = list(projections)
    size = (shape.layers, len(names))
    layout = Layout(
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, np.int32),
        np.zeros(size, np.float32),
        np.zeros(size, np.int64) if files.dora else None,
        tuple(_vocabulary_deltas(files, shape)),
    )
    offset = 0
    for (layer, projection), pair in files.pairs.items():
        inputs, outputs = projections[projection]
        at = (layer, names.index(projection))
        layout.a_offset[at] = offset
        layout.b_offset[at] = offset + pair.rank * inputs
        layout.rank[at] = pair.rank
        layout.scale[at] = pair.scale
        offset += pair.rank * (inputs + outputs)
    if layout.gain_offset is not None:
        for (layer, projection), pair in files.pairs.items():
            if pair.magnitude is not None:
                layout.gain_offset[layer, names.index(projection)] = offset
                offset += 2 * projections[projection][1]
    return layout


def _fill_gains(
    flat: torch.Tensor,
    layout: Layout,
    files: AdapterFiles,
    shape: Shape,
    base: BaseWeights,
    file: BinaryIO,
    pause: Callable[[], None],
) -> None:
    assert layout.gain_offset is not None
    names = list(shape.projections)
    for (layer, projection), pair in files.pairs.items():
        if pair.magnitude is None:
            continue
        at, (inputs, outputs) = (layer, names.index(projection)), shape.projections[projection]
        a, b, own = (int(o[at]) for o in (layout.a_offset, layout.b_offset, layout.gain_offset))
        gains = gains_of(
            pair,
            flat[a : a + pair.rank * inputs].view(pair.rank, inputs),
            flat[b : b + pair.rank * outputs].view(outputs, pair.rank),
            base.weight(layer, projection),
            file,
            pause,
        )
        if not _finite(gains):
            where = f"{files.tensors_path}: layer {layer} {projection}"
            raise AdapterFailed(f"{where} has a gain that is not finite")
        first, second = flat[own : own + 2 * outputs].view(2, outputs)
        first.copy_(gains)
        second.copy_(gains - first.float())


def _vocabulary_deltas(files: AdapterFiles, shape: Shape) -> Iterator[VocabularyDelta]:
    """shape: as in `_layout`."""
    end = files.parameters_of(shape) - sum(p.elements for p in files.vocabulary.values())
    for module, part in files.vocabulary.items():
        sized = shape.vocabulary[module]
        sizes = sized.head, sized.inputs, sized.outputs
        if isinstance(part, Pair):
            yield VocabularyDelta(*sizes, end, end + part.a.elements, part.rank, part.scale)
        else:
            yield VocabularyDelta(*sizes, end, end, None)
        end += part.elements


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A, B or a whole weight of `where`, or some of its rows.

    begin: first byte of `rows` in the file. rows, columns: of the stored matrix, kept; all others
    of `rows` are read, but dropped. width: all columns. offset: first element in the image.
    """

    where: str
    dtype: torch.dtype
    begin: int
    rows: int
    width: int
    columns: slice
    offset: int

    @property
    def bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    @property
    def kept(self) -> tuple[int, int]:
        return self.rows, self.columns.stop - self.columns.start

    @property
    def end(self) -> int:
        rows, columns = self.kept
        return self.offset + rows * columns


def _matrices(files: AdapterFiles, shape: Shape, shard: Shard, bytes_max: int) -> Iterator[_Matrix]:
    """In the order of the image. shape: as in `_layout`. bytes_max: of a piece of a vocabulary's
    matrix.
    """
    offset = 0
    for (layer, projection), pair in files.pairs.items():
        by_inputs = projection in ROW_PARALLEL
        for span, cut_dim in (
            (pair.a, 1 if by_inputs else None),
            (pair.b, None if by_inputs else 0),
        ):
            height, width = span.shape
            cuts, columns = [slice(0, height)], slice(0, width)
            if cut_dim == 1:
                columns = shard.cut(width)
            elif cut_dim == 0 and isinstance(shape, ModelShape):
                cuts = shard.cuts([size * shard.ranks for size in shape.parts(projection)])
            for rows in cuts:
                dtype = STORED[span.dtype]
                begin = span.begin + rows.start * width * dtype.itemsize
                where, count = f"layer {layer} {projection}", rows.stop - rows.start
                matrix = _Matrix(where, dtype, begin, count, width, columns, offset)
                yield matrix
                offset = matrix.end
    offset += files.gain_elements(shape)
    for where, part in files.vocabulary.items():
        for span in (part.a, part.b) if isinstance(part, Pair) else (part,):
            yield from _pieces(where, span, offset, bytes_max)
            offset += span.elements


def _pieces(where: str, span: TensorSpan, offset: int, bytes_max: int) -> Iterator[_Matrix]:
    (rows, width), dtype = span.shape, STORED[span.dtype]
    step = max(1, bytes_max // (width * dtype.itemsize))
    for row in range(0, rows, step):
        begin = span.begin + row * width * dtype.itemsize
        count = min(step, rows - row)
        yield _Matrix(where, dtype, begin, count, width, slice(0, width), offset + row * width)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbours in the image that the file stores in one dtype."""

    matrices: tuple[_Matrix, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices[0].dtype

    @property
    def bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices)

    @property
    def whole(self) -> bool:
        return all(matrix.kept[1] == matrix.width for matrix in self.matrices)

    def stored_as_kept(self, dtype: torch.dtype) -> bool:
        return self.dtype == dtype and self.whole

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.matrices[0].offset : self.matrices[-1].end]


def _chunks(matrices: Iterable[_Matrix], size: int) -> Iterator[_Chunk]:
    """size: bytes after which a chunk ends."""
    chunk: list[_Matrix] = []
    bytes = 0
    for matrix in matrices:
        if chunk and (
            bytes >= size or chunk[0].dtype != matrix.dtype or chunk[-1].end != matrix.offset
        ):
            yield _Chunk(tuple(chunk))
            chunk, bytes = [], 0
        chunk.append(matrix)
        bytes += matrix.bytes
    yield _Chunk(tuple(chunk))


def _read_chunk(descriptor: int, chunk: _Chunk, flat: torch.Tensor, buffer: torch.Tensor) -> None:
    """Reads straight into the image if nothing is to be converted or left out, else through
    `buffer`.
    """
    target = chunk.of(flat)
    if chunk.stored_as_kept(flat.dtype):
        _read(descriptor, chunk, target)
        return
    stored = buffer[: chunk.bytes].view(chunk.dtype)
    _read(descriptor, chunk, stored)
    if chunk.whole:
        target.copy_(stored)
        return
    start = 0
    for matrix in chunk.matrices:
        size = matrix.rows * matrix.width
        kept = stored[start : start + size].view(matrix.rows, matrix.width)[:, matrix.columns]
        flat[matrix.offset : matrix.end].view(matrix.kept).copy_(kept)
        start += size


def _check_finite(flat: torch.Tensor, chunk: _Chunk, path: str) -> None:
    """Raises AdapterFailed if a value is not finite. It would spread to other adapters' rows, which
    share a matmul with it: 0 · inf is NaN.
    """
    if _finite(chunk.of(flat)):
        return
    for matrix in chunk.matrices:
        if not _finite(flat[matrix.offset : matrix.end]):
            raise AdapterFailed(
                f"{path}: {matrix.where} holds values that are not "
                f"finite in {str(flat.dtype).removeprefix('torch.')}"
            )


def _finite(values: torch.Tensor) -> bool:
    least, largest = torch.aminmax(values)  # NaN if there is one
    return math.isfinite(least.item()) and math.isfinite(largest.item())


def _read(descriptor: int, chunk: _Chunk, target: torch.Tensor) -> None:
    """Reads the rows of all matrices, one after another, into `target`: one system call for each
    range of the file.
    """
    memory = target.view(torch.uint8).numpy().data
    pieces = []
    start = 0
    for matrix in chunk.matrices:
        pieces.append((matrix.begin, memory[start : start + matrix.bytes]))
        start += matrix.bytes
    pieces.sort(key=itemgetter(0))
    buffers: list[memoryview] = []
    begin = end = pieces[0][0]
    for offset, piece in pieces:
        if offset != end:
            _read_range(descriptor, begin, buffers)
            buffers, begin, end = [], offset, offset
        buffers.append(piece)
        end += len(piece)
    _read_range(descriptor, begin, buffers)


def _read_range(descriptor: int, offset: int, buffers: list[memoryview]) -> None:
    while buffers:
        count = os.preadv(descriptor, buffers[:_BUFFERS_MAX], offset)
        if not count:
            raise OSError("the tensors file ended early")
        offset += count
        full = 0
        while full < len(buffers) and count >= len(buffers[full]):
            count -= len(buffers[full])
            full += 1
        buffers = buffers[full:]
        if count:
            buffers[0] = buffers[0][count:]
