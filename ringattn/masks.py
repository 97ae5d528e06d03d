"""Masks: who may attend to whom, as hashable expressions of a rule and its arguments.

``q`` and ``k`` count global positions from 0 (``q_offset`` shifts the queries). A mask is bound to
lengths by :meth:`Mask.bind` and then gives its bands for any stretch of queries, so that a rank of a
large world never builds the whole sequence. ``&``, ``|`` and ``-`` combine masks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn.arguments import LARGEST, PAIRS, flag, integer, integers, seed_of, shown
from ringattn.bands import ANY, HI, K_AXIS, LO, Q_AXIS, Bands, TooManyPieces, areas, at_most, concat, regular
from ringattn.bands import intersect as _intersect
from ringattn.bands import subtract as _subtract
from ringattn.bands import union as _union
from ringattn.spans import INF, Intervals, Ints

if TYPE_CHECKING:
    import torch


TERMS = 256  # masks in one expression: each is evaluated, and an expression nests as deep
CLASSES, FEW = 1024, 4  # residue classes worth a tile each, and queries that make one worth it
DRAWS = 128  # random blocks of a row that are drawn in the time a piece takes elsewhere; more take it each
DENSE = 1 << 34  # pairs of a dense mask, a byte each


@dataclass(frozen=True)
class Stretch:
    """The queries a rule is asked for, ``[start, stop)`` in global positions, and the lengths of the whole."""

    start: int
    stop: int
    q_end: int  # q_offset + q_len
    kv_len: int


@dataclass(frozen=True)
class Mask:
    """A mask expression. Build one with the functions of this module and combine with ``&``, ``|``, ``-``.

    Equal expressions are equal and hash equal, on every rank and in every process.
    """

    rule: Callable[..., Bands]
    args: tuple[Any, ...] = ()
    handle: Ints = field(init=False, repr=False, compare=False)  # the digest as int64 ``[1]``

    def __hash__(self) -> int:
        return hash(self.digest)  # of thousands of document bounds, and of nested expressions, once

    @cached_property
    def digest(self) -> str:
        """Equal exactly for equal expressions, in every process: for comparing ranks."""
        parts = [arg.digest if isinstance(arg, Mask) else repr(arg) for arg in self.args]
        return hashlib.sha256("|".join((self.rule.__name__, *parts)).encode()).hexdigest()[:16]

    def __post_init__(self) -> None:
        # Made at once, not when first asked for: a compiled graph may only read it.
        object.__setattr__(self, "handle", np.frombuffer(bytes.fromhex(self.digest), np.int64).copy())

    @cached_property
    def terms(self) -> int:
        """How many masks the expression is made of."""
        return sum(arg.terms for arg in self.args if isinstance(arg, Mask)) or 1

    def __and__(self, other: Mask) -> Mask:
        return _combined(_both, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combined(_either, self, other)

    def __sub__(self, other: Mask) -> Mask:
        return _combined(_without, self, other)

    def __repr__(self) -> str:
        if self.rule in _SIGNS:
            a, b = self.args
            return f"({a!r} {_SIGNS[self.rule]} {b!r})"
        return f"{self.rule.__name__.strip('_')}({', '.join(_brief(a) for a in self.args)})"

    def bind(self, q_len: int, kv_len: int, q_offset: int = 0) -> BoundMask:
        """The mask over ``q_len`` queries at positions ``q_offset ...`` and ``kv_len`` keys at ``0 ...``.

        Raises ``ValueError`` for lengths beyond ``arguments.LARGEST`` and ``arguments.PAIRS``, and for lengths the
        mask does not fit (documents that end elsewhere, global positions beyond the sequence).
        """
        hint = ", a number of tokens"
        q_len, kv_len = integer("q_len", q_len, hint=hint), integer("kv_len", kv_len, hint=hint)
        bound = BoundMask(self, q_len, kv_len, integer("q_offset", q_offset, hint=hint))
        if q_len * kv_len > PAIRS:
            raise ValueError(
                f"q_len={q_len} times kv_len={kv_len}: must be at most {PAIRS} (2**62) pairs, what is counted exactly"
            )
        bound.bands(bound.q_offset, bound.q_offset)
        return bound

    def area(self, q_len: int, kv_len: int, q_offset: int = 0) -> int:
        """The exact number of attending pairs."""
        return int(areas(regular(self.bind(q_len, kv_len, q_offset).whole)).sum())

    def dense(self, q_len: int, kv_len: int, q_offset: int = 0) -> torch.Tensor:
        """Bool tensor ``[q_len, kv_len]``, True where query ``q_offset + i`` attends key ``j``."""
        import torch  # here alone: geometry itself never needs torch

        bound = self.bind(q_len, kv_len, q_offset)
        if bound.q_len * bound.kv_len > DENSE:
            raise ValueError(
                f"q_len={q_len} times kv_len={kv_len}: a dense mask takes as many bytes, at most {DENSE} (2**34); "
                "take fewer queries, or area() and bind().bands()"
            )
        out = np.zeros((bound.q_len, bound.kv_len), bool)
        bands = regular(bound.whole)
        for row in bands.data:
            q, k = _positions(bands, row, Q_AXIS), _positions(bands, row, K_AXIS)
            diagonal = k[None, :] - q[:, None]
            out[np.ix_(q - bound.q_offset, k)] |= (diagonal >= row[LO]) & (diagonal <= row[HI])
        return torch.from_numpy(out)


@dataclass(frozen=True)
class BoundMask:
    """A mask with lengths: gives its disjoint bands for any stretch of queries."""

    mask: Mask
    q_len: int
    kv_len: int
    q_offset: int = 0

    def bands(self, start: int, stop: int) -> Bands:
        """The bands of queries ``[start, stop)`` (global positions).

        Raises ``ValueError`` where the mask falls into more pieces than can be planned.
        """
        at = Stretch(start, stop, self.q_offset + self.q_len, self.kv_len)
        try:
            return self.mask.rule(at, *self.mask.args)
        except TooManyPieces as error:
            raise ValueError(
                f"mask {shown(self.mask)} over {self.q_len} queries and {self.kv_len} keys falls into {error}: use "
                "fewer or larger blocks, chunks or strides, or combine fewer of them"
            ) from None

    @cached_property
    def whole(self) -> Bands:
        """The bands of all queries."""
        return self.bands(self.q_offset, self.q_offset + self.q_len)


def _positions(bands: Bands, row: Ints, axis: tuple[int, ...]) -> Ints:
    start, length, step, members = (int(row[c]) for c in axis)
    positions = start + step * np.arange(length, dtype=np.int64)
    if members == ANY:
        return positions
    chosen = bands.sets[members - 1]
    return positions[chosen.rank(positions + 1) > chosen.rank(positions)]


def _combined(rule: Callable[..., Bands], a: Mask, b: object) -> Mask:
    if not isinstance(b, Mask):
        raise ValueError(f"{shown(b)} is not a mask: combine masks with masks, e.g. causal() & documents(...)")
    if a.terms + b.terms > TERMS:
        raise ValueError(
            f"a mask of {a.terms + b.terms} terms: must be at most {TERMS}; name many positions in one "
            "global_tokens(), many documents in one documents()"
        )
    return Mask(rule, (a, b))


def _brief(arg: object) -> str:
    if isinstance(arg, tuple) and len(arg) > 6:
        return f"({', '.join(map(str, arg[:3]))}, ... {len(arg)} numbers ..., {arg[-1]})"
    return repr(arg)


# -- combinations -------------------------------------------------------------------------------


def _both(at: Stretch, a: Mask, b: Mask) -> Bands:
    return _intersect(a.rule(at, *a.args), b.rule(at, *b.args))


def _either(at: Stretch, a: Mask, b: Mask) -> Bands:
    return _union(a.rule(at, *a.args), b.rule(at, *b.args))


def _without(at: Stretch, a: Mask, b: Mask) -> Bands:
    return _subtract(a.rule(at, *a.args), b.rule(at, *b.args))


_SIGNS = {_both: "&", _either: "|", _without: "-"}


# -- the masks ----------------------------------------------------------------------------------


def full() -> Mask:
    """Every query attends every key."""
    return Mask(_full)


def _full(at: Stretch) -> Bands:
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len)


def causal() -> Mask:
    """``k <= q``, in absolute positions: with ``q_offset`` the queries simply start later."""
    return Mask(_causal)


def _causal(at: Stretch) -> Bands:
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len, hi=0)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """``q - left <= k <= q + right``; ``None`` is unbounded. ``left=1023, right=0`` sees 1,024 keys.

    Raises ``ValueError`` for a negative side.
    """
    sides = (("left", left), ("right", right))
    hint = "; None is unbounded"
    return Mask(
        _sliding_window, tuple(n if n is None else integer(f"sliding_window {side}", n, hint=hint) for side, n in sides)
    )


def _sliding_window(at: Stretch, left: int | None, right: int | None) -> Bands:
    lo = -INF if left is None else -left
    hi = INF if right is None else right
    return Bands.columns(at.start, at.stop - at.start, 0, at.kv_len, lo, hi)


def global_tokens(count_or_positions: int | Iterable[int]) -> Mask:
    """``q in G or k in G``: global tokens attend to all and are attended by all.

    ``G`` is the first ``count`` tokens, or the given positions. Raises ``ValueError`` for negative
    positions, and when bound to a sequence that a position lies beyond.
    """
    if isinstance(count_or_positions, Iterable):
        positions = tuple(sorted(set(integers("global_tokens positions", count_or_positions, -LARGEST))))
        if positions and positions[0] < 0:
            raise ValueError(f"global_tokens position {positions[0]}: positions count from 0")
        return Mask(_global_positions, (positions,))
    return Mask(_global_tokens, (integer("global_tokens count", count_or_positions),))


def _global_tokens(at: Stretch, count: int) -> Bands:
    head = max(min(at.stop, count) - at.start, 0)
    rows = Bands.columns(at.start, head, 0, at.kv_len)
    keys = Bands.columns(at.start + head, at.stop - at.start - head, 0, min(count, at.kv_len))
    return concat((rows, keys))


def _global_positions(at: Stretch, positions: tuple[int, ...]) -> Bands:
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


def documents(cu_seqlens: Iterable[int], cu_seqlens_k: Iterable[int] | None = None) -> Mask:
    """``q`` and ``k`` in the same document; document ``i`` is ``cu_seqlens[i] .. cu_seqlens[i + 1]``.

    ``cu_seqlens`` (a tensor, array or sequence of integers) starts at 0, never falls, and must end
    where the queries end; ``cu_seqlens_k`` (default the same) must end at the key length and have as
    many documents. Raises ``ValueError`` otherwise.
    """
    q = boundaries("cu_seqlens", cu_seqlens)
    k = q if cu_seqlens_k is None else boundaries("cu_seqlens_k", cu_seqlens_k)
    if len(q) != len(k):
        raise ValueError(f"cu_seqlens names {len(q) - 1} documents and cu_seqlens_k {len(k) - 1}: they must pair up")
    return Mask(_documents, (q, k) if k is not q else (q,))


def bounds_of(mask: Mask) -> tuple[int, ...] | None:
    """The bounds of the documents that a mask is cut with by ``&``, or None."""
    if mask.rule is _documents:
        return mask.args[0] if len(mask.args) == 1 else None
    found = [bounds_of(part) for part in mask.args] if mask.rule is _both else []
    return next((bounds for bounds in found if bounds is not None), None)


def contains(wide: Mask, narrow: Mask, seqlen: int) -> bool:
    """Whether every pair of ``narrow`` is one of ``wide``, over a sequence of ``seqlen`` tokens."""
    if wide.rule is _both:
        return all(contains(part, narrow, seqlen) for part in wide.args)
    return wide == narrow or (narrow - wide).area(seqlen, seqlen) == 0


def boundaries(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """The bounds of documents, from 0 on and never falling."""
    bounds = integers(name, values)
    if not bounds or bounds[0] != 0:
        raise ValueError(f"{name}={_brief(bounds)}: must start with 0, the beginning of the first document")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(
                f"{name}[{i + 1}]={b} comes after {a}: cumulative lengths must not fall; sort or re-add them"
            )
    return bounds


def _documents(at: Stretch, q: tuple[int, ...], k: tuple[int, ...] | None = None) -> Bands:
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


def prefix_lm(length: int) -> Mask:
    """``k <= q or k < length``: bidirectional over a prefix, causal after it."""
    return Mask(_prefix_lm, (integer("prefix_lm length", length),))


def _prefix_lm(at: Stretch, length: int) -> Bands:
    length = min(length, at.kv_len)
    rows = at.stop - at.start
    prefix = Bands.columns(at.start, rows, 0, length)
    return concat((prefix, Bands.columns(at.start, rows, length, at.kv_len - length, hi=0)))


def chunked(size: int) -> Mask:
    """``k // size == q // size``: attention inside chunks of ``size`` tokens."""
    return Mask(_chunked, (integer("chunked size", size, 1),))


def _chunked(at: Stretch, size: int) -> Bands:
    at_most((at.stop - at.start) // size)
    edges = np.arange(at.start // size, -(-at.stop // size) + 1, dtype=np.int64) * size
    q0, q1 = np.maximum(edges[:-1], at.start), np.minimum(edges[1:], at.stop)
    return Bands.columns(q0, q1 - q0, edges[:-1], np.minimum(edges[1:], at.kv_len) - edges[:-1])


def strided(stride: int) -> Mask:
    """``(q - k) % stride == 0``."""
    return Mask(_strided, (integer("strided stride", stride, 1),))


def _strided(at: Stretch, stride: int, lo: int = -INF, hi: int = INF) -> Bands:
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


def dilated(stride: int, window: int) -> Mask:
    """``q - k`` in ``{0, stride, 2 * stride, ..., window * stride}``: a causal window with holes."""
    return Mask(_dilated, (integer("dilated stride", stride, 1), integer("dilated window", window)))


def _dilated(at: Stretch, stride: int, window: int) -> Bands:
    return _strided(at, stride, -min(window * stride, INF), 0)


def longformer(window: int, global_tokens: int | Iterable[int], causal: bool = True) -> Mask:
    """Longformer (Beltagy et al., arXiv 2004.05150): a window of ``window`` tokens to the left (and,
    unless causal, to the right) plus global tokens; all ``& causal()`` if ``causal``."""
    causal = flag("longformer causal", causal)
    window = integer("longformer window", window)
    mask = sliding_window(window, 0 if causal else window) | _global_mask(global_tokens)
    return mask & _causal_mask() if causal else mask


def bigbird(block: int, num_window: int, num_global: int, num_random: int, seed: int = 0, causal: bool = True) -> Mask:
    """BigBird (Zaheer et al., arXiv 2007.14062) in blocks of ``block`` tokens.

    ``num_window`` blocks centred on the query's own (an odd number), ``num_global`` first blocks that
    attend and are attended everywhere, ``num_random`` distinct key blocks for every block row (earlier
    blocks only, if ``causal``), which depend on ``(seed, block row)`` alone. ``causal`` adds ``& causal()``.
    """
    block, causal = integer("bigbird block", block, 1), flag("bigbird causal", causal)
    if integer("bigbird num_window", num_window, 1) % 2 == 0:
        raise ValueError(f"bigbird num_window={num_window}: must be odd, the query's own block in the middle")
    first = integer("bigbird num_global", num_global) * block
    args = (block, integer("bigbird num_random", num_random), seed_of("bigbird seed", seed), causal)
    mask = (
        Mask(_block_window, (block, num_window // 2)) | global_tokens(min(first, LARGEST)) | Mask(_random_blocks, args)
    )
    return mask & _causal_mask() if causal else mask


def _block_rows(at: Stretch, block: int) -> Ints:
    first, stop = at.start // block, -(-at.stop // block)
    at_most(stop - first)
    return np.arange(first, stop, dtype=np.int64)


def _block_window(at: Stretch, block: int, reach: int) -> Bands:
    rows, reach = _block_rows(at, block), min(reach, max(at.q_end, at.kv_len) // block + 1)
    q0, q1 = np.maximum(rows * block, at.start), np.minimum((rows + 1) * block, at.stop)
    k0, k1 = np.maximum((rows - reach) * block, 0), np.minimum((rows + reach + 1) * block, at.kv_len)
    return Bands.columns(q0, q1 - q0, k0, k1 - k0)


def _random_blocks(at: Stretch, block: int, number: int, seed: int, causal: bool) -> Bands:
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


# `longformer` and `bigbird` take arguments that carry the names of these constructors.
_causal_mask = causal
_global_mask = global_tokens
