"""Rates of kernels: what each of them does on tiles of a kind, measured on a device, as `auto` compares them.

A table is a JSON file: of this device, where `ringattn calibrate` has written one, or one that comes with the library.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ringattn.planning.hardware import AMPERE, HOPPER, known_gpu
from ringattn.planning.launches import Launch

SHIPPED = Path(__file__).parent / "tables"
TABLES = {HOPPER.name: "hopper", AMPERE.name: "ampere"}
UNKNOWN = 1e9  # FLOP/s of a kernel that a table says nothing of: the last to be taken
TERA = 1e12
DIGITS, FASTEST = 12, 1e6  # of a size in a table, and TFLOP/s
LIKE = {"full": "full", "causal": "full", "band": "causal", "window": "band", "stack": "full"}  # where a table has none


class Kind(NamedTuple):
    """What tells how fast a tile is computed: "full", "causal" (a square below its diagonal), "band" (another bound on
    one side) or "window" (on both), or "stack", many small tiles in one call; and its size in tokens: the side of a
    square of as many pairs, or a window's width."""

    shape: str
    size: int

    @staticmethod
    def of(launch: Launch) -> Kind:
        nq, nk = (_length(rows) // launch.count for rows in (launch.q, launch.k))
        side = math.isqrt(nq * nk)
        if launch.count > 1:
            return Kind("stack", side)
        if launch.window in ((None, None), (None, 0)):
            shape = "full" if launch.window[1] is None else "causal" if nq == nk else "band"
            return Kind(shape, side)
        return Kind("band", side) if None in launch.window else Kind("window", launch.area // nq)


def _length(rows: Any) -> int:
    return len(range(rows.start, rows.stop, rows.step or 1)) if isinstance(rows, slice) else len(rows)


def _point(entry: tuple[str, Any]) -> tuple[int, float, float]:
    """A size and a pair of rates, of the file's."""
    size, pair = entry
    fine = size.isascii() and size.isdigit() and 0 < len(size) <= DIGITS and int(size) > 0
    if not fine or type(pair) is not list or len(pair) != 2 or not all(type(x) in (int, float) for x in pair):
        raise ValueError(f"{entry!r:.80}: must be a size in tokens and a pair of rates, forward and backward")
    if not all(0 < x <= FASTEST for x in pair):
        raise ValueError(f"{entry!r:.80}: rates must be above 0 and at most {FASTEST:g} TFLOP/s")
    forward, backward = pair
    return int(size), TERA * forward, TERA * backward


Points = tuple[tuple[int, float, float], ...]  # size, and FLOP/s forward and backward


@dataclass(frozen=True)
class KernelRates:
    """FLOP/s by kernel and shape, at some sizes. ``source``: where the figures are from."""

    table: Mapping[str, Mapping[str, Points]]
    source: str

    def rate(self, kernel: str, kind: Kind, backward: bool) -> float:
        """FLOP/s of a kernel on tiles of a kind, between the sizes that are known in proportion to their logarithm;
        beyond them that of the nearest."""
        shapes = self.table.get(kernel, {})
        points = shapes.get(kind.shape) or shapes.get(LIKE[kind.shape], shapes.get("full"))
        if not points:
            return UNKNOWN
        at = bisect.bisect([size for size, _, _ in points], kind.size)
        low, high = points[max(at - 1, 0)], points[min(at, len(points) - 1)]
        column = 2 if backward else 1
        if low[0] == high[0]:
            return low[column]
        part = math.log(kind.size / low[0]) / math.log(high[0] / low[0])
        return low[column] + part * (high[column] - low[column])

    @staticmethod
    def read(path: Path) -> KernelRates:
        """Raises ``ValueError`` for a file that is none of `ringattn calibrate`."""
        try:
            content = json.loads(path.read_text())
            table = {
                kernel: {shape: tuple(sorted(map(_point, sizes.items()))) for shape, sizes in shapes.items()}
                for kernel, shapes in content["rates"].items()
            }
            return KernelRates(table, str(content["source"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} is no table of kernel rates ({text:.300}); `ringattn calibrate` writes one, and "
                "Options.kernel_rates names it"
            ) from None


def slug(device: str) -> str:
    """A device's name as that of a file."""
    return device.lower().replace("nvidia ", "").replace(" ", "-").replace("/", "-")


def own_table(device: str) -> Path:
    """Where `ringattn calibrate` writes the rates of a device, and contexts look for them."""
    return Path.home() / ".cache" / "ringattn" / f"{slug(device)}.json"


@cache
def rates_of(device: str, given: str | None = None) -> KernelRates | None:
    """The rates of a device by its name: those of the file ``given``, of this machine's own, or those that come
    with the library; None where none do. Read once.

    Raises ``ValueError`` for a file that is no table.
    """
    if given is not None:
        return KernelRates.read(Path(given))
    own = own_table(device)
    if own.is_file():
        return KernelRates.read(own)
    known = known_gpu(device)
    table = None if known is None else TABLES.get(known.name)
    return None if table is None else KernelRates.read(SHIPPED / f"{table}.json")
