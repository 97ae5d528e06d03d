"""Masks written as text in a config, such as "(sliding_window(1023) | global_tokens(64)) & causal()": the
library's own constructors combined with `&`, `|` and `-`, and nothing else."""

import ast
from collections.abc import Callable
from typing import Any

import ringattn
from launch.rules import nearest, shown

TERMS, CHARACTERS = 64, 4096  # more than a mask that anyone would write, and quick to read and to combine

MASKS: dict[str, Callable[..., ringattn.Mask]] = {
    mask.__name__: mask
    for mask in (
        ringattn.full,
        ringattn.causal,
        ringattn.sliding_window,
        ringattn.global_tokens,
        ringattn.prefix_lm,
        ringattn.chunked,
        ringattn.strided,
        ringattn.dilated,
        ringattn.longformer,
        ringattn.bigbird,
    )
}


def parse_mask(text: str) -> ringattn.Mask:
    """The mask that `text` describes. Raises ValueError with the text for anything that is not the mask
    algebra, and for whatever the constructors refuse. `documents` is not among the names: its borders come
    from the data."""
    if not text.strip():
        raise ValueError('a mask is empty; name one, for instance masks = ["causal()"]')
    try:
        _check_size(text)
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
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
            f"{TERMS}: documents come from the text (documents = true), other masks combine fewer"
        )


def _evaluate(node: ast.expr) -> ringattn.Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _evaluate(left) & _evaluate(right)
        case ast.BinOp(left, ast.BitOr(), right):
            return _evaluate(left) | _evaluate(right)
        case ast.BinOp(left, ast.Sub(), right):
            return _evaluate(left) - _evaluate(right)
        case ast.Call(ast.Name("documents")):
            raise ValueError("documents come from the text; set documents = true")
        case ast.Call(ast.Name(name), arguments, keywords):
            if name not in MASKS:
                raise ValueError(f"unknown mask {name!r}{nearest(name, MASKS)}; known: {', '.join(MASKS)}")
            if any(keyword.arg is None for keyword in keywords):
                raise ValueError(f"{ast.unparse(node)} unpacks with **; name the arguments")
            named = {str(keyword.arg): _literal(keyword.value) for keyword in keywords}
            return MASKS[name](*map(_literal, arguments), **named)
    raise ValueError(f"{shown(ast.unparse(node))} is no mask; combine {', '.join(MASKS)} with &, | and -")


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{shown(ast.unparse(node))} is no number or list of numbers; write it out") from None
    return tuple(value) if isinstance(value, list) else value
