"""One tile of a kernel: its window pair by pair, and what it accumulates in."""

import math

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attends(nq: int, nk: int, window: Window) -> Tensor:
    """The band inequality, pair by pair of index grids."""
    i, j = torch.meshgrid(torch.arange(nq), torch.arange(nk), indexing="ij")
    left, right = (math.inf if bound is None else bound for bound in window)
    shift = nk - nq
    return (i + shift - left <= j) & (j <= i + shift + right)


def rms(difference: Tensor) -> float:
    """Root mean square: one wrong element shows, and rounding is no lottery as in a maximum."""
    return difference.double().square().mean().sqrt().item()
