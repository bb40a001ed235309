"""Triton kernels whose launches cost the host little.

Triton binds, specializes and looks up the arguments of every launch anew, for tens of microseconds,
and a step without a CUDA graph has hundreds of launches: the device waits for the host. Here a
launch that is like one before goes straight to the kernel that Triton compiled for that one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Those whose way from `JITFunction.run` to the device is known to be the one taken here.
_TRITONS = ("3.6.", "3.7.")


class Launcher:
    """Decorates what `triton.jit` made: `launcher[grid](*arguments, **constants)`.

    arguments: tensors, int and float, in the signature's order. constants: constexprs, which come
    last in the signature, and Triton's options.

    A wrong kernel would be silently wrong, so launches are alike only where all that Triton may
    specialize on is: device, constants, types, how pointers are aligned, and each integer; of one
    that Triton is told not to specialize on, how many bits it takes. Integers that take many values
    (rows, tokens) must be such ones, for each value of another is kept.

    Triton's hooks, and what it reads of its environment, count for the first of launches alike.
    In the interpreter, and with another Triton, every launch is Triton's own.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any] | None = None) -> None:
        self.kernel = kernel
        self._bound = constants or {}
        self._compiled: dict[tuple[object, ...], tuple[Any, list[Any]]] = {}
        if not isinstance(kernel, JITFunction) or not triton.__version__.startswith(_TRITONS):
            self._launch = self._as_triton
            return
        self._constants = [param.name for param in kernel.params if param.is_constexpr]
        arguments = kernel.params[: len(kernel.params) - len(self._constants)]
        assert not any(param.is_constexpr for param in arguments)
        # Of each argument: whether its value counts, whether its alignment does.
        self._counts = [
            (not param.do_not_specialize, not param.do_not_specialize_on_alignment)
            for param in arguments
        ]
        self._launch = self._launch_like_before

    def bound(self, **constants: Any) -> "Launcher":
        """To be kept, and launched without these constants, which takes less time."""
        return Launcher(self.kernel, constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _as_triton(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        return self.kernel[grid](*arguments, **self._bound, **constants)

    def _launch_like_before(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        active = driver.active
        device = active.get_current_device()
        key = [device, *constants, *constants.values()]
        passed = []
        for argument, (by_value, by_alignment) in zip(arguments, self._counts, strict=True):
            kind = type(argument)
            if kind is int:
                key.append(argument if by_value else max(argument, ~argument).bit_length() // 32)
                passed.append(argument)
            elif kind is float:
                key.append(float)
                passed.append(argument)
            else:
                address = argument.data_ptr()
                key.append(argument.dtype)
                key.append(not by_alignment or address % 16 == 0)
                # Of the host's memory Triton looks up the device's address, or refuses it.
                passed.append(argument if argument.is_cpu else address)
        alike = tuple(key)
        found = self._compiled.get(alike)
        if found is None:
            compiled = self._as_triton(grid, *arguments, **constants)
            # None where something makes Triton compile and not launch. Elsewhere than on CUDA more
            # counts of an argument.
            if compiled is not None and compiled.metadata.target.backend == "cuda":
                constants |= self._bound
                self._compiled[alike] = compiled, [constants[name] for name in self._constants]
            return
        compiled, ends = found
        x, y, z = (*grid, 1, 1)[:3]
        stream, function = active.get_current_stream(device), compiled.function
        hooks = None, None, None
        compiled.run(x, y, z, stream, function, compiled.packed_metadata, *hooks, *passed, *ends)
