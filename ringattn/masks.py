"""Masks: who may attend to whom, as hashable expressions of a rule and its arguments.

``q`` and ``k`` count global positions from 0 (``q_offset`` shifts the queries). A mask is bound to
lengths by :meth:`Mask.bind` and then gives its bands for any stretch of queries, so that a rank of a
large world never builds the whole sequence. ``&``, ``|`` and ``-`` combine masks.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn.bands import ANY, HI, K_AXIS, LO, Q_AXIS, Bands, areas, concat, regular
from ringattn.bands import intersect as _intersect
from ringattn.bands import subtract as _subtract
from ringattn.bands import union as _union
from ringattn.spans import INF, Intervals, Ints

if TYPE_CHECKING:
    import torch


LARGEST = 1 << 40  # of any argument: sums and products of a few stay far inside int64


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
        return self._hash  # thousands of document bounds are hashed once, not at every call

    @cached_property
    def _hash(self) -> int:
        return hash((self.rule, self.args))

    @cached_property
    def digest(self) -> str:
        """Equal exactly for equal expressions, in every process: for comparing ranks."""
        parts = [arg.digest if isinstance(arg, Mask) else repr(arg) for arg in self.args]
        return hashlib.sha256("|".join((self.rule.__name__, *parts)).encode()).hexdigest()[:16]

    def __post_init__(self) -> None:
        # Made at once, not when first asked for: a compiled graph may only read it.
        object.__setattr__(self, "handle", np.frombuffer(bytes.fromhex(self.digest), np.int64).copy())

    def __and__(self, other: Mask) -> Mask:
        return Mask(_both, (self, _checked(other)))

    def __or__(self, other: Mask) -> Mask:
        return Mask(_either, (self, _checked(other)))

    def __sub__(self, other: Mask) -> Mask:
        return Mask(_without, (self, _checked(other)))

    def __repr__(self) -> str:
        if self.rule in _SIGNS:
            a, b = self.args
            return f"({a!r} {_SIGNS[self.rule]} {b!r})"
        return f"{self.rule.__name__.strip('_')}({', '.join(_brief(a) for a in self.args)})"

    def bind(self, q_len: int, kv_len: int, q_offset: int = 0) -> BoundMask:
        """The mask over ``q_len`` queries at positions ``q_offset ...`` and ``kv_len`` keys at ``0 ...``.

        Raises ``ValueError`` for lengths the mask does not fit (documents that end elsewhere, global
        positions beyond the sequence).
        """
        for name, value in (("q_len", q_len), ("kv_len", kv_len), ("q_offset", q_offset)):
            if operator.index(value) < 0:
                raise ValueError(f"{name}={value}: lengths and offsets are counts of tokens, 0 or more")
        bound = BoundMask(self, q_len, kv_len, q_offset)
        bound.bands(q_offset, q_offset)
        return bound

    def area(self, q_len: int, kv_len: int, q_offset: int = 0) -> int:
        """The exact number of attending pairs."""
        bound = self.bind(q_len, kv_len, q_offset)
        return int(areas(regular(bound.bands(q_offset, q_offset + q_len))).sum())

    def dense(self, q_len: int, kv_len: int, q_offset: int = 0) -> torch.Tensor:
        """Bool tensor ``[q_len, kv_len]``, True where query ``q_offset + i`` attends key ``j``."""
        import torch  # here alone: geometry itself never needs torch

        bound = self.bind(q_len, kv_len, q_offset)
        out = np.zeros((q_len, kv_len), bool)
        bands = regular(bound.bands(q_offset, q_offset + q_len))
        for row in bands.data:
            q, k = _positions(bands, row, Q_AXIS), _positions(bands, row, K_AXIS)
            diagonal = k[None, :] - q[:, None]
            out[np.ix_(q - q_offset, k)] |= (diagonal >= row[LO]) & (diagonal <= row[HI])
        return torch.from_numpy(out)


@dataclass(frozen=True)
class BoundMask:
    """A mask with lengths: gives its disjoint bands for any stretch of queries."""

    mask: Mask
    q_len: int
    kv_len: int
    q_offset: int = 0

    def bands(self, start: int, stop: int) -> Bands:
        """The bands of queries ``[start, stop)`` (global positions)."""
        at = Stretch(start, stop, self.q_offset + self.q_len, self.kv_len)
        return self.mask.rule(at, *self.mask.args)

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


def _checked(other: object) -> Mask:
    if not isinstance(other, Mask):
        raise ValueError(f"{other!r} is not a mask: combine masks with masks, e.g. causal() & documents(...)")
    return other


def _brief(arg: object) -> str:
    if isinstance(arg, tuple) and len(arg) > 6:
        return f"({', '.join(map(str, arg[:3]))}, ... {len(arg)} numbers ..., {arg[-1]})"
    return repr(arg)


def at_least(name: str, value: object, least: int) -> int:
    """An integer argument, or a ValueError with the value, the rule and what to pass."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}") from None
    if number < least:
        raise ValueError(f"{name}={number}: must be at least {least}")
    if number > LARGEST:
        raise ValueError(f"{name}={number}: must be at most {LARGEST} (2**40)")
    return number


def _integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    try:
        numbers = values.tolist() if hasattr(values, "tolist") else list(values)
        return tuple(operator.index(v) for v in numbers)
    except TypeError:
        raise ValueError(f"{name}={values!r}: must be a sequence of integers") from None


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
    return Mask(_sliding_window, (_side("left", left), _side("right", right)))


def _side(name: str, tokens: int | None) -> int | None:
    try:
        return None if tokens is None else at_least(f"sliding_window {name}", tokens, 0)
    except ValueError as error:
        raise ValueError(f"{error}; None is unbounded") from None


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
        positions = tuple(sorted(set(_integers("global_tokens positions", count_or_positions))))
        if positions and positions[0] < 0:
            raise ValueError(f"global_tokens position {positions[0]}: positions count from 0")
        return Mask(_global_positions, (positions,))
    return Mask(_global_tokens, (at_least("global_tokens count", count_or_positions, 0),))


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
    bounds = _integers(name, values)
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
    return Mask(_prefix_lm, (at_least("prefix_lm length", length, 0),))


def _prefix_lm(at: Stretch, length: int) -> Bands:
    length = min(length, at.kv_len)
    rows = at.stop - at.start
    prefix = Bands.columns(at.start, rows, 0, length)
    return concat((prefix, Bands.columns(at.start, rows, length, at.kv_len - length, hi=0)))


def chunked(size: int) -> Mask:
    """``k // size == q // size``: attention inside chunks of ``size`` tokens."""
    return Mask(_chunked, (at_least("chunked size", size, 1),))


def _chunked(at: Stretch, size: int) -> Bands:
    edges = np.arange(at.start // size, -(-at.stop // size) + 1, dtype=np.int64) * size
    q0, q1 = np.maximum(edges[:-1], at.start), np.minimum(edges[1:], at.stop)
    return Bands.columns(q0, q1 - q0, edges[:-1], np.minimum(edges[1:], at.kv_len) - edges[:-1])


def strided(stride: int) -> Mask:
    """``(q - k) % stride == 0``."""
    return Mask(_strided, (at_least("strided stride", stride, 1),))


def _strided(at: Stretch, stride: int, lo: int = -INF, hi: int = INF) -> Bands:
    residue = np.arange(stride, dtype=np.int64)
    q0 = at.start + (residue - at.start) % stride
    q_count, k_count = -((q0 - at.stop) // stride), -((residue - at.kv_len) // stride)
    return Bands.columns(q0, q_count, residue, k_count, lo, hi, step=stride)


def dilated(stride: int, window: int) -> Mask:
    """``q - k`` in ``{0, stride, 2 * stride, ..., window * stride}``: a causal window with holes."""
    return Mask(_dilated, (at_least("dilated stride", stride, 1), at_least("dilated window", window, 0)))


def _dilated(at: Stretch, stride: int, window: int) -> Bands:
    return _strided(at, stride, -window * stride, 0)


def longformer(window: int, global_tokens: int | Iterable[int], causal: bool = True) -> Mask:
    """Longformer (Beltagy et al., arXiv 2004.05150): a window of ``window`` tokens to the left (and,
    unless causal, to the right) plus global tokens; all ``& causal()`` if ``causal``."""
    local = sliding_window(window, 0 if causal else window)
    mask = local | _global_mask(global_tokens)
    return mask & _causal_mask() if causal else mask


def bigbird(block: int, num_window: int, num_global: int, num_random: int, seed: int = 0, causal: bool = True) -> Mask:
    """BigBird (Zaheer et al., arXiv 2007.14062) in blocks of ``block`` tokens.

    ``num_window`` blocks centred on the query's own (an odd number), ``num_global`` first blocks that
    attend and are attended everywhere, ``num_random`` distinct key blocks for every block row (earlier
    blocks only, if ``causal``), which depend on ``(seed, block row)`` alone. ``causal`` adds ``& causal()``.
    """
    block = at_least("bigbird block", block, 1)
    if at_least("bigbird num_window", num_window, 1) % 2 == 0:
        raise ValueError(f"bigbird num_window={num_window}: must be odd, the query's own block in the middle")
    reach = num_window // 2
    mask = Mask(_block_window, (block, reach))
    mask = mask | global_tokens(at_least("bigbird num_global", num_global, 0) * block)
    args = (block, at_least("bigbird num_random", num_random, 0), at_least("bigbird seed", seed, 0), bool(causal))
    mask = mask | Mask(_random_blocks, args)
    return mask & _causal_mask() if causal else mask


def _block_window(at: Stretch, block: int, reach: int) -> Bands:
    rows = np.arange(at.start // block, -(-at.stop // block), dtype=np.int64)
    q0, q1 = np.maximum(rows * block, at.start), np.minimum((rows + 1) * block, at.stop)
    k0, k1 = np.maximum((rows - reach) * block, 0), np.minimum((rows + reach + 1) * block, at.kv_len)
    return Bands.columns(q0, q1 - q0, k0, k1 - k0)


def _random_blocks(at: Stretch, block: int, number: int, seed: int, causal: bool) -> Bands:
    rows = np.arange(at.start // block, -(-at.stop // block), dtype=np.int64)
    pool = rows if causal else np.full_like(rows, -(-at.kv_len // block))
    picks = np.empty((len(rows), 0), np.int64)
    for draw in range(number):
        # The n-th draw is uniform over the blocks not yet drawn: skip past the earlier ones in order.
        left = pool - draw
        pick = (_hash(seed, rows, draw) % np.maximum(left, 1).astype(np.uint64)).astype(np.int64)
        for earlier in np.sort(picks, 1).T:
            pick += (pick >= earlier) & (earlier >= 0)
        picks = np.concatenate((picks, np.where(left > 0, pick, -1)[:, None]), 1)
    q0, q1 = np.maximum(rows * block, at.start), np.minimum((rows + 1) * block, at.stop)
    q0, count = np.repeat(q0, number), np.repeat(q1 - q0, number)
    k0 = picks.reshape(-1) * block
    return Bands.columns(q0, count, k0, np.where(k0 < 0, 0, np.minimum(k0 + block, at.kv_len) - k0))


def _hash(seed: int, rows: Ints, draw: int) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, 2014) of ``(seed, row, draw)``, as uint64."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 1_000_003 + draw + 1)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return x


# `longformer` and `bigbird` take arguments that carry the names of these constructors.
_causal_mask = causal
_global_mask = global_tokens
