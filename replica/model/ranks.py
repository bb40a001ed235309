"""The processes that compute one model together, as one of them sees the others."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.model.shape import Shard

Linear = Callable[[torch.Tensor], torch.Tensor]

# Ranks do the same things in the same order, and wait for each other in every layer. One that is
# this late does not come any more. It includes reading the model, and capturing graphs.
_LATE = timedelta(minutes=10)


class Ranks:
    """Sums and gathers over all ranks; every rank must call them, in the same order.

    One at a time in a process: it is torch's default process group.
    """

    def __init__(self, shard: Shard, device: torch.device, store: Store) -> None:
        self.shard = shard
        self.device = device
        # All ranks are on this machine, and nobody else is to reach them.
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=shard.rank,
            world_size=shard.ranks,
            timeout=_LATE,
            # Connects NCCL now, and not in the middle of the first step.
            device_id=device if on_gpu else None,
        )

    def all_reduce(self, x: torch.Tensor) -> None:
        """In place: the sum of all ranks' x."""
        dist.all_reduce(x)

    def share(self, x: torch.Tensor) -> None:
        """In place: rank 0's x."""
        dist.broadcast(x, 0)

    def gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        """Every rank's x, one after the other, into parts [ranks · rows, …]."""
        _gather(parts, x)

    def least(self, value: int) -> int:
        """The least of all ranks' values."""
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values.item())

    def vocab_rows(self, vocab: int) -> slice:
        """The tokens that this rank computes the logits of: all, where they cannot be shared."""
        return slice(None) if vocab % self.shard.ranks else self.shard.cut(vocab)

    def whole_head(self, head: Linear, vocab: int) -> Linear:
        """head: gives logits of `vocab_rows`. Gives logits of the whole vocabulary."""
        if vocab % self.shard.ranks:
            return head

        def gathered(x: torch.Tensor) -> torch.Tensor:
            own = head(x).contiguous()
            if not len(own):
                return own.new_empty(0, vocab)
            parts = own.new_empty(self.shard.ranks, *own.shape)
            self.gather(parts.flatten(0, 1), own)
            return parts.transpose(0, 1).flatten(1)

        return gathered

    def close(self) -> None:
        """The others need not be there any more."""
        # To end NCCL in good order takes all ranks. It ends with the process, which ends now.
        if self.device.type == "cpu":
            dist.destroy_process_group()


# Torch 2.13 has a new name for it and deprecates the old one, which is all that 2.11 has.
_gather: Callable[[torch.Tensor, torch.Tensor], object]
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TCPStore = dist.TCPStore  # type: ignore[attr-defined]


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Raises ConfigError when there are too few for all ranks."""
    found = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device == "auto" and not found):
        return torch.device("cpu")
    if found < config.tensor_parallel:
        raise ConfigError(
            f"tensor_parallel: {config.tensor_parallel} ranks need a CUDA device each, torch finds "
            f"{found} here",
            field="tensor_parallel",
        )
    return torch.device("cuda", rank)


def open_store(port: int | None = None) -> tuple[Store, int]:
    """Where ranks find each other, and its port. None: they will find it here, on a free port."""
    if port is not None:
        return _TCPStore("127.0.0.1", port, is_master=False, timeout=_LATE), port
    # Left to itself it would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = _TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        timeout=_LATE,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port
