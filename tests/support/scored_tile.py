"""One tile with a softcap, biases, ALiBi or dropout: what kernels make of it, and autograd by the formulas."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels import Grads, Kernel, Rows
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Alibi, Block, Dropout, Place, Scores, TileScores
from tests.support.tiles import Window, accumulator, attends

SCALE = 0.31
FULL, CAUSAL = (None, None), (None, 0)
CASES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0},
    "bias": {"bias": (2, 8)},
    "bias of all heads": {"bias": (2, 1)},
    "bias of all": {"bias": (1, 1)},
    "bias with -inf": {"bias": (1, 8), "hidden": True},
    "alibi": {"alibi": True},
    "dropout": {"dropout": 0.3},
    "values of 24": {"v_head_dim": 24},
    "all": {"softcap": 2.0, "bias": (2, 8), "hidden": True, "alibi": True, "dropout": 0.3, "v_head_dim": 24},
}


@dataclass
class Problem:
    """A tile among 8 query heads, of which it has heads 4 to 7 over two KV heads; rows and keys lie in a longer
    sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    window: Window
    call: Scores
    place: Place

    @property
    def scores(self) -> TileScores:
        return TileScores(self.window, SCALE, self.call.softcap, self.call, self.place)


def make_problem(
    tile: tuple[int, int, Window],
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    bias: tuple[int, int] | None = None,
    hidden: bool = False,
    alibi: bool = False,
    dropout: float = 0.0,
    v_head_dim: int = 16,
    scattered: bool = False,
) -> Problem:
    nq, nk, window = tile
    wide = accumulator(dtype)
    q, k = (torch.randn(2, n, heads, 16).to(dtype) for n, heads in ((nq, 4), (nk, 2)))
    v, dout = (torch.randn(2, n, heads, v_head_dim).to(dtype) for n, heads in ((nk, 2), (nq, 4)))
    rows = torch.randperm(2 * nq + 3)[:nq].sort().values.numpy() if scattered else slice(2, 2 + 2 * nq - 1, 2)
    k_at = torch.randperm(2 * nk)[:nk].sort().values if scattered else torch.arange(nk) + nk
    table = None
    if bias is not None:
        table = torch.randn(*bias, 2 * nq + 3, 2 * nk).to(wide)
        if hidden:
            table[torch.rand_like(table) < 0.2] = -math.inf
            table[:, :, :7] = -math.inf  # whole rows, the tile's first ones among them
    call = Scores(
        SCALE,
        softcap,
        table,
        None if table is None else torch.zeros_like(table),
        Alibi(torch.linspace(0.01, 0.1, 8, dtype=wide)) if alibi else None,
        Dropout(dropout, 11) if dropout else None,
    )
    place = Place(rows, torch.arange(nq) * 3 + 40, k_at, slice(4, 8))
    return Problem(q, k, v, dout, torch.randn(2, 4, nq, dtype=wide), window, call, place)


def formulas(p: Problem, dtype: torch.dtype, given_out: Tensor | None = None) -> list[Tensor]:
    """`out, lse, dq, dk, dv, dbias` in `dtype` by autograd; see `one_tile.autograd_result` for `given_out`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v)]
    (q, k, v), dout, dlse = leaves, p.dout.to(dtype), p.dlse.to(dtype)
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * SCALE
    if p.call.softcap is not None:
        logits = p.call.softcap * torch.tanh(logits / p.call.softcap)
    if p.call.bias is not None:
        table = p.call.bias.detach().to(dtype).requires_grad_()
        leaves.append(table)
        rows = torch.arange(table.size(2))[p.place.rows]
        heads = slice(0, 1) if table.size(1) == 1 else slice(4, 8)
        logits = logits + table[:, heads][:, :, rows][..., p.place.k]
    if p.call.rule is not None:
        distance = (p.place.q[:, None] - p.place.k).abs()
        logits = logits - p.call.rule.params[4:8, None, None].to(dtype) * distance
    logits = logits.masked_fill(~attends(q.size(1), k.size(1), p.window), -math.inf)
    dead = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)
    probabilities = logits.softmax(-1).masked_fill(dead, 0.0)
    if p.call.dropout is not None:
        kept = p.scores.keep(whole(p), dtype)
        assert kept is not None
        probabilities = probabilities * kept
    out = torch.einsum("bhij,bjhd->bihd", probabilities, v.repeat_interleave(2, 2))
    lse = logits.logsumexp(-1)
    if given_out is not None:
        dlse = dlse + (dout * (out.detach() - given_out.to(dtype))).sum(-1).transpose(1, 2)
    loss = (out * dout).sum() + (lse * dlse).masked_fill(dead.squeeze(-1), 0.0).sum()
    lse = lse.detach().masked_fill(dead.squeeze(-1), -math.inf)
    return [out.detach(), lse, *torch.autograd.grad(loss, leaves)]


def whole(p: Problem) -> Block:
    return Block(slice(0, 2), slice(0, 4), slice(0, p.q.size(1)), slice(0, p.k.size(1)))


def computed(kernel: Kernel, p: Problem, scores: TileScores | None = None) -> list[Tensor]:
    """`out, lse, dq, dk, dv`, and dbias where there is a bias."""
    scores, wide = scores or p.scores, accumulator(p.q.dtype)
    acc = Partial.unset(2, p.q.size(1), 4, p.v.size(3), wide, "cpu")
    kernel.forward_tile(p.q, p.k, p.v, scores, acc, fresh=True)
    out = acc.out.to(p.q.dtype)
    delta = (p.dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2) - p.dlse
    grads = Grads(*(torch.zeros_like(x, dtype=wide) for x in (p.q, p.k, p.v)))
    assert scores.call is not None
    if scores.call.dbias is not None:
        scores.call.dbias.zero_()
    kernel.backward_tile(Rows(p.q, p.dout, out, acc.lse.to(wide), delta, p.dlse), p.k, p.v, scores, grads)
    results = [acc.out, acc.lse, grads.dq, grads.dk, grads.dv]
    return results if scores.call.dbias is None else [*results, scores.call.dbias]
