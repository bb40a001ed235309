"""What a CUDA graph does, on a CPU: operations recorded once, and done again on the same memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from replica.model.graphs import Work


class Recorder:
    """A capture. Like a graph's, its replays run nothing of what decided on the operations: every
    grid, number and address is that of the capture.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.replays = 0
        self._recording: list[Work] | None = None
        launch = GridExecutor.__call__

        def recorded(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            if self._recording is not None:
                self._recording.append(lambda: launch(executor, *args, **kwargs))

        patch.setattr(GridExecutor, "__call__", recorded)

    def __call__(self, work: Work) -> Work:
        calls: list[Work] = []
        self._recording = calls
        with _Operations(calls):
            work()
        self._recording = None

        def replay() -> None:
            self.replays += 1
            for call in calls:
                call()

        return replay


class _Operations(TorchDispatchMode):
    """Torch's operations; what one makes anew is copied to where it was at first."""

    def __init__(self, calls: list[Work]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if "empty" not in func.__name__:
            self._calls.append(_again(func, args, kwargs or {}, made))
        return made


def _again(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], made: Any
) -> Work:
    def call() -> None:
        again = func(*args, **kwargs)
        for old, new in zip(_tensors(made), _tensors(again), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    return call


def _tensors(made: Any) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    return [tensor for tensor in made or () if isinstance(tensor, torch.Tensor)]
