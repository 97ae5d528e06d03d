"""FlashAttention-2 (`flash-attn`, Dao 2023, arXiv 2307.08691): the fastest on Ampere, built from source or of its
wheels, or from Hugging Face's hub of kernels where it is asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.base import Call, Grads, Needs, Rows
from ringattn.kernels.calls import TileCalls
from ringattn.kernels.flash import Ask, FlashKernel, Gradients, Homes, Operators, written
from ringattn.kernels.packed import packed
from ringattn.kernels.partial import Partial
from ringattn.kernels.pieces import TileBand, flash_runs
from ringattn.kernels.scores import TileScores


class Package:
    """The operators of an imported `flash_attn.flash_attn_interface`. An absent bound is -1; gradients are written into
    tensors."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, home: Partial | None) -> tuple[Tensor, Tensor]:
        """See `Operators`: it makes its own tensors."""
        forward, packed = self.interface._flash_attn_forward, ask.bounds is not None
        if packed:
            forward, q, k, v = self.interface._flash_attn_varlen_forward, q[0], k[0], v[0]
        out, lse, *_ = forward(q, k, v, **_said(ask), return_softmax=False)
        return (out[None], _as_seen(lse[None])) if packed else (out, _as_seen(lse))

    def backward(self, rows: Rows, k: Tensor, v: Tensor, ask: Ask, homes: Homes) -> Gradients:
        """See `Operators`."""
        found, backward = written(rows, k, v, homes), self.interface._flash_attn_backward
        given = [rows.dout, rows.q, k, v, rows.out, rows.lse.contiguous(), *found]
        if ask.bounds is not None:
            backward, given = self.interface._flash_attn_varlen_backward, [x[0] for x in given]
        *tensors, dq, dk, dv = given
        backward(*tensors, dq=dq, dk=dk, dv=dv, deterministic=ask.deterministic, **_said(ask))
        return found


def _said(ask: Ask) -> dict[str, Any]:
    left, right = ask.signed
    return {
        "dropout_p": 0.0, "softmax_scale": ask.scale, "causal": ask.causal, "window_size_left": left,
        "window_size_right": right, "softcap": ask.softcap or 0.0, "alibi_slopes": None, **ask.sequences,
    }  # fmt: skip


def _as_seen(lse: Tensor) -> Tensor:
    """The operator's lse of a row that sees NaN is inf."""
    return lse.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)


@cache
def load() -> Package:
    """Imports the package."""
    return Package(import_module("flash_attn.flash_attn_interface"))


@dataclass(frozen=True)
class Flash2(FlashKernel):
    """The `flash2` kernel; see the module's docstring. A window that its operator gets wrong is cut by rows."""

    load: Callable[[], Operators] = load

    name = "flash2"
    needs = Needs(frozenset({"cuda"}), (8, 0), packages={"flash-attn": ">=2.7"})
    written_for = "flash-attn 2.8"

    def lacks(self, call: Call) -> str | None:
        """See `FlashKernel`."""
        same = call.v_head_dim == call.head_dim
        return None if same else f"v_head_dim {call.v_head_dim} must equal head_dim {call.head_dim}"

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """See `Kernel`: of packed tiles only such as are right however long they are."""
        return packed(calls, lambda window: window in ((None, None), (window[0], 0)))

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        runs = _cut(q, k, scores)
        if runs is None:
            super().forward_tile(q, k, v, scores, acc, fresh)
            return
        for rows, cols, band in runs:
            told = replace(scores, window=band.window)
            super().forward_tile(q[:, rows], k[:, cols], v[:, cols], told, acc.rows(rows), fresh)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        runs = _cut(rows.q, k, scores)
        if runs is None:
            super().backward_tile(rows, k, v, scores, grads)
            return
        grads = grads.begun()
        for some, cols, band in runs:
            told, home = replace(scores, window=band.window), grads.tile(some, cols)
            super().backward_tile(rows.rows(some), k[:, cols], v[:, cols], told, home)


def _cut(q: Tensor, k: Tensor, scores: TileScores) -> list[tuple[slice, slice, TileBand]] | None:
    """Rows and columns of a tile that are a call each; None where all of it is one."""
    if scores.bounds is not None:
        return None
    runs = flash_runs(TileBand.of(q.shape[1], k.shape[1], scores.window))
    return None if len(runs) == 1 else [(run.rows, run.cols, run.band) for run in runs]
