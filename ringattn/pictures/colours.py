"""Colours that are told apart by whoever sees few of them, and in print: Okabe and Ito's for up to eight ranks
(jfly.uni-koeln.de/color), viridis for more (van der Walt and Smith, 2015), one blue that darkens for amounts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Colours = NDArray[np.uint8]  # [..., 3], red, green and blue

OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#595959")
VIRIDIS = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59",
)  # fmt: skip  # without its yellow end, which is faint on white
AMOUNTS = ("#ffffff", "#a8cfe6", "#3d94c8", "#0072b2", "#003f63", "#00263c")
INK, QUIET, GRID, PAPER = "#222222", "#666666", "#dddddd", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = OKABE_ITO[:4]
FAINTEST = 0.25  # of the ink of a cell that holds anything


def of_ranks(count: int) -> Colours:
    """One for each rank, ``[count, 3]``."""
    if count <= len(OKABE_ITO):
        return _numbers(OKABE_ITO[:count])
    return _along(VIRIDIS, np.linspace(0, 1, count))


def of_shares(share: NDArray[Any]) -> Colours:
    """The blue of a share from 0 to 1, white where it is 0."""
    return _along(AMOUNTS, ink(share))


def tinted(colours: Colours, share: NDArray[Any]) -> Colours:
    """Colours as strong as a share from 0 to 1."""
    strength = ink(share)[..., None]
    return np.rint(255 - (255 - colours.astype(float)) * strength).astype(np.uint8)


def ink(share: NDArray[Any]) -> NDArray[Any]:
    """How strong a share is drawn: by its root, so that a thin window shows, and never unseen."""
    return np.where(share > 0, FAINTEST + (1 - FAINTEST) * np.sqrt(share), 0.0)


def written(colour: Colours) -> str:
    """One colour as ``#rrggbb``."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def readable_on(fill: str) -> str:
    """What to write with on a colour, or on none: dark or white."""
    if fill == "none":
        return INK
    return INK if float(_numbers((fill,))[0] @ np.array([0.299, 0.587, 0.114])) > 140 else PAPER


def _numbers(names: tuple[str, ...]) -> Colours:
    return np.array([[int(name[at : at + 2], 16) for at in (1, 3, 5)] for name in names], np.uint8)


def _along(names: tuple[str, ...], place: NDArray[Any]) -> Colours:
    stops, fixed = _numbers(names), np.linspace(0, 1, len(names))
    parts = [np.interp(place, fixed, stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(parts, -1)).astype(np.uint8)
