"""FlashAttention-3 (`flash_attn_interface`, Shah et al. 2024, arXiv 2407.08608): Hopper's own, built from source, or
from Hugging Face's hub of kernels where it is asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from ringattn.kernels.base import Call, Needs, Rows
from ringattn.kernels.flash import Ask, FlashKernel, Gradients, Homes, Operators, written
from ringattn.kernels.partial import Partial


class Package:
    """The operators of an imported `flash_attn_interface`. An absent bound is -1; gradients are written into
    tensors."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, home: Partial | None) -> tuple[Tensor, Tensor]:
        """See `Operators`: it makes its own tensors."""
        if ask.bounds is not None:
            q, k, v = q[0], k[0], v[0]
        out, lse, *_ = self.interface._flash_attn_forward(q, k, v, causal=ask.causal, **_said(ask))
        return (out, lse) if ask.bounds is None else (out[None], lse[None])

    def backward(self, rows: Rows, k: Tensor, v: Tensor, ask: Ask, homes: Homes) -> Gradients:
        """See `Operators`."""
        found = written(rows, k, v, homes)
        given = [rows.dout, rows.q, k, v, rows.out, rows.lse.contiguous(), *found]
        *tensors, dq, dk, dv = given if ask.bounds is None else [x[0] for x in given]
        self.interface._flash_attn_backward(
            *tensors, dq=dq, dk=dk, dv=dv, is_causal=ask.causal, deterministic=ask.deterministic, **_said(ask)
        )
        return found


def _said(ask: Ask) -> dict[str, Any]:
    """What both directions are told alike."""
    left, right = ask.signed
    return {
        "softmax_scale": ask.scale, "window_size_left": left, "window_size_right": right,
        "softcap": ask.softcap or 0.0, "sm_margin": ask.sm_margin, **ask.sequences,
    }  # fmt: skip


@cache
def load() -> Package:
    """Imports the package."""
    return Package(import_module("flash_attn_interface"))


@dataclass(frozen=True)
class Flash3(FlashKernel):
    """The `flash3` kernel; see the module's docstring."""

    load: Callable[[], Operators] = load

    name = "flash3"
    needs = Needs(
        frozenset({"cuda"}),
        (9, 0),
        (10, 0),
        modules={"flash_attn_interface": "build it from flash-attention's folder hopper, or name kernel='hub_flash3'"},
    )
    leaves_sms = True
    written_for = "flash_attn_interface of flash-attention's folder hopper, August 2026, built from source"

    def lacks(self, call: Call) -> str | None:
        """See `FlashKernel`."""
        if call.v_head_dim != call.head_dim:
            return f"v_head_dim {call.v_head_dim} must equal head_dim {call.head_dim}"
        if call.deterministic and call.head_dim > 192:
            return f"head_dim {call.head_dim} must be at most 192 for a deterministic backward"
        return None
