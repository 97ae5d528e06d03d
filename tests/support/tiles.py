"""One tile of a kernel: its window pair by pair, what it accumulates in, and kernels of tables asked for one tile."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels import Call, Grads, Kernel, Rows, TileCalls
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Place, Scores, TileScores
from ringattn.planning.launches import Launch

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


class OneTile:
    """A kernel of whole tables with the methods of a `TileKernel`: its table is one tile."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name, self.needs, self.refuse = kernel, kernel.name, kernel.needs, kernel.refuse

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        calls, _ = self._calls(q, k, v, scores, fresh)
        self.kernel.forward(q, k, v, calls, acc)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        calls, mine = self._calls(rows.q, k, v, scores, grads.fresh, grads.fresh_keys)
        self.kernel.backward(rows, k, v, calls, grads)
        if mine.dbias is not None:
            scores.call.dbias[:, :, scores.place.rows] += mine.dbias

    def _calls(
        self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, fresh: bool, fresh_keys: bool = False
    ) -> tuple[TileCalls, Scores]:
        """A tile's rows are the whole index space, so a bias is that of these rows alone."""
        (nq, heads), (nk, kv_heads), call, place = q.shape[1:3], k.shape[1:3], scores.call, scores.place
        left, right = scores.window
        lo = 1 - nq if left is None else nk - nq - left
        hi = nk - 1 if right is None else nk - nq + right
        tiles = Tiles(np.array([(0, nq, 1, 0, nk, 1, max(lo, 1 - nq), min(hi, nk - 1))]))
        mine = Scores(scores.scale, scores.softcap)
        if call is not None and place is not None:
            bias = None if call.bias is None else call.bias[:, :, place.rows]
            dbias = None if call.dbias is None else torch.zeros_like(call.dbias[:, :, place.rows])
            mine, place = replace(call, bias=bias, dbias=dbias), Place(slice(0, nq), place.q, place.k, place.heads)
        launches = tuple(replace(Launch.of(tile), fresh=fresh, fresh_keys=fresh_keys) for tile in tiles)
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        dims = q.shape[3], v.shape[3], heads, kv_heads
        asked = Call(q.device.type, k.dtype, *dims, features=mine.features, capability=capability)
        made = TileCalls(tiles, launches, (), Scores(mine.scale, mine.softcap), place, q.device)
        return self.kernel.ready(made, asked).scored(mine), mine
