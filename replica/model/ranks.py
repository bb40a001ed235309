"""Collective operations between the processes that share one model."""

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

# Ranks do the same in the same order and wait for each other in every layer. A rank that is this
# late is lost. The time must suffice to load the model and capture graphs.
_TIMEOUT = timedelta(minutes=10)


class Ranks:
    """Collective operations over all ranks. Every rank must call them, in the same order.

    A process can have one only: it is torch's default process group.
    """

    def __init__(self, shard: Shard, device: torch.device, store: Store) -> None:
        self.shard = shard
        self.device = device
        # All ranks are on this machine; other machines must not reach them.
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
            timeout=_TIMEOUT,
            # Connects NCCL now instead of in the first step.
            device_id=device if on_gpu else None,
        )

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sums x over all ranks, in place."""
        dist.all_reduce(x)

    def share(self, x: torch.Tensor) -> None:
        """Broadcasts rank 0's x, in place."""
        dist.broadcast(x, 0)

    def gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        """Concatenates all ranks' x into parts [ranks · rows, …]."""
        _gather(parts, x)

    def least(self, value: int) -> int:
        """The minimum over all ranks."""
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values.item())

    def vocab_rows(self, vocab: int) -> slice:
        """Tokens whose logits this rank computes: all, if the ranks cannot share them equally."""
        return slice(None) if vocab % self.shard.ranks else self.shard.cut(vocab)

    def whole_head(self, head: Linear, vocab: int) -> Linear:
        """A head for the whole vocabulary. head: computes the logits of `vocab_rows`."""
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
        """Works without the other ranks."""
        # NCCL's shutdown needs all ranks. NCCL ends with this process, which ends now.
        if self.device.type == "cpu":
            dist.destroy_process_group()


# Torch 2.13 deprecates the only name that 2.11 has.
_gather: Callable[[torch.Tensor, torch.Tensor], object]
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TCPStore = dist.TCPStore  # type: ignore[attr-defined]


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Raises ConfigError if there are fewer CUDA devices than ranks."""
    found = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device == "auto" and not found):
        return torch.device("cpu")
    if found < config.tensor_parallel:
        raise ConfigError(
            f"tensor_parallel: {config.tensor_parallel} ranks need a CUDA device each, torch finds "
            f"{found}",
            field="tensor_parallel",
        )
    return torch.device("cuda", rank)


def open_store(port: int | None = None) -> tuple[Store, int]:
    """The store through which ranks connect, and its port. port: None starts it on a free port."""
    if port is not None:
        return _TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT), port
    # Without a socket of ours the store would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = _TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port
