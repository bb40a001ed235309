"""Numbers that the device fetches by itself, and the buffers that they lie in."""

import pytest
import torch

from lora_kernels.host_reads import fetch, fetch_kernel
from replica.model.paged_batch import HostBuffers


@pytest.mark.parametrize("count", [1, 1023, 1024, 2500])
def test_all_of_it_is_fetched_and_no_more(device: torch.device, count: int) -> None:
    source = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.full((4000,), 7, dtype=torch.int32, device=device)
    fetch_kernel[(3,)](target[5 : 5 + count], source[1 : 1 + count], count, BLOCK=1024)
    assert torch.equal(target[5 : 5 + count].cpu(), source[1 : 1 + count])
    assert (target[:5] == 7).all() and (target[5 + count :] == 7).all()
    fetch(target[:count], source[:count])
    assert torch.equal(target[:count].cpu(), source[:count])


def test_a_step_is_laid_out_beside_the_one_before(device: torch.device) -> None:
    buffers = HostBuffers(device)
    targets = [torch.zeros(size, dtype=torch.int32, device=device) for size in (3, 40, 3, 200)]
    before = None
    for number, target in enumerate(targets):
        host = buffers.next(len(target))
        assert before is None or host.data_ptr() != before.data_ptr()
        before = host.fill_(number)
        buffers.bring(target)
    assert [target.tolist() for target in targets] == [[n] * len(t) for n, t in enumerate(targets)]
