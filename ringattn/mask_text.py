"""Masks written as text, such as ``(sliding_window(1023) | global_tokens(64)) & causal()``: the constructors combined
with ``&``, ``|`` and ``-``, and nothing else."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ringattn import masks
from ringattn.arguments.values import shown
from ringattn.geometry.mask_words import CHARACTERS, TERMS
from ringattn.masks import Mask

MASKS: dict[str, Callable[..., Mask]] = {
    mask.__name__: mask
    for mask in (
        masks.full,
        masks.causal,
        masks.sliding_window,
        masks.global_tokens,
        masks.documents,
        masks.prefix_lm,
        masks.chunked,
        masks.strided,
        masks.dilated,
        masks.longformer,
        masks.bigbird,
    )
}


def parse_mask(text: str, without: Mapping[str, str] | None = None) -> Mask:
    """The mask that a text describes.

    Args:
        text: constructors with numbers or lists of numbers as arguments, in the algebra of masks.
        without: names of constructors that are not to be used, each with the reason, which the error quotes.

    Raises:
        ValueError: with the text, for anything that is not the algebra, and for whatever the constructors refuse.
    """
    if not text.strip():
        raise ValueError("a mask is empty; name one, for instance causal()")
    try:
        _check_size(text)
        return _evaluate(ast.parse(" ".join(text.split()), mode="eval").body, without or {})
    except SyntaxError as error:
        raise ValueError(f"mask {shown(text)} does not parse: {error.msg}; write it as in Python") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"mask {shown(text)}: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"mask {shown(text)} has too many brackets within brackets; leave some out") from None


def _check_size(text: str) -> None:
    """Raises for what would take minutes to read and to combine."""
    terms = text.count("(")  # each mask has a pair
    if len(text) > CHARACTERS or terms > TERMS:
        raise ValueError(
            f"it has {len(text):,} characters and about {terms:,} masks; it must have at most {CHARACTERS:,} and "
            f"{TERMS}: combine fewer"
        )


def _evaluate(node: ast.expr, without: Mapping[str, str]) -> Mask:
    known = [name for name in MASKS if name not in without]
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _evaluate(left, without) & _evaluate(right, without)
        case ast.BinOp(left, ast.BitOr(), right):
            return _evaluate(left, without) | _evaluate(right, without)
        case ast.BinOp(left, ast.Sub(), right):
            return _evaluate(left, without) - _evaluate(right, without)
        case ast.Call(ast.Name(name), arguments, keywords):
            if name in without:
                raise ValueError(without[name])
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"unknown mask {name!r}{hint}; known: {', '.join(known)}")
            if any(keyword.arg is None for keyword in keywords):
                raise ValueError(f"{ast.unparse(node)} unpacks with **; name the arguments")
            named = {str(keyword.arg): _literal(keyword.value) for keyword in keywords}
            return MASKS[name](*map(_literal, arguments), **named)
    raise ValueError(f"{shown(ast.unparse(node))} is no mask; combine {', '.join(known)} with &, | and -")


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{shown(ast.unparse(node))} is no number or list of numbers; write it out") from None
    return tuple(value) if isinstance(value, list) else value
