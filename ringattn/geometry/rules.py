"""Mask rules: each gives the bands of a stretch of queries. A new mask is one rule here, and the function that users
call in ``ringattn/masks.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.bands import ANY, Bands, at_most, concat
from ringattn.geometry.spans import INF, Intervals, Ints

CLASSES, FEW = 1024, 4  # residue classes worth a tile each, and queries that make one worth it
DRAWS = 128  # random blocks of a row that are drawn in the time a piece takes elsewhere; more take it each


@dataclass(frozen=True)
class Stretch:
    """The queries a rule is asked for, ``[start, stop)`` in global positions, and the lengths of the whole."""

    start: int
    stop: int
    q_end: int  # q_offset + q_len
    kv_len: int


def full(at: Stretch) -> Bands:
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len)


def causal(at: Stretch) -> Bands:
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len, hi=0)


def sliding_window(at: Stretch, left: int | None, right: int | None) -> Bands:
    lo = -INF if left is None else -left
    hi = INF if right is None else right
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len, lo, hi)


def global_tokens(at: Stretch, count: int) -> Bands:
    head = max(min(at.stop, count) - at.start, 0)
    rows = Bands.columns(at.start, head, 0, at.kv_len)
    keys = Bands.columns(at.start + head, at.stop - at.start - head, 0, min(count, at.kv_len))
    return concat((rows, keys))


def global_positions(at: Stretch, positions: tuple[int, ...]) -> Bands:
    if positions and positions[-1] >= max(at.q_end, at.kv_len):
        raise ValueError(
            f"global_tokens position {positions[-1]} lies beyond the sequence "
            f"(queries end at {at.q_end}, keys at {at.kv_len}); give positions inside it"
        )
    if not positions:
        return Bands.columns(0, 0, 0, 0)
    chosen = Intervals.of(positions)
    sets = (chosen, chosen.complement())
    q = (at.start, at.stop - at.start, 1)
    return Bands.of((*q, 1, 0, at.kv_len, 1, ANY, -INF, INF), (*q, 2, 0, at.kv_len, 1, 1, -INF, INF), sets=sets)


def documents(at: Stretch, q: tuple[int, ...], k: tuple[int, ...] | None = None) -> Bands:
    for name, bounds, end in (
        ("cu_seqlens", q, at.q_end),
        ("cu_seqlens_k", q if k is None else k, at.kv_len),
    ):
        if bounds[-1] != end:
            raise ValueError(
                f"{name} ends at {bounds[-1]} but the sequence ends at {end}: every token belongs to a document; "
                f"append {end} (padding is a document of its own), or pass cu_seqlens_k where keys differ"
            )
    q_edges, k_edges = np.array(q, np.int64), np.array(q if k is None else k, np.int64)
    first = max(int(np.searchsorted(q_edges, at.start, "right")) - 1, 0)
    last = int(np.searchsorted(q_edges, at.stop, "left"))
    q0 = np.maximum(q_edges[first:last], at.start)
    q1 = np.minimum(q_edges[first + 1 : last + 1], at.stop)
    k0, k1 = k_edges[first:last], k_edges[first + 1 : last + 1]
    return Bands.columns(q0[: len(q1)], q1 - q0[: len(q1)], k0[: len(q1)], k1 - k0[: len(q1)])


def prefix_lm(at: Stretch, length: int) -> Bands:
    length = min(length, at.kv_len)
    rows = at.stop - at.start
    prefix = Bands.columns(at.start, rows, 0, length)
    return concat((prefix, Bands.columns(at.start, rows, length, at.kv_len - length, hi=0)))


def chunked(at: Stretch, size: int) -> Bands:
    at_most((at.stop - at.start) // size)
    edges = np.arange(at.start // size, -(-at.stop // size) + 1, dtype=np.int64) * size
    q0, q1 = np.maximum(edges[:-1], at.start), np.minimum(edges[1:], at.stop)
    return Bands.columns(q0, q1 - q0, edges[:-1], np.minimum(edges[1:], at.kv_len) - edges[:-1])


def strided(at: Stretch, stride: int, lo: int = -INF, hi: int = INF) -> Bands:
    # The pairs are those of as many residue classes as the stride, dense, or of diagonals a stride apart: these where
    # they are fewer and the classes too many, or of few queries.
    first = -(min(at.stop - 1, -lo) // stride)
    last = min(at.kv_len - 1 - at.start, hi) // stride
    if last - first < stride and (stride > CLASSES or at.stop - at.start < FEW * stride):
        at_most(last - first)
        diagonal = np.arange(first, last + 1, dtype=np.int64) * stride
        return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len, diagonal, diagonal)
    at_most(stride)
    residue = np.arange(stride, dtype=np.int64)
    q0 = at.start + (residue - at.start) % stride
    q_count, k_count = -((q0 - at.stop) // stride), -((residue - at.kv_len) // stride)
    return Bands.columns(q0, q_count, residue, k_count, lo, hi, step=stride)


def dilated(at: Stretch, stride: int, window: int) -> Bands:
    return strided(at, stride, -min(window * stride, INF), 0)


def _block_rows(at: Stretch, block: int) -> Ints:
    first, stop = at.start // block, -(-at.stop // block)
    at_most(stop - first)
    return np.arange(first, stop, dtype=np.int64)


def block_window(at: Stretch, block: int, reach: int) -> Bands:
    rows, reach = _block_rows(at, block), min(reach, max(at.q_end, at.kv_len) // block + 1)
    q0, q1 = np.maximum(rows * block, at.start), np.minimum((rows + 1) * block, at.stop)
    k0, k1 = np.maximum((rows - reach) * block, 0), np.minimum((rows + reach + 1) * block, at.kv_len)
    return Bands.columns(q0, q1 - q0, k0, k1 - k0)


def random_blocks(at: Stretch, block: int, number: int, seed: int, causal: bool) -> Bands:
    rows = _block_rows(at, block)
    pool = rows if causal else np.full_like(rows, -(-at.kv_len // block))
    drawn = pool > number  # the others take all of their pool
    row, pick = rows[~drawn], np.zeros((~drawn).sum(), np.int64)
    width = pool[~drawn]
    if drawn.any():
        picks = _picks(rows[drawn], pool[drawn], number, seed)
        row, pick = np.concatenate((row, np.repeat(rows[drawn], number))), np.concatenate((pick, picks.reshape(-1)))
        width = np.concatenate((width, np.ones(picks.size, np.int64)))
    q0, q1 = np.maximum(row * block, at.start), np.minimum((row + 1) * block, at.stop)
    k0 = pick * block
    return Bands.columns(q0, q1 - q0, k0, np.minimum(k0 + width * block, at.kv_len) - k0)


def _picks(rows: Ints, pool: Ints, number: int, seed: int) -> Ints:
    """For each row ``number`` of its ``pool`` blocks, which are more, ``[rows, number]``, ascending."""
    at_most(len(rows) * max(number, number * number // DRAWS))
    picks = np.empty((len(rows), 0), np.int64)
    for draw in range(number):
        # The n-th draw is uniform over the blocks not yet drawn: skip past the earlier ones in order.
        pick = (_hash(seed, rows, draw) % (pool - draw).astype(np.uint64)).astype(np.int64)
        pick += (picks - np.arange(draw) <= pick[:, None]).sum(1)
        picks = np.sort(np.concatenate((picks, pick[:, None]), 1), 1)
    return picks


def _hash(seed: int, rows: Ints, draw: int) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, 2014) of ``(seed, row, draw)``, as uint64."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            (seed * 1_000_003 + draw + 1) % (1 << 64)
        )
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return x
