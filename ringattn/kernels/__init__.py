"""Kernels compute tiles. `KERNELS` is the order in which `choose("auto", ...)` asks them, and prefers them where
nothing is known of their rates."""

from ringattn.kernels.base import Call, Grads, Kernel, Rows
from ringattn.kernels.blockwise import Blockwise
from ringattn.kernels.calls import TileCalls, tile_calls
from ringattn.kernels.choice import Selection, choose
from ringattn.kernels.flash2 import Flash2
from ringattn.kernels.flash3 import Flash3
from ringattn.kernels.flash4 import Flash4
from ringattn.kernels.flash4_blocks import Flash4Blocks
from ringattn.kernels.hub import HubFlash2, HubFlash3
from ringattn.kernels.largest import Largest
from ringattn.kernels.rates import rates_of
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.kernels.triton_tiles import Triton

KERNELS: tuple[Kernel, ...] = (
    Flash4(), Flash3(), Flash2(), Sdpa(), Triton(), Blockwise(), Reference(), Flash4Blocks(), HubFlash3(),
    HubFlash2(),
)  # fmt: skip

__all__ = [
    "KERNELS", "Call", "Grads", "Kernel", "Largest", "Rows", "Selection", "TileCalls", "choose", "rates_of",
    "tile_calls",
]  # fmt: skip
