"""What a `Launcher` hands to the device, against what Triton itself does, where there is no device.

Run as a program of its own, without TRITON_INTERPRET: `python -m tests.kernels.launches CASE`.
Nothing is compiled: what Triton would compile for a launch is a `Kernel` here, one for each of the
keys that Triton keeps them by.
"""

import random
import sys
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lora_kernels import attention, attention_kernels, delta_kernels, fused, host_reads
from lora_kernels.launching import Launcher
from lora_kernels.lora import TritonLora
from lora_kernels.reference import Directory

TARGET = GPUTarget("cuda", 90, 32)


class Driver:
    device = 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device


DRIVER = Driver()


class Kernel:
    """One that Triton has compiled. Its launches are listed: grid, stream and arguments."""

    def __init__(self, function: JITFunction, key: object) -> None:
        self.name, self.key = function.fn.__name__, key
        self.function, self.packed_metadata = object(), object()
        self.metadata = SimpleNamespace(target=TARGET)

    def launch_metadata(self, grid: object, stream: object, *arguments: object) -> None:
        return None

    def run(self, *passed: Any) -> None:
        assert passed[4:6] == (self.function, self.packed_metadata)
        plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in passed[9:]]
        LAUNCHED.append((self, passed[:4], plain))
        ADDRESSES.append([isinstance(x, torch.Tensor) for x in passed[9:]])


LAUNCHED: list[tuple[Kernel, tuple[Any, ...], list[Any]]] = []
ADDRESSES: list[list[bool]] = []
# By Triton: what was launched without a Launcher's knowing of one alike.
RUNS: list[str] = []
SEEN: set[str] = set()


class OnDevice(torch.Tensor):
    """Says so, at least; a view of it does too."""

    is_cpu = False  # type: ignore[assignment]


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


def pretend() -> None:
    """From now on nothing is compiled, and Triton's own launches are counted."""
    triton.runtime.driver.set_active(DRIVER)
    run = JITFunction.run

    def compiled(self: Any, key: object, signature: Any, device: int, *rest: Any) -> Kernel:
        kernel = Kernel(self, key)
        self.device_caches[device][0][key] = kernel
        return kernel

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        RUNS.append(self.fn.__name__)
        return run(self, *arguments, **options)

    JITFunction._do_compile = compiled
    JITFunction.run = counted


def checked(launcher: Launcher, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """By the launcher twice, so that one of them is like the one before, and by Triton."""
    launch = launcher._launch
    launch(grid, *arguments, **constants)
    before = len(RUNS)
    launch(grid, *arguments, **constants)
    assert len(RUNS) == before, f"{RUNS[-1]}: a launch like one before was Triton's own"
    launcher.kernel[grid](*arguments, **launcher._bound, **constants)
    first, second, wanted = LAUNCHED[-3:]
    assert first == second == wanted, f"{wanted[0].name}: {second} instead of {wanted}"
    for argument, as_tensor in zip(arguments, ADDRESSES[-2], strict=False):
        assert as_tensor == (type(argument) is torch.Tensor)
    SEEN.add(wanted[0].name)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["loose"])
def toy(x, loose, size, count, scale, BLOCK: tl.constexpr, OTHER: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


def every() -> None:
    """All that Triton may specialize on, in any order: each launch has the kernel that it would
    have of Triton, whatever was launched before.
    """
    integers = [1, 2, 16, 24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 0, -1, -16, -(2**31)]
    integers += [-(2**31) - 1, -(2**63)]
    memory = [torch.empty(64, dtype=kind) for kind in (torch.float16, torch.float32, torch.int8)]
    tensors = [on_device(m) if on else m for m in memory[:2] for on in (False, True)]
    tensors += [memory[1][4:], *(memory[2][begin:] for begin in (1, 2, 4, 8, 15, 16, 24, 32))]
    constants = [{"BLOCK": 1, "OTHER": 2}, {"OTHER": 1, "BLOCK": 2}, {"BLOCK": 2, "OTHER": None}]
    options = [{}, {"num_warps": 1}, {"num_warps": 2}, {"num_stages": 2}]
    launcher = Launcher(toy)
    bound = [launcher.bound(**each) for each in constants]
    rng = random.Random(0)
    # What differs in one way only comes first.
    one = (tensors[0], tensors[0], 2, 2, 0.5)
    variants = [one, *((t, *one[1:]) for t in tensors), *((one[0], t, *one[2:]) for t in tensors)]
    variants += [(*one[:2], size, 2, 0.5) for size in integers]
    variants += [(*one[:3], count, 0.5) for count in integers]
    variants += [(*one[:4], scale) for scale in (1.0, 0.0, 0, 1, 16, 7)]
    for _ in range(1000):
        x, loose = rng.choice(tensors), rng.choice(tensors)
        variants.append((x, loose, rng.choice(integers), rng.choice(integers), 1.0))
    for arguments, which, option, device in (
        *product(variants[:60], (0,), options[:1], (0, 1)),
        *product(variants[:2], (0, 1, 2), options, (0, 1)),
        *((v, rng.randrange(3), rng.choice(options), rng.randrange(2)) for v in variants),
    ):
        DRIVER.device = device
        checked(launcher, (3, 2, 1)[: 1 + which], *arguments, **constants[which], **option)
        checked(bound[which], (5,), *arguments, **option)


def bounded() -> None:
    """Whatever rows and tokens there are: no more variants."""
    launcher, x = Launcher(toy), torch.empty(2000, dtype=torch.int8)
    for count in range(1000):
        launcher[(count,)](x, x[count:], 16, count, count / 7, BLOCK=1, OTHER=2)
    assert len(launcher._compiled) == 1 and RUNS == ["toy"]


def package() -> None:
    """Every kernel, as the package launches it, over whatever shapes, types and addresses."""
    Launcher.__getitem__ = lambda self, grid: (
        lambda *arguments, **constants: checked(self, grid, *arguments, **constants)
    )
    for number, dtype in product(range(6), (torch.float16, torch.bfloat16, torch.float32)):
        make = Make(random.Random(number), dtype)
        for launches in (between_matmuls, over_pages, deltas):
            for _ in range(3):
                launches(make)
    modules = (attention_kernels, delta_kernels, fused, host_reads)
    launchers = [x for module in modules for x in vars(module).values() if isinstance(x, Launcher)]
    assert len(launchers) == 12
    assert {launcher.kernel.fn.__name__ for launcher in launchers} == SEEN


class Make:
    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        self.rng, self.dtype = rng, dtype

    def tensor(self, *size: int, dtype: torch.dtype | None = None, pitch: int = 0) -> torch.Tensor:
        """At any address, and rows apart by `pitch` more than they are long."""
        *outer, last = size
        count, begin = (last + pitch) * int(np.prod(outer)), self.rng.choice((0, 0, 1, 8))
        flat = on_device(torch.zeros(begin + count, dtype=dtype or self.dtype))
        return flat[begin:].view(*outer, last + pitch)[..., :last]

    def integers(self, *size: int) -> torch.Tensor:
        return self.tensor(*size, dtype=torch.int32)


def between_matmuls(make: Make) -> None:
    pick = make.rng.choice
    rows, hidden, pitch = pick((1, 3, 300)), pick((1, 33, 64)), pick((0, 1, 16))
    x, weight = make.tensor(rows, hidden, pitch=pitch), make.tensor(hidden)
    fused.rms_norm(x, weight, 1e-5)
    fused.add_rms_norm(x, make.tensor(rows, hidden), weight, 1e-5, pick((1.0, 0.5)))
    gated = pick((fused.silu_mul, fused.gelu_mul))
    gated(make.tensor(rows, 2 * hidden, pitch=pitch))
    size, kv_heads = pick((16, 24)), pick((1, 2))
    qkv, at = make.tensor(rows, 4 + 2 * kv_heads, size), make.integers(rows)
    cache = make.tensor(4, 2, kv_heads, 16, size)
    norm = pick((None, make.tensor(size)))
    cos, sin = make.tensor(9, size), make.tensor(9, size)
    fused.rotary_store(qkv, at, cos, sin, cache[:, 0], cache[:, 1], at, norm, norm, 1e-6)
    chances = make.tensor(rows, dtype=torch.float32)
    fused.choose(make.tensor(rows, pick((2048, 2049, 5000))), chances, chances)
    host_reads.fetch_kernel[(1,)](at, make.integers(rows), rows, BLOCK=1024)


def over_pages(make: Make) -> None:
    pick = make.rng.choice
    heads, kv_heads, size = pick((4, 8)), pick((1, 2)), pick((64, 80))
    rows, pages = pick((1, 3, 64)), pick((16, 17, 1024))
    cache = make.tensor(4, 2, kv_heads, pick((16, 32)), size)
    keys, values = cache[:, 0], cache[:, 1]
    q, out = (make.tensor(rows, heads, size) for _ in range(2))
    table, numbers = make.integers(rows, pages), make.integers(rows + 1)
    window, softcap = pick((None, 512)), pick((None, 30.0))
    scratch = on_device(attention.decode_scratch(rows, heads, size, q.device))
    over = (keys, values, table, numbers[:-1])
    attention.decode(q, *over, 0.1, window, softcap, out, scratch)
    over = (keys, values, table, numbers, numbers[1:])
    attention.prefill(q, *over, rows, 0.1, window, softcap, out)


def deltas(make: Make) -> None:
    pick = make.rng.choice
    widths = pick(([(64, 48), (64, 16)], [(33, 1)], [(128, 128)] * 3, [(64, 48)] * 2))
    groups, arena = [[(i, *width) for i, width in enumerate(widths)]], make.tensor(4096)
    directory = Directory(3, 2, len(widths))
    zeros, ranks = np.zeros((2, len(widths)), np.int64), np.full((2, len(widths)), 16, np.int32)
    for slot in (1, 2):
        directory.write(slot, 0, zeros, zeros, ranks, np.ones(ranks.shape, np.float32))
    operation = TritonLora(directory, arena, groups, rank_max=pick((16, 64)))
    operation.reserve(2048)
    for rows in (1, pick((2, 16, 17)), pick((512, 600))):
        operation.begin(([1, 2] * rows)[:rows], pick((None, rows)))
        x = make.tensor(rows, widths[0][0], pitch=pick((0, 1, 16)))
        y = make.tensor(rows, sum(width for _, width in widths), pitch=pick((0, 1, 16)))
        for layer in range(2):
            operation.start(x, layer, 0)
            operation.add(x, y, layer, 0)
            if len(widths) == 2 and widths[0] == widths[1]:
                operation.add_gated(x, y, layer, 0, pick((False, True)))


CASES: dict[str, Callable[[], None]] = {"bounded": bounded, "every": every, "package": package}

if __name__ == "__main__":
    pretend()
    with torch.inference_mode():
        CASES[sys.argv[1]]()
