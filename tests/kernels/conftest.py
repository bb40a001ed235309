"""What the kernels' tests run on: a CUDA device where there is one, else Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

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
def one_thread_without_gradients() -> Iterator[None]:
    """Tiny matmuls on two threads mostly wait for each other when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
