"""Layouts side by side: each over the mask, and what it costs in balance, bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ringattn.geometry.mask_words import words_of
from ringattn.pictures import mask, numbers
from ringattn.pictures.charts import LONGEST
from ringattn.pictures.scene import Axis, Panel, Rect, Scene
from ringattn.planning.placement import Candidate, Offer, Problem, choose

NAMES = ("contiguous", "zigzag", "striped", "balanced")
SIDE = 4  # masks in a row
SMALL = 190  # pixels of a mask
PALE = ("#a8cfe6", "#f6d48f", "#8fd3bd")  # bars that names are written on


def candidates(problem: Problem, names: Sequence[str] = NAMES) -> dict[str, Candidate | str]:
    """The candidate of each layout by name, or why it cannot be taken."""
    found: dict[str, Candidate | str] = {}
    for name in names:
        try:
            found[name] = choose(problem, name).taken
        except ValueError as refused:
            found[name] = str(refused)
    return found


def picture(problem: Problem, found: dict[str, Candidate | str], auto: Candidate, notes: Sequence[str]) -> Scene:
    """The first mask of the problem under each candidate; figures of their best schedules. ``auto``: the candidate that
    is taken where none is named."""
    made_of = {name: made for name, made in found.items() if isinstance(made, Candidate)}
    same = {name: made.q_layout.name for name, made in made_of.items() if made.q_layout.name in made_of.keys() - {name}}
    taken = {name: made for name, made in made_of.items() if name not in same}
    offers = {name: made.offers[0] for name, made in taken.items()}
    best = auto.q_layout.name
    takes = f"auto takes {best}, schedule {auto.offers[0].schedule}"
    once = [f"{name} comes out as {other} here, which is drawn once" for name, other in same.items()]
    left_out = [f"{name} left out: {why}" for name, why in found.items() if isinstance(why, str)]
    bound = problem.masks[0]
    small = [
        _small(mask.over_layout(bound, made.q_layout, made.k_layout), name, offers[name], made.q_layout.interleaved)
        for name, made in taken.items()
    ]
    small = [
        replace(panel, taken=True, title=f"{panel.title} (auto)") if name == best else panel
        for panel, name in zip(small, taken, strict=True)
    ]
    small[-1] = replace(small[-1], legend=mask.ranks_legend(problem.world_size), legend_title="of all of them")
    rows = [tuple(small[first : first + SIDE]) for first in range(0, len(small), SIDE)]
    said = {
        ("largest over mean work", ""): {name: one.balance for name, one in offers.items()},
        ("bytes to the rank that gets most", "B"): {name: float(sum(one.moved)) for name, one in offers.items()},
        ("seconds, both passes, estimated", "s"): {name: one.seconds for name, one in offers.items()},
    }
    figures = tuple(
        _figures(*what, colour, values, offers, best) for colour, (what, values) in zip(PALE, said.items(), strict=True)
    )
    return Scene(f"layouts of {words_of(bound.mask)}", (*notes, takes, *once, *left_out), (*rows, figures))


def _small(scene: Scene, name: str, offer: Offer, interleaved: bool) -> Panel:
    """The panel of a layout, small and without its legend."""
    panel = scene.panels[0]
    width, height = panel.width * SMALL // 512, panel.height * SMALL // 512
    mixed = ", colours mixed" if interleaved else ""
    return replace(
        panel, title=f"{name}, {offer.schedule}{mixed}", width=width, height=height, legend=(), legend_title=""
    )


def _figures(
    title: str, unit: str, colour: str, values: dict[str, float], offers: dict[str, Offer], best: str
) -> Panel:
    """Bars lying down, one for each layout, with its name and number on it; ``best`` is marked."""
    top = max(values.values(), default=0.0) or 1.0
    marks, lines = [], []
    for row, (name, value) in enumerate(values.items()):
        word = f"{value:.3f}" if not unit else numbers.written(value, unit)
        offer = offers[name]
        note = (
            f"{name} with {offer.schedule}\n{title}: {word}\nbalance {offer.balance:.3f}, "
            f"{numbers.amount(sum(offer.moved), 'B')}, {numbers.seconds(offer.seconds)}, "
            f"{offer.calls:,} kernel call{'' if offer.calls == 1 else 's'}"
        )
        marks.append(Rect(0, row + 0.12, top, row + 0.88, "#f2f2f2", note, ""))
        marks.append(Rect(0, row + 0.12, value, row + 0.88, colour, note, ""))
        marks.append(Rect(0, row + 0.12, top, row + 0.88, "none", note, f"{name}  {word}{', auto' * (name == best)}"))
        bar = "█" * max(round(LONGEST * value / top), int(value > 0))
        lines.append(f"{name:12} {bar:{LONGEST}} {word}  ({offer.schedule}){' <- auto' * (name == best)}")
    axis = Axis("", 0, len(values), "names", down=True)
    return Panel(title, Axis("", 0, top, unit), axis, tuple(marks), SMALL, 26 * max(len(values), 1), lines=tuple(lines))
