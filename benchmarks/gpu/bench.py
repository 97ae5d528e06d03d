"""What a case is given: tensors, contexts, and one computation as this library and as bare calls make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ringattn
from benchmarks.gpu.bare import Bare
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.figures import Passes
from benchmarks.gpu.sizes import Sizes
from ringattn.comm import Transport
from ringattn.geometry.tiles import Window
from ringattn.planning.program import Turn


@dataclass(frozen=True)
class BareTile:
    """The shape of one bare call."""

    batch: int
    nq: int
    nk: int
    heads: int
    kv_heads: int
    window: Window


@dataclass(frozen=True)
class Bench:
    """Sizes, and what bare calls are made of."""

    sizes: Sizes
    bare: Bare

    @property
    def clock(self) -> Clock:
        return Clock(self.sizes.device, self.sizes.seconds, self.sizes.rounds)

    @property
    def on_gpu(self) -> bool:
        return self.sizes.device != "cpu"

    def tensors(self, tokens: int, heads: tuple[int, int] | None = None) -> list[Tensor]:
        """q, k, v and the gradient of out, ``[1, tokens, heads, dim]``."""
        sizes = self.sizes
        q, kv = heads or (sizes.heads, sizes.kv_heads)
        return [self.random(1, tokens, n, sizes.dim) for n in (q, kv, kv, q)]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.sizes.device, dtype=self.sizes.dtype)

    def context(self, group: Transport | None, tokens: int, **settings: Any) -> ringattn.ContextParallel:
        sizes = self.sizes
        shape = ringattn.Shape(sizes.heads, sizes.kv_heads, sizes.dim, dtype=str(sizes.dtype))
        return ringattn.ContextParallel(group, tokens, **{"kernel": sizes.kernel, "shape": shape, **settings})

    def passes(self, cp: ringattn.ContextParallel) -> Passes:
        """A call of this library's on random shards."""
        q, k, v, dout = self.tensors(cp.local_seqlen)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def forward() -> object:
            return ringattn.attention(q, k, v, cp=cp)

        def both() -> object:
            return torch.autograd.grad(ringattn.attention(*leaves, cp=cp), leaves, dout)

        return Passes(forward, both)

    def flop(self, pairs: int) -> dict[str, int]:
        """Of forward and of backward."""
        return {"forward": pairs * self.sizes.forward_flop, "backward": pairs * self.sizes.backward_flop}

    def tile(self, tokens: int, window: Window) -> BareTile:
        """That of one call over so many tokens."""
        return BareTile(1, tokens, tokens, self.sizes.heads, self.sizes.kv_heads, window)

    def tiles(self, turns: Sequence[Turn]) -> list[BareTile]:
        """One for each launch of a program's turns."""
        sizes, found = self.sizes, []
        for work in (work for turn in turns for work in turn.work):
            heads = work.heads.of(sizes.kv_heads)
            kv_heads = heads.stop - heads.start
            for launch in work.launches if kv_heads else ():
                nq, nk = (_count(rows) // launch.count for rows in (launch.q, launch.k))
                group = sizes.heads // sizes.kv_heads
                found.append(BareTile(launch.count, nq, nk, kv_heads * group, kv_heads, launch.window))
        return found

    def bare_passes(self, forward: Sequence[BareTile], backward: Sequence[BareTile]) -> Passes:
        """Bare calls of these tiles, on tensors of their own. Backward's come after forward's in ``both``."""
        held = {tile: self._held(tile) for tile in {*forward, *backward}}

        def run_forward() -> None:
            for tile in forward:
                q, k, v, _ = held[tile][0]
                self.bare.forward(q, k, v, tile.window)

        def run_both() -> None:
            run_forward()
            for tile in backward:
                (q, k, v, dout), (out, lse) = held[tile]
                self.bare.backward(q, k, v, out, dout, lse, tile.window)

        return Passes(run_forward, run_both)

    def _held(self, tile: BareTile) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """q, k, v, dout, and the result of the first three."""
        q, dout = (self.random(tile.batch, tile.nq, tile.heads, self.sizes.dim) for _ in range(2))
        k, v = (self.random(tile.batch, tile.nk, tile.kv_heads, self.sizes.dim) for _ in range(2))
        out, lse = self.bare.forward(q, k, v, tile.window)
        return [q, k, v, dout], (out, lse)


def _count(rows: Any) -> int:
    return len(range(rows.start, rows.stop, rows.step)) if isinstance(rows, slice) else len(rows)


def graph_settings(on_gpu: bool = True) -> dict[str, ringattn.Options]:
    """Options with CUDA graphs off, and on; on a CPU there are none to be had."""
    return {value: ringattn.Options(graphs=value if on_gpu else "auto") for value in ("off", "on")}
