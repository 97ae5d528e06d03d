"""Masks written as the constructors that make them, in the algebra that `mask_text` reads back."""

from __future__ import annotations

from ringattn.arguments.values import LARGEST, shortened
from ringattn.geometry.masks import Expression, both, either, without
from ringattn.geometry.rules import (
    block_window,
    causal,
    global_positions,
    global_tokens,
    random_blocks,
    sliding_window,
)

TERMS, CHARACTERS = 64, 4096  # that are read: more than a mask that anyone would write, quick to read and to combine
SIGNS = {either: ("|", 0), both: ("&", 1), without: ("-", 2)}  # the higher ones bind more tightly, as in Python
ATOM = 3
HEAD = 160  # letters of what nobody could read back


def words_of(mask: Expression) -> str:
    """The text of a mask. Read back it is an equal mask, but where that would be longer than what is read: then lists
    show their first and last numbers and how many they are, and of many masks the first ones are written."""
    text = _written(mask, 0, whole=True)
    if len(text) <= CHARACTERS and text.count("(") <= TERMS:
        return text
    text = _written(mask, 0, whole=False)
    return text if mask.terms <= TERMS else f"{text[:HEAD]} ... ({mask.terms} masks)"


def _written(mask: Expression, least: int, whole: bool) -> str:
    """In brackets where its sign binds less tightly than ``least``."""
    if found := _bigbird(mask):
        return found
    if mask.rule not in SIGNS:
        return f"{_NAMES.get(mask.rule, mask.kind)}({', '.join(_argument(arg, whole) for arg in _arguments(mask))})"
    sign, binding = SIGNS[mask.rule]
    left, right = mask.args
    text = f"{_written(left, binding, whole)} {sign} {_written(right, binding + 1, whole)}"
    return f"({text})" if binding < least else text


_NAMES = {global_positions: "global_tokens"}


def _arguments(mask: Expression) -> tuple[object, ...]:
    return mask.args[:1] if mask.rule is sliding_window and mask.args[1] == 0 else mask.args


def _argument(arg: object, whole: bool) -> str:
    if not isinstance(arg, tuple):
        return repr(arg)
    return f"[{(repr(arg) if whole else shortened(arg))[1:-1].rstrip(',')}]"


def _bigbird(mask: Expression) -> str:
    """The call of :func:`ringattn.bigbird` that gives these blocks; empty where none does."""
    inner, is_causal = mask, False
    if mask.rule is both and mask.args[1].rule is causal:
        inner, is_causal = mask.args[0], True
    if inner.rule is not either or inner.args[0].rule is not either:
        return ""
    (window, first), blocks = inner.args[0].args, inner.args[1]
    if (window.rule, first.rule, blocks.rule) != (block_window, global_tokens, random_blocks):
        return ""
    (block, reach), (count,), (size, number, seed, earlier) = window.args, first.args, blocks.args
    heads = -(-count // block)
    if size != block or earlier != is_causal or min(heads * block, LARGEST) != count:
        return ""
    more = [f", seed={seed}"] * (seed != 0) + [", causal=False"] * (not is_causal)
    return f"bigbird({block}, {2 * reach + 1}, {heads}, {number}{''.join(more)})"
