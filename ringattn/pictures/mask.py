"""A mask: which share of each block of queries and keys attends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ringattn.geometry.layouts import Layout
from ringattn.geometry.mask_words import words_of
from ringattn.geometry.masks import BoundMask, Expression
from ringattn.geometry.regular import areas, regular
from ringattn.geometry.rules import block_window, dilated, documents, global_positions, random_blocks
from ringattn.pictures import numbers
from ringattn.pictures.colours import of_ranks, of_shares, written
from ringattn.pictures.scene import Axis, Entry, Field, Panel, Scene

SHORTEST, LONGEST, TIMES = 256, 1 << 20, 16  # tokens of a picture of a mask without a length; of its largest window
SHARES = (0.0, 0.01, 0.1, 0.5, 1.0)
SWATCHES = 9  # of ranks in a legend


def picture(bound: BoundMask) -> Scene:
    """The mask alone."""
    return Scene(
        f"mask {words_of(bound.mask)}", sizes(bound), ((_panel(bound, None, "share of the pairs that attend"),),)
    )


def over_layout(bound: BoundMask, q_layout: Layout, k_layout: Layout) -> Scene:
    """The mask with who computes its queries, as colours, and who holds what at its borders."""
    keys = "" if k_layout.name == q_layout.name else f", keys {k_layout.name}"
    notes = (*sizes(bound), f"layout {q_layout.name}{keys} over {q_layout.world_size:,} ranks; {_held(q_layout)}")
    panel = _panel(bound, (q_layout, k_layout), "pairs by the rank that holds the query")
    return Scene(f"layout of {words_of(bound.mask)}", notes, ((panel,),))


def of_its_own(mask: Expression) -> Scene:
    """A mask that nobody told a length, at one that suits it: where its documents end, or else a power of two so long
    that a window or block of it is a sixteenth.

    Raises ``ValueError`` where no length fits all its parts.
    """
    q_len, kv_len, why = _length(mask)
    scene = picture(mask.bind(q_len, kv_len))
    return replace(
        scene, notes=(f"drawn at {q_len:,} tokens, {why}; any other: ringattn.show(mask, seqlen)", *scene.notes)
    )


def _length(mask: Expression) -> tuple[int, int, str]:
    """Queries, keys, and why so many."""
    parts = list(_parts(mask))
    for part in parts:
        if part.rule is documents:
            return part.args[0][-1], part.args[-1][-1], "where its documents end"
    positions = [part.args[0][-1] + 1 for part in parts if part.rule is global_positions and part.args[0]]
    reach = [_reach(part) for part in parts if part.rule is not global_positions]
    least = max([SHORTEST, *(min(TIMES * size, LONGEST) for size in reach), *positions])
    length = 1 << (least - 1).bit_length()
    why = "a length like any other" if length == SHORTEST else "which show its windows and blocks"
    return length, length, why


def _parts(mask: Expression) -> Iterator[Expression]:
    """The rules that an expression combines."""
    inner = [arg for arg in mask.args if isinstance(arg, Expression)]
    if not inner:
        yield mask
    for arg in inner:
        yield from _parts(arg)


def _reach(part: Expression) -> int:
    """The largest window, block or prefix of a rule."""
    if part.rule is dilated:
        return int(part.args[0] * part.args[1])
    if part.rule in (random_blocks, block_window):
        return int(part.args[0])
    return max((int(arg) for arg in part.args if isinstance(arg, int)), default=1)


def sizes(bound: BoundMask) -> tuple[str, ...]:
    """Lengths and the exact area, in a sentence."""
    pairs, whole = area(bound), bound.q_len * bound.kv_len
    lengths = f"{bound.q_len:,} tokens"
    if bound.kv_len != bound.q_len or bound.q_offset:
        lengths = f"{bound.q_len:,} queries from position {bound.q_offset:,} on, {bound.kv_len:,} keys"
    return (f"{lengths}: {pairs:,} pairs attend of {whole:,}, {numbers.share(pairs, whole)}",)


def area(bound: BoundMask) -> int:
    """The exact number of attending pairs."""
    return int(areas(regular(bound.whole)).sum())


def field_of(bound: BoundMask, layouts: tuple[Layout, Layout] | None) -> Field:
    """All pairs of a mask."""
    queries = bound.q_offset, bound.q_offset + bound.q_len
    return Field(regular(bound.whole), queries, (0, bound.kv_len), layouts)


def side(bound: BoundMask, size: int) -> tuple[int, int]:
    """Width and height in pixels of a picture of so many, in the mask's own proportions as far as these are no line."""
    longest = max(bound.q_len, bound.kv_len, 1)
    return max(size * bound.kv_len // longest, size // 4), max(size * bound.q_len // longest, size // 4)


def ranks_legend(count: int, most: int = SWATCHES) -> tuple[Entry, ...]:
    """Colours of the ranks, of many only some."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    found = of_ranks(count)
    return tuple(Entry(written(found[rank]), f"rank {rank:,}") for rank in chosen.tolist())


def shares_legend() -> tuple[Entry, ...]:
    """Colours of some shares."""
    found = of_shares(np.array(SHARES))
    return tuple(Entry(written(colour), f"{share:.0%}") for colour, share in zip(found, SHARES, strict=True))


def _panel(bound: BoundMask, layouts: tuple[Layout, Layout] | None, title: str) -> Panel:
    field = field_of(bound, layouts)
    width, height = side(bound, 512)
    legend = shares_legend() if layouts is None else ranks_legend(layouts[0].world_size)
    head = "attend" if layouts is None else "stronger: more attend; at the edges: who holds it"
    return Panel(
        title,
        Axis("key position", *field.keys, "tokens"),
        Axis("query position", *field.queries, "tokens", down=True),
        (field,),
        width,
        height,
        legend,
        head,
    )


def _held(layout: Layout) -> str:
    least, most = int(layout.sizes.min()), int(layout.sizes.max())
    held = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    mixed = "; ranks take turns token by token, so cells of several mix their colours" if layout.interleaved else ""
    return f"{held} tokens a rank{mixed}"
