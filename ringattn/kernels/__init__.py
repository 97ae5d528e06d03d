"""Kernels compute tiles. `KERNELS` is the order of preference of `choose("auto", ...)`."""

from ringattn.kernels.base import Call, Grads, Kernel, Rows, choose
from ringattn.kernels.blockwise import Blockwise
from ringattn.kernels.calls import TileCalls, tile_calls
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.kernels.triton_tiles import Triton

KERNELS: tuple[Kernel, ...] = (Sdpa(), Triton(), Blockwise(), Reference())

__all__ = ["KERNELS", "Call", "Grads", "Kernel", "Rows", "TileCalls", "choose", "tile_calls"]
