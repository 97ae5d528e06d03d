"""The masks that users call by name. A mask says who may attend to whom, as an expression of rules and arguments;
``&``, ``|`` and ``-`` combine masks. Positions count from 0 (``q_offset`` shifts the queries)."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import torch

from ringattn.arguments.values import LARGEST, boundaries, flag, integer, integers, seed_of
from ringattn.geometry import rules
from ringattn.geometry.masks import Expression
from ringattn.pictures.mask import of_its_own
from ringattn.pictures.svg import svg


class Mask(Expression):
    """A mask expression. Build one with the functions of this module and combine with ``&``, ``|``, ``-``.

    Equal expressions are equal and hash equal, on every rank and in every process.
    """

    def dense(self, q_len: int, kv_len: int, q_offset: int = 0) -> torch.Tensor:
        """Bool tensor ``[q_len, kv_len]``, True where query ``q_offset + i`` attends key ``j``.

        Raises ``ValueError`` beyond 2**34 pairs, a byte each.
        """
        return torch.from_numpy(self.pairs(q_len, kv_len, q_offset))

    def __bool__(self) -> bool:
        """Refused: `a and b` would be b, whatever a is."""
        raise TypeError("a mask is neither true nor false: combine masks with &, | and -, not with and, or and not")

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture at a length that suits the mask, which it names. ``ringattn.show`` has the
        others."""
        try:
            return svg(of_its_own(self))
        except ValueError:  # no length fits all its parts
            return f"<code>{escape(repr(self))}</code>"


def full() -> Mask:
    """Every query attends every key."""
    return Mask(rules.full)


def causal() -> Mask:
    """``k <= q``, in absolute positions: with ``q_offset`` the queries simply start later."""
    return Mask(rules.causal)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """``q - left <= k <= q + right``; ``None`` is unbounded. ``left=1023, right=0`` sees 1,024 keys.

    Raises ``ValueError`` for a negative side.
    """
    sides = (("left", left), ("right", right))
    hint = "; None is unbounded"
    return Mask(
        rules.sliding_window,
        tuple(n if n is None else integer(f"sliding_window {side}", n, hint=hint) for side, n in sides),
    )


def global_tokens(count_or_positions: int | Iterable[int]) -> Mask:
    """``q in G or k in G``: global tokens attend to all and are attended by all.

    ``G`` is the first ``count`` tokens, or the given positions. Raises ``ValueError`` for negative
    positions, and when bound to a sequence that a position lies beyond.
    """
    if isinstance(count_or_positions, Iterable):
        positions = tuple(sorted(set(integers("global_tokens positions", count_or_positions, -LARGEST))))
        if positions and positions[0] < 0:
            raise ValueError(f"global_tokens position {positions[0]}: positions count from 0")
        return Mask(rules.global_positions, (positions,))
    return Mask(rules.global_tokens, (integer("global_tokens count", count_or_positions),))


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
    return Mask(rules.documents, (q, k) if k is not q else (q,))


def prefix_lm(length: int) -> Mask:
    """``k <= q or k < length``: bidirectional over a prefix, causal after it."""
    return Mask(rules.prefix_lm, (integer("prefix_lm length", length),))


def chunked(size: int) -> Mask:
    """``k // size == q // size``: attention inside chunks of ``size`` tokens."""
    return Mask(rules.chunked, (integer("chunked size", size, 1),))


def strided(stride: int) -> Mask:
    """``(q - k) % stride == 0``."""
    return Mask(rules.strided, (integer("strided stride", stride, 1),))


def dilated(stride: int, window: int) -> Mask:
    """``q - k`` in ``{0, stride, 2 * stride, ..., window * stride}``: a causal window with holes."""
    return Mask(rules.dilated, (integer("dilated stride", stride, 1), integer("dilated window", window)))


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
        Mask(rules.block_window, (block, num_window // 2))
        | global_tokens(min(first, LARGEST))
        | Mask(rules.random_blocks, args)
    )
    return mask & _causal_mask() if causal else mask


# `longformer` and `bigbird` take arguments that carry the names of these constructors.
_causal_mask = causal
_global_mask = global_tokens
