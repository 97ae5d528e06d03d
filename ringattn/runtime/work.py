"""What one rank computes in a turn, ready to be called with its own tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ringattn.kernels import Grads
from ringattn.kernels.choice import Share
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Scores
from ringattn.runtime.wire import Index, Own, pack_partial, unpacked_rows

Pair = tuple[Tensor, Tensor]
Shares = tuple[Share, ...]  # kernels, and the tiles that each of them computes


@dataclass(frozen=True, slots=True)
class OwnWork:
    """Tiles of the rank's own queries, against its own keys or those of a buffer. ``q_heads`` and ``kv_heads`` are None
    for all heads; a buffer holds just the heads that are computed. ``scores`` of a pass: where tiles must know where
    they lie, what this call brings along."""

    shares: Shares
    q_heads: slice | None
    kv_heads: Index | None
    keys: Pair | None
    grads: tuple[Tensor | None, Tensor | None] | None

    def forward(self, own: Own, scores: Scores | None) -> None:
        q, acc = own.q, own.acc
        if self.q_heads is not None:
            q, acc = q[:, :, self.q_heads], acc.heads(self.q_heads)
        k, v = self._keys(own)
        for kernel, calls in self.shares:
            kernel.forward(q, k, v, calls if scores is None else calls.scored(scores), acc)

    def backward(self, own: Own, scores: Scores | None) -> None:
        rows, grads = own.rows, own.grads
        dq, (dk, dv) = grads.dq, self._gradients(grads)
        if self.q_heads is not None:
            rows, dq = rows.heads(self.q_heads), None if dq is None else dq[:, :, self.q_heads]
        k, v = self._keys(own)
        for kernel, calls in self.shares:
            kernel.backward(rows, k, v, calls if scores is None else calls.scored(scores), Grads(dq, dk, dv))

    def _gradients(self, grads: Grads) -> tuple[Tensor | None, Tensor | None]:
        """Of these keys, as far as they are wanted."""
        if self.keys is not None:
            return self.grads or (None, None)
        index, own = self.kv_heads, (grads.dk, grads.dv)
        if index is None:
            return own
        dk, dv = (None if x is None else x[index] for x in own)
        return dk, dv

    def _keys(self, own: Own) -> Pair:
        if self.keys is not None:
            return self.keys
        index = self.kv_heads
        return (own.k, own.v) if index is None else (own.k[index], own.v[index])


@dataclass(frozen=True, slots=True)
class Hosting:
    """Tiles of other ranks' queries, which have come in ``guests``, against the rank's own keys: their results go into
    the message ``result``, None for a dq that is not wanted. dk and dv are where they belong."""

    shares: Shares
    guests: Tensor
    result: Tensor | None

    def forward(self, own: Own, scores: Scores | None) -> None:
        assert self.result is not None, "forward's results are always wanted"
        batch, heads = own.q.shape[0], own.q.shape[2]
        acc = Partial.empty(batch, len(self.guests), heads, own.v.shape[-1], self.result.dtype, own.q.device)
        for kernel, calls in self.shares:
            given = calls if scores is None else calls.scored(scores)
            kernel.forward(self.guests.transpose(0, 1), own.k, own.v, given, acc)
        pack_partial(acc, self.result)

    def backward(self, own: Own, scores: Scores | None) -> None:
        rows = unpacked_rows(self.guests, own.q.dtype, own.q.shape[-1], own.v.shape[-1])
        dq = None if self.result is None else self.result.zero_().transpose(0, 1)
        grads = Grads(dq, own.grads.dk, own.grads.dv)
        for kernel, calls in self.shares:
            kernel.backward(rows, own.k, own.v, calls if scores is None else calls.scored(scores), grads)


Work = OwnWork | Hosting
