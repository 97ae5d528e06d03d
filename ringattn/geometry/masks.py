"""Masks: who may attend to whom, as hashable expressions of a rule and its arguments.

``q`` and ``k`` count global positions from 0 (``q_offset`` shifts the queries). An expression is bound to
lengths by :meth:`Expression.bind` and then gives its bands for any stretch of queries, so that a rank of a
large world never builds the whole sequence. ``&``, ``|`` and ``-`` combine masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import PAIRS, integer, shortened, shown
from ringattn.geometry import algebra
from ringattn.geometry.bands import ANY, HI, K_AXIS, LO, Q_AXIS, Bands, TooManyPieces
from ringattn.geometry.regular import areas, regular
from ringattn.geometry.rules import Stretch, documents
from ringattn.geometry.spans import Ints

TERMS = 256  # masks in one expression: each is evaluated, and an expression nests as deep
DENSE = 1 << 34  # pairs of a dense mask, a byte each


@dataclass(frozen=True)
class Expression:
    """A rule and its arguments; two expressions, and what combines them, are one, too.

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
        parts = [arg.digest if isinstance(arg, Expression) else repr(arg) for arg in self.args]
        return hashlib.sha256("|".join((self.rule.__name__, *parts)).encode()).hexdigest()[:16]

    def __post_init__(self) -> None:
        # Made at once, not when first asked for: a compiled graph may only read it.
        object.__setattr__(self, "handle", np.frombuffer(bytes.fromhex(self.digest), np.int64).copy())

    @cached_property
    def terms(self) -> int:
        """How many masks the expression is made of."""
        return sum(arg.terms for arg in self.args if isinstance(arg, Expression)) or 1

    def __and__(self, other: Self) -> Self:
        return self._with(both, other)

    def __or__(self, other: Self) -> Self:
        return self._with(either, other)

    def __sub__(self, other: Self) -> Self:
        return self._with(without, other)

    def _with(self, rule: Callable[..., Bands], other: Self) -> Self:
        if not isinstance(other, Expression):
            raise ValueError(f"{shown(other)} is not a mask: combine masks with masks, e.g. causal() & documents(...)")
        if self.terms + other.terms > TERMS:
            raise ValueError(
                f"a mask of {self.terms + other.terms} terms: must be at most {TERMS}; name many positions in one "
                "global_tokens(), many documents in one documents()"
            )
        return type(self)(rule, (self, other))

    @property
    def kind(self) -> str:
        """The name of its rule: of the function that makes such a mask; ``both``, ``either`` or ``without``."""
        return self.rule.__name__

    def __repr__(self) -> str:
        if self.rule in _SIGNS:
            a, b = self.args
            return f"({a!r} {_SIGNS[self.rule]} {b!r})"
        return f"{self.kind}({', '.join(shortened(a) for a in self.args)})"

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

    def pairs(self, q_len: int, kv_len: int, q_offset: int = 0) -> NDArray[np.bool_]:
        """Bool array ``[q_len, kv_len]``, True where query ``q_offset + i`` attends key ``j``."""
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
        return out


@dataclass(frozen=True)
class BoundMask:
    """A mask with lengths: gives its disjoint bands for any stretch of queries."""

    mask: Expression
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


# -- combinations -------------------------------------------------------------------------------


def both(at: Stretch, a: Expression, b: Expression) -> Bands:
    return algebra.intersect(a.rule(at, *a.args), b.rule(at, *b.args))


def either(at: Stretch, a: Expression, b: Expression) -> Bands:
    return algebra.union(a.rule(at, *a.args), b.rule(at, *b.args))


def without(at: Stretch, a: Expression, b: Expression) -> Bands:
    return algebra.subtract(a.rule(at, *a.args), b.rule(at, *b.args))


_SIGNS = {both: "&", either: "|", without: "-"}


def bounds_of(mask: Expression) -> tuple[int, ...] | None:
    """The bounds of the documents that a mask is cut with by ``&``, or None."""
    if mask.rule is documents:
        return mask.args[0] if len(mask.args) == 1 else None
    found = [bounds_of(part) for part in mask.args] if mask.rule is both else []
    return next((bounds for bounds in found if bounds is not None), None)


def contains(wide: Expression, narrow: Expression, seqlen: int) -> bool:
    """Whether every pair of ``narrow`` is one of ``wide``, over a sequence of ``seqlen`` tokens."""
    if wide.rule is both:
        return all(contains(part, narrow, seqlen) for part in wide.args)
    return wide == narrow or (narrow - wide).area(seqlen, seqlen) == 0
