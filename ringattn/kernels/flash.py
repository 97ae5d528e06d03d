"""What the adapters of FlashAttention's packages share: a tile, or a run of packed tiles, is one call of a fused
operator in fp16 or bf16 that takes bottom-right aligned windows.

Operators give a block's result, and its gradients from the *global* out and lse, rounded to the dtype of the inputs.
What is written once is written by the operator itself; the rest is folded and added in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.geometry.tiles import Window
from ringattn.kernels.base import Call, Grads, Kernel, Rows
from ringattn.kernels.calls import TileCall, TileCalls, TileKernel
from ringattn.kernels.operators import DLSE_COLUMNS, Query, carry_dlse
from ringattn.kernels.packed import packed
from ringattn.kernels.partial import Partial, fold
from ringattn.kernels.passes import fold_all
from ringattn.kernels.pieces import TileBand
from ringattn.kernels.scores import Bounds, TileScores
from ringattn.kernels.sdpa_cuda import HALF

TOGETHER = 2  # results that are held to be folded at once: each is as large as half of the running one
ALIGNMENT = 16  # bytes, of the rows that an operator writes
CLOSE = 0.03  # what a probe's bf16 may be off
Gradients = tuple[Tensor, Tensor, Tensor]
Homes = tuple[Tensor | None, Tensor | None, Tensor | None]


class Ask(NamedTuple):
    """What an operator is told of a tile. ``bounds``: of several tiles one after the other, each with the window."""

    window: Window
    scale: float
    softcap: float | None = None
    bounds: Bounds | None = None
    deterministic: bool = False
    sm_margin: int = 0

    @property
    def causal(self) -> bool:
        """Whether it is what packages have a flag for."""
        return self.window == (None, 0)

    @property
    def signed(self) -> tuple[int, int]:
        """The window where -1 is an absent bound."""
        left, right = (-1 if bound is None else bound for bound in self.window)
        return left, right

    @property
    def sequences(self) -> dict[str, Any]:
        """The bounds as arguments of those names in all packages; none for one tile."""
        if self.bounds is None:
            return {}
        q, k, longest_q, longest_k = self.bounds
        return {"cu_seqlens_q": q, "cu_seqlens_k": k, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}


class Operators(Protocol):
    """A package's two operators. Tensors are ``[batch, n, heads, dim]``, one batch row with bounds; lse is fp32,
    natural log, ``[batch, heads, n]``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, home: Partial | None) -> tuple[Tensor, Tensor]:
        """Out and lse: those of ``home``, where it is given and the package writes to tensors that exist."""
        ...

    def backward(self, rows: Rows, k: Tensor, v: Tensor, ask: Ask, homes: Homes) -> Gradients:
        """``dq, dk, dv``: those of ``homes`` that are given, there may be padding columns behind the others."""
        ...


@dataclass(frozen=True)
class FlashKernel(TileKernel):
    """A kernel over a package's operators. ``load`` imports them."""

    load: Callable[[], Operators]
    deterministic: bool = False
    sm_margin: int = 0

    name = ""
    reads_delta = False
    takes_dlse = False  # else the gradient of lse travels in padding columns
    largest = 256  # head size
    written_for = ""  # which versions

    def direct(self, call: Call) -> bool:
        """See `Kernel`: a tile is one call."""
        return True

    def fitted(self, call: Call) -> Kernel:
        """See `Kernel`."""
        return replace(self, deterministic=call.deterministic, sm_margin=call.sm_margin)

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """See `Kernel`: packed tiles are one call."""
        return packed(calls)

    def refuse(self, call: Call) -> str | None:
        """What no version computes, then what this one does not, then what a tiny call says."""
        reason = beyond_all(call, self.name, self.largest)
        if reason is not None:
            return reason
        if call.dlse and not self.takes_dlse and max(call.head_dim, call.v_head_dim) > self.largest - DLSE_COLUMNS:
            return f"head_dim {call.head_dim} must be at most {self.largest - DLSE_COLUMNS} where lse has a gradient"
        return self.lacks(call) or probe(self.load, self.name, self.written_for, call.device_type)

    def lacks(self, call: Call) -> str | None:
        """What this package cannot compute of what others can."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, calls: TileCalls, acc: Partial) -> None:
        """See `Kernel`: what several tiles add to the same rows is folded at once."""
        for run in _on_the_same_rows(calls.calls):
            if len(run) == 1:
                self.forward_call(q, k, v, run[0], acc)
                continue
            rows = run[0].q
            queries, home = (q, acc) if rows is None else (q[:, rows], acc.rows(rows))
            blocks = q.new_empty((len(run), *home.out.shape))
            lses = torch.empty((len(run), *home.lse.shape), device=q.device)
            for call, out, lse in zip(run, blocks, lses, strict=True):
                keys, values = (k, v) if call.k is None else (k[:, call.k], v[:, call.k])
                self.forward_tile(queries, keys, values, call.scores, Partial(out, lse), fresh=True)
            fold_all(home.out, home.lse, blocks, lses)

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        if scores.bounds is not None and q.shape[0] > 1:  # operators take packed tiles of one batch row
            for b in _rows(q):
                self.forward_tile(q[b], k[b], v[b], scores, Partial(acc.out[b], acc.lse[b]), fresh)
            return
        own = fresh and acc.out.dtype == q.dtype and acc.lse.dtype == torch.float32
        home = acc if own and _writable(acc.out) and acc.lse.stride(-1) == 1 else None
        out, lse = self.load().forward(q, k, v, self._ask(q, k, scores), home)
        if home is None or out.data_ptr() != acc.out.data_ptr():
            fold(acc, out, lse, fresh)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        if scores.bounds is not None and k.shape[0] > 1:
            for b in _rows(k):
                own = grads.views(b, b, grads.fresh, grads.fresh_keys)
                self.backward_tile(rows.batch(b), k[b], v[b], scores, own)
            return
        homes = grads.homes(k.dtype, _writable)
        if rows.dlse is not None and not self.takes_dlse:
            rows, k, v = padded(rows, k, v)
            homes = (None, None, None)
        found = self.load().backward(rows, k, v, self._ask(rows.q, k, scores), homes)
        grads.take(*(x if home is None else None for x, home in zip(found, homes, strict=True)))

    def _ask(self, q: Tensor, k: Tensor, scores: TileScores) -> Ask:
        assert scores.call is None, "refused, and must not be left out"
        window, bounds = scores.window, scores.bounds
        if bounds is None:
            window = TileBand.of(q.shape[1], k.shape[1], window).window  # without what does not bind
        return Ask(window, scores.scale, scores.softcap, bounds, self.deterministic, self.sm_margin)


def beyond_all(call: Call, name: str, largest: int) -> str | None:
    """What no version of any package computes of a call, asked of the kernel of that name; None if nothing is."""
    if call.features - {"softcap"}:
        features = ", ".join(sorted(call.features - {"softcap"}))
        return f"{features}: not computed by {name}; kernel='triton' or kernel='blockwise' computes it"
    if call.dtype not in HALF:
        return f"dtype {call.dtype} must be float16 or bfloat16"
    for what, dim in (("head_dim", call.head_dim), ("v_head_dim", call.v_head_dim)):
        if dim % 8 or dim > largest:
            return f"{what} {dim} must be a multiple of 8 and at most {largest}"
    return None


def _on_the_same_rows(calls: Sequence[TileCall]) -> Iterator[list[TileCall]]:
    """The calls in their order, those together that add to the same rows."""
    run: list[TileCall] = []
    for call in calls:
        joins = run and call.plain and run[-1].plain and call.q == run[-1].q and len(run) < TOGETHER
        if run and (call.fresh or run[-1].fresh or not joins):
            yield run
            run = []
        run.append(call)
    if run:
        yield run


def _rows(x: Tensor) -> Iterator[slice]:
    return (slice(b, b + 1) for b in range(x.shape[0]))


def _writable(x: Tensor) -> bool:
    """Whether operators write rows of such strides."""
    size = x.element_size()
    aligned = x.data_ptr() % ALIGNMENT == 0 and all(s * size % ALIGNMENT == 0 for s in x.stride()[:-1])
    return x.stride(-1) == 1 and aligned


def padded(rows: Rows, k: Tensor, v: Tensor) -> tuple[Rows, Tensor, Tensor]:
    """The same inputs with the gradient of lse in padding columns."""
    query = Query.of(rows, lambda x: x.transpose(1, 2))
    query, k, v = carry_dlse(query, k.transpose(1, 2), v.transpose(1, 2))
    q, dout, out, k, v = (x.transpose(1, 2) for x in (query.q, query.dout, query.out, k, v))
    return Rows(q, dout, out, rows.lse, None, None), k, v


def written(rows: Rows, k: Tensor, v: Tensor, homes: Homes) -> Gradients:
    """Tensors for gradients, where a package must be given all of them."""
    dq, dk, dv = (torch.empty_like(x) if home is None else home for x, home in zip((rows.q, k, v), homes, strict=True))
    return dq, dk, dv


@cache
def probe(load: Callable[[], Operators], name: str, written_for: str, device: str) -> str | None:
    """What is wrong with a package here, by one tiny call in both directions; None if nothing is. Packages that import
    may still not run, and interfaces change between versions."""
    # whatever mode the user's call is in
    with torch.inference_mode(False), torch.autocast(device, enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports and of first calls
        try:
            off = _off(load(), device)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"{name} does not run here ({text:.300}); it was written for {written_for}"
    wrong = next(((what, much) for what, much in off.items() if not much < CLOSE), None)
    if wrong is None:
        return None
    return (
        f"{name} computes something else here ({wrong[0]} is off by {wrong[1]:.2g}); it was written for {written_for}"
    )


def _off(operators: Operators, device: str) -> dict[str, float]:
    """How far a tiny call's results are from what they must be, relative."""
    own = torch.Generator(device).manual_seed(0)  # the user's numbers are not touched
    q, dout = (torch.randn(1, 64, 2, 64, device=device, generator=own).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 96, 1, 64, device=device, generator=own).bfloat16() for _ in range(2))
    ask = Ask((40, 8), 0.125)
    with torch.no_grad():
        out, lse = operators.forward(q, k, v, ask, None)
        found = out, lse, *operators.backward(Rows(q, dout, out, lse, None, None), k, v, ask, (None, None, None))
    pairs = zip(("out", "lse", "dq", "dk", "dv"), found, _expected(q, k, v, dout), strict=True)
    return {name: float((a.float() - b).norm() / b.norm()) for name, a, b in pairs}


def _expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """What a probe's call must give."""
    with torch.enable_grad():
        q, k, v = (x.float().requires_grad_() for x in (q, k, v))
        logits = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * 0.125
        distance = torch.arange(96, device=q.device) - torch.arange(64, device=q.device)[:, None] - 32
        logits = logits.masked_fill((distance < -40) | (distance > 8), -torch.inf)
        out = torch.einsum("bhqk,bkd->bqhd", logits.softmax(-1), v[:, :, 0])
        return out.detach(), logits.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout.float())
