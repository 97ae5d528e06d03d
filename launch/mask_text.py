"""Masks written as text in a config, such as "(sliding_window(1023) | global_tokens(64)) & causal()": the
library's own constructors combined with `&`, `|` and `-`, and nothing else."""

import ast
from collections.abc import Callable
from typing import Any

import ringattn
from launch.config import nearest

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
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"mask {text!r} does not parse: {error.msg}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"mask {text!r}: {error}") from None


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
            named = {keyword.arg: _literal(keyword.value) for keyword in keywords if keyword.arg}
            return MASKS[name](*map(_literal, arguments), **named)
    raise ValueError(f"{ast.unparse(node)!r} is no mask; combine {', '.join(MASKS)} with &, | and -")


def _literal(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    return tuple(value) if isinstance(value, list) else value
