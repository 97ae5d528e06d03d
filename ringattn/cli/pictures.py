"""`ringattn show`: the options of a picture, read as people write them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringattn.arguments.values import tokens_of
from ringattn.mask_text import parse_mask
from ringattn.pictures.picture import Picture, writable
from ringattn.planning.shape import Shape
from ringattn.show import show

# What the library says, and what this command has for it.
WORDS = (
    (re.compile(r"shape=ringattn\.Shape\([^)]*\)"), "--heads 32,8,128"),
    (re.compile(r"shape=Shape\([^)]*\)"), "--heads"),
    (re.compile(r"heads of shape\b"), "heads of --heads"),
    (re.compile(r"with Options\.topology=ringattn\.Topology\([^)]*\)"), "with --ranks-per-node"),
    (re.compile(r", or give Options\(rates=\.\.\.\)"), ""),
)
NUMBERS = ("seqlen", "kv_seqlen", "q_offset", "ranks", "ranks_per_node")
ARGUMENTS = re.compile(
    r"(?<![\w.-])(?:(?:kv_seqlen|q_offset|kv_layout|ranks_per_node)\b"
    r"|(?:view|seqlen|ranks|layout|schedule|ulysses|device)(?==))"
)


def picture(mask: str, out: Path | None, view: str | None, given: dict[str, str | None], heads: str | None) -> Picture:
    """The picture that the command is asked for. ``given``: options by name, None where they were left out.

    Raises ``ValueError`` for whatever does not fit.
    """
    if out is not None:
        writable(out)
    told = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {}
    for name, value in told.items():
        number = name in NUMBERS or (name == "ulysses" and value != "auto")
        settings[name] = tokens_of(f"--{name.replace('_', '-')}", value, least=0) if number else value
    if heads is not None:
        settings["shape"] = shape(heads)
    if "seqlen" not in settings:
        raise ValueError("--seqlen is missing: a mask alone has no length; say how many tokens, as --seqlen 128K")
    expression = parse_mask(mask)
    try:
        scene = show(expression, settings.pop("seqlen"), view=view, **settings).scene
    except ValueError as error:
        raise ValueError(of_options(str(error))) from None
    return Picture(replace(scene, notes=tuple(map(of_options, scene.notes))))


def of_options(text: str) -> str:
    """What the library says of its arguments, in the options of this command."""
    for said, option in WORDS:
        text = said.sub(option, text)
    return ARGUMENTS.sub(lambda found: f"--{found[0].replace('_', '-')}", text)


def shape(text: str) -> Shape:
    """Heads of calls: query heads, KV heads and head size, as 32,8,128.

    Raises ``ValueError`` for anything else.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--heads {text}: must be query heads, KV heads and head size, as 32,8,128")
    num_heads, num_kv_heads, head_dim = map(int, parts)
    try:
        return Shape(num_heads, num_kv_heads, head_dim)
    except ValueError as error:
        raise ValueError(f"--heads {text}: {str(error).removeprefix('Shape').lstrip('.: ')}") from None
