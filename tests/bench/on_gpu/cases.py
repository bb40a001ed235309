"""One thing that is checked: what a kernel gave, and what it should have given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Case:
    """run: the kernel on fresh outputs. wanted: what should come of it. exact: bit by bit."""

    name: str
    run: Callable[[], torch.Tensor]
    wanted: Callable[[], torch.Tensor]
    exact: bool = False


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ ÷ ‖wanted‖ (Frobenius), in float64."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-30))


def farthest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference ÷ the largest value."""
    difference = (found.double() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max().clamp(min=1e-30))
