"""`ringattn show`: the options of a picture, read as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringattn.mask_text import parse_mask
from ringattn.pictures.picture import Picture, writable
from ringattn.planning.shape import Shape
from ringattn.show import show

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def count(name: str, text: str) -> int:
    """A number of tokens or ranks: 131072, 131,072, 128K (1K is 1,024), 1M.

    Raises ``ValueError`` for anything else.
    """
    plain = text.strip().upper().replace(",", "").replace("_", "")
    unit = UNITS.get(plain[-1:], 1)
    try:
        value = float(plain[:-1]) * unit if unit > 1 else int(plain)
    except ValueError:
        value = -0.5
    if value < 0 or value != int(value):
        raise ValueError(
            f"--{name} {text}: must be a whole number, such as 131072 or 128K (K is 1,024, M is 1,048,576)"
        )
    return int(value)


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
        settings[name] = count(name.replace("_", "-"), value) if number else value
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
