"""Messages: key rows packed for the wire, and the batches they are posted in.

A row of a message is one token's K and V for all batch rows and KV heads, ``[batch, num_kv_heads,
head_dim + v_head_dim]``, so a message is one contiguous tensor ``[tokens, ...]`` and messages from
several owners laid end to end are still one K and one V (strided views, no copy).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.comm import Pending
from ringattn.planning.program import Move, Stage
from ringattn.runtime.link import Link


def rows_kv(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Message rows ``[n, B, H, D + Dv]`` seen as ``k [B, n, H, D]`` and ``v [B, n, H, Dv]``."""
    kv = rows.transpose(0, 1)
    return kv[..., :head_dim], kv[..., head_dim:]


def pack_shard(k: Tensor, v: Tensor, move: Move, out: Tensor) -> Tensor:
    """Rows of a shard ``k, v`` (BSHD) copied into a message."""
    at, head_dim = 0, k.shape[-1]
    for rows in move.rows:
        part_k, part_v = k[:, rows], v[:, rows]
        n = part_k.shape[1]
        to_k, to_v = rows_kv(out[at : at + n], head_dim)
        to_k.copy_(part_k)
        to_v.copy_(part_v)
        at += n
    return out


def pack_rows(rows: Tensor, move: Move, out: Tensor) -> Tensor:
    """Rows of a buffer copied into a message."""
    at = 0
    for part in (rows[r] for r in move.rows):
        out[at : at + len(part)].copy_(part)
        at += len(part)
    return out


def in_place(rows: Tensor, move: Move) -> Tensor | None:
    """The message itself, where the buffer already holds it in one run."""
    if len(move.rows) == 1 and move.rows[0].step in (None, 1):
        return rows[move.rows[0]]
    return None


def add_rows(rows: Tensor, move: Move, message: Tensor) -> None:
    """A gradient message added into the rows of a buffer it belongs to."""
    at = 0
    for r in move.rows:
        part = rows[r]
        part.add_(message[at : at + len(part)])
        at += len(part)


Parcels = list[tuple[Tensor, int]]


class Batch:
    """The messages of one turn of a loop, collected kind by kind in plan order and posted at once."""

    def __init__(self, link: Link, direction: str, turn: int) -> None:
        self.link, self.direction, self.turn = link, direction, turn
        self.kinds: dict[str, tuple[Parcels, Parcels]] = {}

    def buffer(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the messages of this turn; those of the turn before have their own."""
        return self.link.workspace.take(f"{name} {self.turn % 2}", shape, like, dtype)

    def of(self, kind: str) -> tuple[Parcels, Parcels]:
        """The sends and the receives of one kind, to be appended to."""
        return self.kinds.setdefault(kind, ([], []))

    def fetch(self, stage: Stage | None, k: Tensor, v: Tensor, held: Tensor | None) -> Tensor | None:
        """Sends this rank's part of a stage's keys and receives its own: the buffer they arrive in."""
        if stage is None:
            return None
        sends, recvs = self.of("kv")
        heads = stage.kv_heads(k.shape[2])
        k, v = k[:, :, heads], v[:, :, heads]
        shape = (k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
        packed: dict[tuple[tuple[int, int, int], ...], Tensor] = {}
        for i, move in enumerate(stage.kv_sends):
            ready = None if move.home else in_place(present(held), move)
            if ready is None:
                rows = tuple((r.start, r.stop, r.step) for r in move.rows)
                if rows not in packed:  # the same rows may go to many ranks
                    out = self.buffer(f"kv out {i}", (move.tokens, *shape), k, k.dtype)
                    packed[rows] = pack_shard(k, v, move, out) if move.home else pack_rows(present(held), move, out)
                ready = packed[rows]
            sends.append((ready, move.peer))
        if not stage.size:
            return None
        arriving = self.buffer("kv", (stage.size, *shape), k, k.dtype)
        recvs += [(arriving[move.rows[0]], move.peer) for move in stage.kv_recvs]
        for own, here in stage.copies:
            to_k, to_v = rows_kv(arriving[here], k.shape[-1])
            to_k.copy_(k[:, own])
            to_v.copy_(v[:, own])
        return arriving

    def bring_home(self, stage: Stage | None, left: Tensor | None, dk: Tensor, dv: Tensor) -> list[tuple[Move, Tensor]]:
        """Sends the gradients of a stage on their way and receives those that come here."""
        if stage is None:
            return []
        sends, recvs = self.of("grad")
        heads = stage.kv_heads(dk.shape[2])
        shape = (dk.shape[0], heads.stop - heads.start, dk.shape[3] + dv.shape[3])
        for i, move in enumerate(stage.grad_sends):
            ready = in_place(present(left), move)
            if ready is None:
                ready = pack_rows(
                    present(left), move, self.buffer(f"grad out {i}", (move.tokens, *shape), dk, dk.dtype)
                )
            sends.append((ready, move.peer))
        returned = []
        for i, move in enumerate(stage.grad_recvs):
            message = self.buffer(f"grad in {i}", (move.tokens, *shape), dk, dk.dtype)
            recvs.append((message, move.peer))
            returned.append((move, message))
        return returned

    def post(self) -> Pending:
        """Starts all of it."""
        sends, recvs = Parcels(), Parcels()
        for kind, (out, back) in self.kinds.items():
            self.link.traffic.count(f"{self.direction} {kind}", out, back)
            sends += out
            recvs += back
        return self.link.transport.post(sends, recvs, f"{self.direction} step {self.turn}")


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a message refers to the buffer of a stage that holds nothing"
    return tensor


def add_shard(dk: Tensor, dv: Tensor, move: Move, message: Tensor) -> None:
    """A gradient message added into the rows of a shard ``dk, dv`` (BSHD)."""
    from_k, from_v = rows_kv(message, dk.shape[-1])
    at = 0
    for rows in move.rows:
        part = dk[:, rows]
        n = part.shape[1]
        part.add_(from_k[:, at : at + n])
        dv[:, rows].add_(from_v[:, at : at + n])
        at += n
