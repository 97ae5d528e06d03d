"""One pass over memory between kernel calls: results folded, gradients added, rows packed.

On CUDA devices each is one kernel of `passes_triton`, where Triton is installed; the forms here, of PyTorch's own
operators, are for every other device, and the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module, util
from types import ModuleType

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # a target and a source of one shape
Pairs = Sequence[Pair]


def fold_into(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Merges a block's result into a running one in place (`partial.py` has the formula).

    out, block: `[batch, n, heads, dim]`; lse, block_lse: `[batch, heads, n]`, natural log. Any float dtypes, any
    strides; the block may be of a lower precision.
    """
    fused = fused_for(out)
    if fused is not None:
        fused.fold(out, lse, block[None], block_lse[None])
        return
    dtype = out.dtype
    joint, weight = join(lse, block_lse.to(lse.dtype))
    out.lerp_(block if block.dtype == dtype else block.to(dtype), weight.to(dtype))
    lse.copy_(joint)


def fold_all(out: Tensor, lse: Tensor, blocks: Tensor, block_lses: Tensor) -> None:
    """The same for several blocks, `[count, ...]`, one after the other."""
    fused = fused_for(out)
    if fused is not None:
        fused.fold(out, lse, blocks, block_lses)
        return
    for block, block_lse in zip(blocks, block_lses, strict=True):
        fold_into(out, lse, block, block_lse)


def join(lse: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The joint lse, and the block's weight as `[batch, n, heads, 1]`."""
    joint = torch.logaddexp(lse, block_lse)
    # -inf - (-inf) is NaN where both saw nothing; a NaN of the inputs must survive, so only -inf is replaced.
    weight = torch.exp(block_lse - joint).masked_fill_(block_lse == -math.inf, 0.0)
    return joint, weight.transpose(1, 2).unsqueeze(-1)


def accumulate(pairs: Pairs, fresh: bool = False) -> None:
    """Adds each source, `[a, b, c, dim]`, any strides and float dtype, to its target in place; ``fresh``: writes it."""
    fused = fused_for(pairs[0][0])
    if fused is not None:
        fused.accumulate(pairs, fresh)
        return
    for target, source in pairs:
        target.copy_(source) if fresh else target.add_(source)


def fused_for(x: Tensor) -> ModuleType | None:
    """The module whose kernels do it in one pass on the device of a tensor, None where PyTorch's operators are."""
    return _triton() if x.is_cuda else None


@cache
def _triton() -> ModuleType | None:
    return import_module("ringattn.kernels.passes_triton") if util.find_spec("triton") else None
