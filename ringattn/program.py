"""Programs: one rank's schedule compiled to local indices, ready to run without looking at the plan.

Everything the loops of ``ring.py`` do is decided here once: which rows of which buffer a message
fills or takes, which tiles a step computes, which of them meet untouched rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ringattn.bands import Ints
from ringattn.layouts import Frame
from ringattn.plan import Plan, Tile
from ringattn.schedules import Step, Transfer


@dataclass(frozen=True)
class Move:
    """One message of this rank: ``rows`` (slices, in message order) of a buffer, ``tokens`` in all.

    ``home`` says whether the buffer is the rank's own shard (its K/V, or its dK/dV); else it is the
    buffer of a step: K/V are sent from the step before and arrive in this one, gradients leave this
    step and arrive in the next one.
    """

    peer: int
    rows: tuple[slice, ...]
    tokens: int
    home: bool


@dataclass(frozen=True)
class Stage:
    """One step in local indices: ``size`` key rows, the tiles over them, and the messages around it."""

    size: int
    tiles: tuple[Tile, ...]
    kv_sends: tuple[Move, ...] = ()
    kv_recvs: tuple[Move, ...] = ()
    grad_sends: tuple[Move, ...] = ()
    grad_recvs: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Program:
    """All stages of one rank for one mask. ``stages[0]`` computes on the rank's own shard."""

    rank: int
    q_rows: int
    k_rows: int
    stages: tuple[Stage, ...]

    @property
    def tiles(self) -> int:
        """Kernel calls of one forward pass."""
        return sum(len(stage.tiles) for stage in self.stages)

    def tokens(self, messages: str) -> int:
        """Tokens moved by one kind of message: kv_sends, kv_recvs, grad_sends or grad_recvs."""
        return sum(move.tokens for stage in self.stages for move in getattr(stage, messages))


def compile_program(plan: Plan, steps: list[Step], rank: int) -> Program:
    """The local form of a rank's steps."""
    own = plan.k_layout.frame(rank)
    frames = [step.frame for step in steps] + [Frame(np.empty((0, 3), np.int64))]
    touched = np.zeros(plan.q_frame(rank).size, bool)
    stages = []
    for t, step in enumerate(steps):
        moves = {"kv_sends": [], "kv_recvs": [], "grad_sends": [], "grad_recvs": []}  # type: dict[str, list[Move]]
        for transfer in step.kv:
            sent = transfer.src == rank
            moves["kv_sends" if sent else "kv_recvs"].append(
                _move(
                    transfer,
                    rank,
                    own,
                    frames[t - 1] if sent else frames[t],
                    home=sent and transfer.owner == rank,
                )
            )
        for transfer in step.grads:
            sent = transfer.src == rank
            moves["grad_sends" if sent else "grad_recvs"].append(
                _move(
                    transfer,
                    rank,
                    own,
                    frames[t] if sent else frames[t + 1],
                    home=not sent and transfer.owner == rank,
                )
            )
        tiles = plan.tiles(rank, frames[t]) if frames[t].size else ()
        tiles = tuple(_mark_fresh(tile, touched) for tile in tiles)
        stages.append(Stage(frames[t].size, tiles, **{name: tuple(found) for name, found in moves.items()}))
    return Program(rank, plan.q_frame(rank).size, own.size, tuple(stages))


def _move(transfer: Transfer, rank: int, own: Frame, frame: Frame, home: bool) -> Move:
    peer = transfer.dst if transfer.src == rank else transfer.src
    runs = (own if home else frame).rows(transfer.spans)
    return Move(peer, _slices(runs), transfer.tokens, home)


def _slices(runs: Ints) -> tuple[slice, ...]:
    """Runs (start, length, step) as slices, runs that continue each other joined."""
    joined: list[list[int]] = []
    for start, length, step in runs.tolist():
        if joined and step == joined[-1][2] == 1 and start == joined[-1][0] + joined[-1][1]:
            joined[-1][1] += length
        else:
            joined.append([start, length, step])
    return tuple(slice(start, start + (length - 1) * step + 1, step) for start, length, step in joined)


def _mark_fresh(tile: Tile, touched: np.ndarray) -> Tile:
    """The tile with ``fresh`` set if none of its rows was touched yet; its rows are touched from now on."""
    fresh = not touched[tile.q].any()
    touched[tile.q] = True
    return replace(tile, fresh=fresh)
