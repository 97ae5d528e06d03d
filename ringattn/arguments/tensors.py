"""The rules of tensor arguments: what every door of the library asks of a tensor before it looks at its shape."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ringattn.arguments.values import integer, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain(name: str, x: object) -> Tensor:
    """A dense tensor whose values can be read and copied row by row."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {_article(type(x).__name__)}: must be a tensor; torch.as_tensor() makes one")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor: must be a dense one; ringattn.pack() packs rows of many lengths")
    if x.layout != torch.strided:
        raise ValueError(f"{name} has the layout {x.layout}: must be a dense tensor (torch.strided); pass x.to_dense()")
    if x.is_quantized:
        raise ValueError(f"{name} is quantized, {x.dtype}: must be a dense tensor of numbers; pass x.dequantize()")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values: must lie on a real one")
    return x


def dim_of(x: Tensor, dim: object) -> int:
    """A dim of ``x``, counted from 0."""
    rule = f"dim={shown(dim)} of a tensor of shape {tuple(x.shape)}: name the dim of the tokens"
    if not x.ndim:
        raise ValueError(rule)
    try:
        return integer("dim", dim, -x.ndim, x.ndim - 1) % x.ndim
    except ValueError:
        raise ValueError(f"{rule}, an integer from {-x.ndim} to {x.ndim - 1}") from None


def fits(dtype: torch.dtype, fill: object) -> float:
    """A number that a tensor of this dtype can hold: as it is, or rounded where the dtype rounds."""
    value = fill.item() if isinstance(fill, np.generic) else fill
    if not _holds(dtype, value):
        raise ValueError(f"fill={shown(fill)}: must be a number that {dtype} can hold")
    return value  # type: ignore[return-value]


def _holds(dtype: torch.dtype, fill: object) -> bool:
    if not isinstance(fill, (bool, int, float, complex)) or (isinstance(fill, bool) and dtype != torch.bool):
        return False
    try:
        kept = torch.full((), fill, dtype=dtype, device="cpu").item()
    except (RuntimeError, TypeError, OverflowError):
        return False
    if dtype.is_floating_point or dtype.is_complex:
        exact = torch.full((), fill, dtype=torch.complex128, device="cpu")
        return bool(torch.tensor(kept, dtype=torch.complex128, device="cpu").isfinite() == exact.isfinite())
    return bool(kept == fill)


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
