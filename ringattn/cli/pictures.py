"""`ringattn show`: the options of a picture, read as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringattn.arguments.values import tokens_of
from ringattn.mask_text import parse_mask
from ringattn.pictures.picture import Picture, writable
from ringattn.planning.shape import Shape
from ringattn.show import show


def picture(mask: str, out: Path | None, view: str | None, given: dict[str, str | None], heads: str | None) -> Picture:
    """The picture that the command is asked for. ``given``: options by name, None where they were left out.

    Raises ``ValueError`` for whatever does not fit.
    """
    if out is not None:
        writable(out)
    told = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {}
    for name, value in told.items():
        number = name in ("seqlen", "kv_seqlen", "q_offset", "ranks") or (name == "ulysses" and value != "auto")
        settings[name] = tokens_of(f"--{name.replace('_', '-')}", value, least=0) if number else value
    if heads is not None:
        settings["shape"] = shape(heads)
    if "seqlen" not in settings:
        raise ValueError("--seqlen is missing: a mask alone has no length; say how many tokens, as --seqlen 128K")
    return show(parse_mask(mask), settings.pop("seqlen"), view=view, **settings)


def shape(text: str) -> Shape:
    """Heads of calls: query heads, KV heads and head size, as 32,8,128.

    Raises ``ValueError`` for anything else.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--heads {text}: must be query heads, KV heads and head size, as 32,8,128")
    num_heads, num_kv_heads, head_dim = map(int, parts)
    return Shape(num_heads, num_kv_heads, head_dim)
