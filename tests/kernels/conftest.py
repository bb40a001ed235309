"""What the kernels' tests run on: a CUDA device where there is one, else Triton's interpreter."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from lora_kernels import attention, fused, lora, reference
from lora_kernels.ops import Lora

# The interpreter is silently wrong on bf16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda kind: str(kind).removeprefix("torch."))
def kernel_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind = request.param
    assert isinstance(kind, torch.dtype)
    return kind


@pytest.fixture(autouse=True)
def one_thread_without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny matmuls on two threads mostly wait for each other when the machine is busy. A module
    with `GRADIENTS` keeps gradients as they are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode(not getattr(request.module, "GRADIENTS", False)):
        yield
    torch.set_num_threads(threads)


class ReferenceLora(Lora):
    def __init__(self, directory: Any, arena: Any, groups: Any, rank_max: int) -> None:
        super().__init__(directory, arena, groups)

    def reserve(self, rows_max: int) -> None:
        pass

    def begin(self, row_slots: Sequence[int], rows: int | None = None) -> None:
        padding = 0 if rows is None else rows - len(row_slots)
        super().begin([*row_slots, *[0] * padding])


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' specification in their place: the rest of the path runs many times faster."""

    def decode(
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        starts = torch.arange(len(q) + 1)
        out.copy_(
            reference.attention(q, keys, values, table, starts, lengths, scale, window, softcap)
        )

    def prefill(
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        queries_max: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        out: torch.Tensor,
    ) -> None:
        assert queries_max == int(starts.diff().max())
        out.copy_(
            reference.attention(q, keys, values, table, starts, lengths, scale, window, softcap)
        )

    monkeypatch.setattr(attention, "decode", decode)
    monkeypatch.setattr(attention, "prefill", prefill)
    monkeypatch.setattr(lora, "TritonLora", ReferenceLora)
    for name in ("rms_norm", "add_rms_norm", "rotary_store", "silu_mul", "gelu_mul", "choose"):
        monkeypatch.setattr(fused, name, getattr(reference, name))
