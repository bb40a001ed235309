"""DoRA's gain of each output: its magnitude ÷ the norm of its row of W + scale · B · A (Liu et al.,
DoRA, 2024).

    y = gain · (W · x + scale · B · A · x) + bias

The norm needs the base model's weights, so gains are found when an image is read, once for as long
as it is kept. In the image a gain is the sum of two values of the engine's dtype: one of 16 bits
would change an output by as much as rounding does, but always in the same direction.
"""

import contextlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

import numpy as np
import torch

from replica.adapters.adapter_files import Pair
from replica.adapters.safetensors_header import TensorSpan

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of W, in float32, at once. On a CPU as much as some milliseconds of one core.
_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}


class BaseWeights(Protocol):
    def weight(self, layer: int, projection: str) -> torch.Tensor:
        """[out, in], on the engine's device."""


@torch.no_grad()
def gains_of(
    pair: Pair,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    file: BinaryIO,
    pause: Callable[[], None],
) -> torch.Tensor:
    """float32 [out], on the host. a, b: of the image. file: the tensors'. pause: called after each
    piece.
    """
    assert pair.magnitude is not None
    with _beside_batches(weight.device):
        norms = _norms(weight, a, b, pair.scale, pause).cpu()
    return _read(file, pair.magnitude) / norms


def _norms(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, pause: Callable[[], None]
) -> torch.Tensor:
    outputs, inputs = weight.shape
    step = max(1, _ELEMENTS[weight.device.type] // inputs)
    a, b = (side.to(weight.device, torch.float32) for side in (a, b))
    norms = a.new_empty(outputs)
    for begin in range(0, outputs, step):
        rows = slice(begin, begin + step)
        whole = torch.addmm(weight[rows].float(), b[rows], a, alpha=scale)
        torch.linalg.vector_norm(whole, dim=1, out=norms[rows])
        pause()
    return norms


def _beside_batches(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """On a GPU, a stream of its own: on the current one, batches would wait for the norms."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _read(file: BinaryIO, span: TensorSpan) -> torch.Tensor:
    file.seek(span.begin)
    data = np.fromfile(file, np.uint8, span.bytes)
    if len(data) < span.bytes:
        raise OSError("the tensors file ended early")
    return torch.from_numpy(data).view(STORED[span.dtype]).float()
