"""FlashAttention-4 (`flash-attn-4`): the fastest kernel on Hopper and Blackwell, of wheels alone;
each variant is compiled at its first call (2 to 5 s; `FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1` keeps them on disk).

What its operators do not say of themselves, as read in 4.0.0b36 and as users have met it:

* an absent bound is None: -1 is a bound, and two negative ones are taken for none, so an empty band would be a full
  one; tiles are trimmed and never empty;
* sinks belong into the merge once, not into each block;
* gradients are overwritten, in the dtype of q, and lse is read as contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from ringattn.kernels.base import Call, Needs, Rows
from ringattn.kernels.flash import Ask, FlashKernel, Gradients, Homes, Operators
from ringattn.kernels.partial import Partial

# 4.6.0 and 4.6.1 of the compiler make a backward that never returns (Dao-AILab/flash-attention #2797).
PACKAGES = {"flash-attn-4": ">=4.0.0b36", "nvidia-cutlass-dsl": ">=4.6.2"}


class Package:
    """The operators of an imported `flash_attn.cute.interface`."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, home: Partial | None) -> tuple[Tensor, Tensor]:
        """See `Operators`."""
        if ask.bounds is not None:
            q, k, v = q[0], k[0], v[0]
            home = None if home is None else Partial(home.out[0], home.lse[0])
        out, lse = (None, None) if home is None else (home.out, home.lse)
        found = self.interface._flash_attn_fwd(q, k, v, return_lse=True, out=out, lse=lse, **_said(ask))
        out, lse = found[:2]
        return (out, lse) if ask.bounds is None else (out[None], lse[None])

    def backward(self, rows: Rows, k: Tensor, v: Tensor, ask: Ask, homes: Homes) -> Gradients:
        """See `Operators`."""
        lse = rows.lse.contiguous()
        dlse = None if rows.dlse is None else rows.dlse.float().contiguous()
        given = [rows.q, k, v, rows.out, rows.dout, lse, dlse, *homes]
        if ask.bounds is not None:
            given = [None if x is None else x[0] for x in given]
        *tensors, dlse, dq, dk, dv = given
        found = self.interface._flash_attn_bwd(
            *tensors, dlse=dlse, dq=dq, dk=dk, dv=dv, deterministic=ask.deterministic, **_said(ask)
        )
        dq, dk, dv = found[:3] if ask.bounds is None else (x[None] for x in found[:3])
        return dq, dk, dv


def _said(ask: Ask) -> dict[str, Any]:
    """A tile as the package's arguments."""
    left, right = ask.window
    return {
        "softmax_scale": ask.scale, "causal": ask.causal, "softcap": ask.softcap or 0.0, "window_size_left": left,
        "window_size_right": None if ask.causal else right, **ask.sequences,
    }  # fmt: skip


@cache
def load() -> Package:
    """Imports the package."""
    return Package(import_module("flash_attn.cute.interface"))


@dataclass(frozen=True)
class Flash4(FlashKernel):
    """The `flash4` kernel; see the module's docstring."""

    load: Callable[[], Operators] = load

    name = "flash4"
    needs = Needs(frozenset({"cuda"}), (9, 0), (12, 0), PACKAGES, "--pre 'ringattn[flash4]'")
    takes_dlse = True
    written_for = "flash-attn-4 4.0.0b36 with nvidia-cutlass-dsl 4.8.1 and quack-kernels 0.6.5"

    def lacks(self, call: Call) -> str | None:
        """See `FlashKernel`."""
        dims = call.head_dim, call.v_head_dim
        hopper, large = call.capability < (10, 0), dims == (256, 256)
        if hopper:
            if call.head_dim != call.v_head_dim and call.num_heads != call.num_kv_heads:
                return (
                    f"v_head_dim {dims[1]} must equal head_dim {dims[0]} where heads share KV heads, for its backward"
                )
            return None
        if max(dims) > 128 and not large:  # (192, 128) is computed, with wrong gradients: flash-attention #2087
            return f"head_dim {dims[0]} and v_head_dim {dims[1]} must be at most 128, or both 256, on this device"
        asked = {"a window": call.windowed, "softcap": "softcap" in call.features, "a gradient of lse": call.dlse}
        if large and any(asked.values()):
            listed = ", ".join(name for name, wanted in asked.items() if wanted)
            return f"{listed}: not computed with head_dim 256 on this device, whose kernel is full or causal alone"
        return None
