"""FlashAttention-4 over a block map (`flash-attn-4`): a stage's whole table of tiles as one block-sparse call, forward
and backward, for masks in many pieces.

What its operators do not say of themselves, as read in 4.0.0b36:

* with a mask of one's own forward forgets `causal` and the window, and backward does not: neither is ever given;
* backward must be given the blocks transposed, and without them computes all of them;
* a block that is listed as full is never asked for its pairs, and only the last of a list for what lies beyond the last
  column: a block at an edge is a block with some pairs;
* gradients of a query are added up in any order, and are overwritten, in the dtype of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.geometry.frames import Frame
from ringattn.geometry.tiles import RowIndex, Tile, Tiles
from ringattn.kernels import flash4
from ringattn.kernels.base import Call, Grads, Rows
from ringattn.kernels.block_map import BlockMap, BlockSize, Lists, block_map, listed
from ringattn.kernels.calls import TileCalls, tile_calls
from ringattn.kernels.flash import Ask, Gradients, Homes, Operators, beyond_all, probe
from ringattn.kernels.partial import Partial, fold
from ringattn.kernels.pieces import TileBand
from ringattn.kernels.scores import Scores
from ringattn.planning.launches import launches
from ringattn.version import VERSION

BLACKWELL = (10, 0)
CALL = 256  # blocks of a map that take as long as one more call, with rows to gather and results to fold: assumed
BEYOND = 1 << 40  # rows: more than there are


def block_size(head_dim: int, capability: tuple[int, int]) -> BlockSize:
    """The blocks that the package computes on a device, forward and backward."""
    if capability >= BLACKWELL:
        return BlockSize(256, 128)
    return BlockSize(128, 128 if head_dim <= 128 else 96 if head_dim <= 192 else 64)


@dataclass(frozen=True, eq=False)
class Fresh:
    """What is to be done with local rows, or columns, that hold nothing yet. ``written``: they are all those of a map,
    which are then written. ``cleared``: the others, which are cleared and added to."""

    written: bool
    cleared: Tensor | None

    @staticmethod
    def of(sides: Iterable[RowIndex], mapped: slice, device: torch.device) -> Fresh:
        """For the rows of fresh launches."""
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *map(listed, sides)]))
        inside = (rows >= mapped.start) & (rows < mapped.stop)
        written = int(inside.sum()) == mapped.stop - mapped.start
        rows = rows[~inside] if written else rows
        return Fresh(written, torch.from_numpy(rows).to(device) if len(rows) else None)

    def clear(self, x: Tensor, dim: int, value: float = 0.0) -> None:
        """Before anything is added to them."""
        if self.cleared is not None:
            x.index_fill_(dim, self.cleared, value)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A map on the device. ``by_row`` and ``by_col``: counts and indices of blocks with some pairs, and of full ones,
    ``[1, 1, m]`` and ``[1, 1, m, most]``; ``pairs``: places and bits."""

    size: BlockSize
    rows: slice
    cols: slice
    by_row: tuple[Tensor, ...]
    by_col: tuple[Tensor, ...]
    pairs: list[Tensor]

    @staticmethod
    def of(made: BlockMap, device: torch.device) -> Blocks:
        def lists(some: Any, full: Any) -> tuple[Tensor, ...]:
            return tuple(on_device(x[None, None]) for flags in (some, full) for x in Lists.of(flags))

        def on_device(x: Any) -> Tensor:
            return torch.from_numpy(x).to(device)

        by_row, by_col = lists(made.some, made.full), lists(made.some.T, made.full.T)
        pairs = [on_device(made.places), on_device(made.bits)]
        return Blocks(made.size, made.rows, made.cols, by_row, by_col, pairs)


@dataclass(frozen=True, eq=False)
class MappedCalls(TileCalls):
    """Tiles for this kernel: those of the map, and those that are calls of their own."""

    blocks: Blocks
    fresh: Fresh
    fresh_keys: Fresh
    rest: TileCalls | None


class Package:
    """The operators of an imported `flash_attn.cute.interface`, asked for the blocks of a map. ``mask``: what they ask
    of a pair, for blocks of a size."""

    def __init__(self, interface: Any, mask: Callable[[BlockSize], Any]) -> None:
        self.interface, self.mask, self.tiles = interface, mask, flash4.Package(interface)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scores: Scores | Ask) -> tuple[Tensor, Tensor]:
        """Out, 0 in rows that see nothing, and lse, -inf there."""
        said = self._said(blocks, blocks.by_row, scores)
        out, lse = self.interface._flash_attn_fwd(q, k, v, return_lse=True, **said)[:2]
        return out, lse

    def backward(self, rows: Rows, k: Tensor, v: Tensor, blocks: Blocks, scores: Scores | Ask) -> Gradients:
        """``dq, dk, dv`` in the dtype of q."""
        dlse = None if rows.dlse is None else rows.dlse.float().contiguous()
        dq, dk, dv = self.interface._flash_attn_bwd(
            rows.q, k, v, rows.out, rows.dout, rows.lse.contiguous(), dlse=dlse,
            **self._said(blocks, blocks.by_col, scores),
        )[:3]  # fmt: skip
        return dq, dk, dv

    def _said(self, blocks: Blocks, lists: tuple[Tensor, ...], scores: Scores | Ask) -> dict[str, Any]:
        return {
            "softmax_scale": scores.scale, "softcap": scores.softcap or 0.0, "causal": False,
            "mask_mod": self.mask(blocks.size), "aux_tensors": blocks.pairs,
            "block_sparse_tensors": self.interface.BlockSparseTensorsTorch(*lists, block_size=tuple(blocks.size)),
        }  # fmt: skip


@cache
def load() -> Package:
    """Imports the package."""
    return Package(import_module("flash_attn.cute.interface"), mask_mod)


@cache
def mask_mod(size: BlockSize) -> Any:
    """Whether a pair attends, as the package compiles it into its kernels; ``tensors`` are places and bits."""
    cute, cutlass, utils = map(import_module, ("cutlass.cute", "cutlass", "flash_attn.cute.utils"))

    @cute.jit
    def attends(batch: Any, head: Any, q: Any, k: Any, seqlen: Any, tensors: Any) -> Any:
        bit = size.attends(tensors[0], tensors[1], q[0], k[0])
        return utils.scalar_to_ssa(bit != 0, cutlass.Boolean)

    attends.__cute_hash__ = f"ringattn {VERSION}: pairs of {size}"  # the package's own sees only the lines above
    return attends


@dataclass(frozen=True)
class OneWindow:
    """The package asked for one windowed tile, as :func:`probe` asks."""

    load: Callable[[], Package]
    capability: tuple[int, int]

    def __call__(self) -> Operators:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, home: Partial | None) -> tuple[Tensor, Tensor]:
        """See `Operators`."""
        return self.load().forward(q, k, v, self._blocks(q, k, ask), ask)

    def backward(self, rows: Rows, k: Tensor, v: Tensor, ask: Ask, homes: Homes) -> Gradients:
        """See `Operators`."""
        return self.load().backward(rows, k, v, self._blocks(rows.q, k, ask), ask)

    def _blocks(self, q: Tensor, k: Tensor, ask: Ask) -> Blocks:
        band = TileBand.of(q.shape[1], k.shape[1], ask.window)
        lo, hi = 1 - band.nq if band.lo is None else band.lo, band.nk - 1 if band.hi is None else band.hi
        tiles = Tiles(np.array([[0, band.nq, 1, 0, band.nk, 1, lo, hi]]))
        return Blocks.of(block_map(tiles, block_size(q.shape[3], self.capability)), q.device)


@dataclass(frozen=True)
class Flash4Blocks:
    """The `flash4_blocks` kernel; see the module's docstring."""

    load: Callable[[], Package] = load

    name = "flash4_blocks"
    needs = flash4.Flash4.needs
    reads_delta, leaves_sms, takes_lists = False, False, True
    named_only = frozenset({"cuda"})  # its rate follows from how full blocks are, which no table of rates tells

    def fitted(self, call: Call) -> Flash4Blocks:
        """See `Kernel`."""
        return self

    def direct(self, call: Call) -> bool:
        """See `Kernel`."""
        return True

    def refuse(self, call: Call) -> str | None:
        """See `Kernel`."""
        if call.deterministic:
            return "its backward adds gradients of a query up in any order; kernel='triton' has one order"
        reason = beyond_all(call, self.name, 256 if call.capability < BLACKWELL else 128)
        written_for = flash4.Flash4.written_for
        asked = OneWindow(self.load, call.capability)
        return reason or self.tiles.lacks(call) or probe(asked, self.name, written_for, call.device_type)

    @property
    def tiles(self) -> flash4.Flash4:
        """What computes the tiles that are calls of their own."""
        return flash4.Flash4(lambda: self.load().tiles)

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """See `Kernel`."""
        size = block_size(call.head_dim, call.capability)
        mapped, apart = divided(calls.tiles, size)
        if not len(mapped):
            return self.tiles.ready(calls, call)
        blocks = Blocks.of(block_map(mapped, size), calls.device)
        fresh = Fresh.of((x.q for x in calls.launches if x.fresh), blocks.rows, calls.device)
        fresh_keys = Fresh.of((x.k for x in calls.launches if x.fresh_keys), blocks.cols, calls.device)
        rest = self.tiles.ready(_calls_of(apart, calls), call) if len(apart) else None
        given = calls.tiles, calls.launches, (), calls.scores, calls.place, calls.device
        return MappedCalls(*given, blocks, fresh, fresh_keys, rest)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, calls: TileCalls, acc: Partial) -> None:
        """See `Kernel`."""
        if not isinstance(calls, MappedCalls):
            return self.tiles.forward(q, k, v, calls, acc)
        blocks, fresh = calls.blocks, calls.fresh
        fresh.clear(acc.out, 1)
        fresh.clear(acc.lse, 2, -math.inf)
        out, lse = self.load().forward(q[:, blocks.rows], k[:, blocks.cols], v[:, blocks.cols], blocks, calls.scores)
        fold(acc.rows(blocks.rows), out, lse, fresh.written)
        if calls.rest is not None:
            self.tiles.forward(q, k, v, calls.rest, acc)

    def backward(self, rows: Rows, k: Tensor, v: Tensor, calls: TileCalls, grads: Grads) -> None:
        """See `Kernel`."""
        if not isinstance(calls, MappedCalls):
            return self.tiles.backward(rows, k, v, calls, grads)
        blocks, fresh, fresh_keys = calls.blocks, calls.fresh, calls.fresh_keys
        for x, some in ((grads.dq, fresh), (grads.dk, fresh_keys), (grads.dv, fresh_keys)):
            if x is not None:
                some.clear(x, 1)
        part, cols = rows.rows(blocks.rows), blocks.cols
        found = self.load().backward(part, k[:, cols], v[:, cols], blocks, calls.scores)
        at = (slice(None), blocks.rows), (slice(None), cols)
        grads.views(*at, fresh.written, fresh_keys.written).take(*found)
        if calls.rest is not None:
            self.tiles.backward(rows, k, v, calls.rest, grads)


def divided(tiles: Tiles, size: BlockSize) -> tuple[Tiles, Tiles]:
    """The tiles that a map is made of, and those that are computed apart: stepped or scattered tokens that lie in many
    blocks, and would be few if they were gathered."""
    q0, nq, qs, k0, nk, ks, _, _ = tiles.boxes.T
    stepped = (qs > 1) & (nq > 1) | (ks > 1) & (nk > 1)
    met = [
        np.minimum((first + (count - 1) * step) // side - first // side + 1, count)
        for first, count, step, side in ((q0, nq, qs, size.rows), (k0, nk, ks, size.cols))
    ]
    gathered = (-nq // size.rows) * (-nk // size.cols)
    apart = stepped & (CALL + gathered < met[0] * met[1])
    products: tuple[list[Tile], list[Tile]] = [], []
    for tile in tiles.products:
        sides = [(listed(rows), side) for rows, side in zip((tile.q, tile.k), size, strict=True)]
        gathered = math.prod(-(-len(rows) // side) for rows, side in sides)
        products[CALL + gathered < math.prod(len(np.unique(rows // side)) for rows, side in sides)].append(tile)
    return Tiles(tiles.boxes[~apart], tuple(products[0])), Tiles(tiles.boxes[apart], tuple(products[1]))


def _calls_of(tiles: Tiles, calls: TileCalls) -> TileCalls:
    """Some of the tiles as calls, that find nothing fresh."""
    beyond = Frame(np.array([[0, BEYOND, 1]]))  # no rows are all of it
    made = tuple(launches(tiles))
    return tile_calls(tiles, made, (beyond, beyond), calls.scores, slice(0, 0), calls.device)
