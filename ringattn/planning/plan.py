"""Plans: from a bound mask and the layouts of queries and keys to work, needs and tiles. Integers only.

A band is cut by the spans of a rank's queries and trimmed; what remains names the rank's work and,
on its key side, the keys the rank needs. Tiles follow from the same bands, against whatever keys a
step of a schedule holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lcm

import numpy as np

from ringattn.geometry.bands import ANY, HI, K0, K_AXIS, LO, Q_AXIS, TAG, Bands, concat
from ringattn.geometry.frames import Frame
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import BoundMask
from ringattn.geometry.regular import areas, regular
from ringattn.geometry.spans import INF, Ints, columns, expand, meeting
from ringattn.geometry.tiles import Tiles, cut, localise
from ringattn.pictures.svg import svg
from ringattn.pictures.text import text
from ringattn.planning.contacts import Contacts, contacts_of
from ringattn.planning.travel import part

# Residues of needs that are looked at, to estimate what a relay computes.
RESIDUES = 1 << 17


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Who computes what and who needs which keys, for one bound mask over ``world_size`` ranks.

    The whole world's figures are computed only when asked for; :meth:`own_bands` never needs them. Queries ``travel``
    that save as many keys each, or none where it is 0 (see ``travel.py``). ``ranks_per_node``: neighbours of one node,
    where the world is several nodes of as many; None is one node.
    """

    mask: BoundMask
    q_layout: Layout
    k_layout: Layout
    travel: int = 0
    ranks_per_node: int | None = None

    def __repr__(self) -> str:
        keys = "" if self.k_layout is self.q_layout else f", keys {self.k_layout!r}"
        return f"Plan({self.mask.mask}, {self.q_layout!r}{keys})"

    def __str__(self) -> str:
        from ringattn.planning.scenes.plan import picture  # which reads plans

        return text(picture(self))

    def _repr_html_(self) -> str:
        """What a notebook shows: the mask over the layout, each rank's pairs and needs."""
        from ringattn.planning.scenes.plan import picture

        return svg(picture(self))

    @property
    def world_size(self) -> int:
        return self.q_layout.world_size

    @property
    def node_size(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.world_size

    def q_frame(self, rank: int) -> Frame:
        """The rank's queries in global positions, ``q_offset`` included."""
        spans = self.q_layout.frame(rank).spans + np.array([self.mask.q_offset, 0, 0])
        return Frame(spans)

    @cached_property
    def world(self) -> Bands:
        """The bands of all ranks' queries that are computed at home, ``TAG`` = rank."""
        return self._parted[0]

    @cached_property
    def guests(self) -> Bands:
        """The bands that travel, ``TAG`` = rank * world_size + host."""
        return self._parted[1]

    @cached_property
    def _parted(self) -> tuple[Bands, Bands]:
        bands = self._all_bands
        return part(bands, self.k_layout, self.travel) if self.travel else (bands, bands.take(slice(0)))

    @cached_property
    def _all_bands(self) -> Bands:
        table = self.q_layout.table
        spans = table[:, 1:] + np.array([self.mask.q_offset, 0, 0])
        return regular(cut(self.mask.whole, Q_AXIS, spans, table[:, 0]))

    def own_bands(self, rank: int) -> Bands:
        """The bands of a rank's own queries, from the stretches of its own spans alone: what a rank of a large world
        can know without the others. None of them travels."""
        if rank not in self._own:
            parts = []
            for span in self.q_frame(rank).spans:
                start, stop = int(span[0]), int(span[0] + (span[1] - 1) * span[2] + 1)
                parts.append(cut(self.mask.bands(start, stop), Q_AXIS, span[None], np.array([rank])))
            self._own[rank] = regular(concat(parts))
        return self._own[rank]

    @cached_property
    def _own(self) -> dict[int, Bands]:
        return {}

    @cached_property
    def work(self) -> Ints:
        """Attending pairs that each rank computes."""
        return self.work_by_kind.sum(0)

    @cached_property
    def work_by_kind(self) -> Ints:
        """Its pairs in bands without a bound, with one and with two, ``[3, world_size]``."""
        home = by_kind(self.world, self.world.data[:, TAG], self.world_size)
        return home + by_kind(self.guests, self.guests.data[:, TAG] % self.world_size, self.world_size)

    @cached_property
    def windowed(self) -> bool:
        """Whether any tile of any rank may be bounded on the left."""
        return bool((self.mask.whole.data[:, LO] > -INF).any())

    @cached_property
    def own_work(self) -> Ints:
        """The part of ``work_by_kind`` whose keys a rank holds itself."""
        table = self.k_layout.table
        bands = regular(self.meet(self.world, table)[1])
        return by_kind(bands, table[bands.data[:, TAG], 0], self.world_size)

    def meet(self, bands: Bands, rows: Ints) -> tuple[Ints, Bands]:
        """Bands of the world cut by rows (rank, start, length, step) of their ranks' keys, ``TAG`` = row, not trimmed;
        and which band each is of."""
        data, width = bands.data, 1 + self.mask.kv_len
        keys, spans = data[:, K_AXIS[:3]], rows[:, 1:].copy()
        keys[:, 0] += data[:, TAG] * width  # one lane of the axis for each rank
        spans[:, 0] += rows[:, 0] * width
        i, j, met = meeting(keys, spans)
        data = data[i]
        data[:, K_AXIS[1:3]] = met[:, 1:]
        data[:, K0] = met[:, 0] - data[:, TAG] * width
        data[:, TAG] = j
        return i, Bands(data, bands.sets)

    @cached_property
    def contacts(self) -> Contacts:
        """The keys of every rank and the pieces of its bands that meet them."""
        return contacts_of(self, self.world_needs)

    @cached_property
    def lattice_contacts(self) -> Contacts:
        """The same where needs lie on one lattice, as a relay carries them: runs beside strides are cut to residues
        (unless these are too many to be looked at)."""
        needs, world = self.world_needs, self.world_size
        step = min(lcm(*np.unique(needs[:, 4]).tolist()), INF)
        residues = np.minimum(step // needs[:, 4], needs[:, 3]).sum()
        if residues == len(needs) or residues > RESIDUES:
            return self.contacts
        merged = merge_spans(needs[:, 0] * world + needs[:, 1], needs[:, 2:], step)
        return contacts_of(self, columns(merged[:, 0] // world, merged[:, 0] % world, merged[:, 1:]))

    @cached_property
    def world_needs(self) -> Ints:
        """Rows (rank, owner, start, length, step): the foreign key spans every rank needs, each token once."""
        return self._needs(self.world)

    def needs(self, rank: int) -> Ints:
        """Rows (owner, start, length, step): the foreign key spans this rank needs."""
        return self._needs(self.own_bands(rank))[:, 1:]

    def _needs(self, bands: Bands) -> Ints:
        wanted = axis_spans(bands, K_AXIS)
        table = self.k_layout.table
        i, j, spans = meeting(wanted[:, 1:], table[:, 1:])
        rank, owner, world = wanted[i, 0], table[j, 0], self.world_size
        foreign = rank != owner
        merged = merge_spans((rank * world + owner)[foreign], spans[foreign])
        return columns(merged[:, 0] // world, merged[:, 0] % world, merged[:, 1:])

    @cached_property
    def received(self) -> Ints:
        """Tokens of foreign K/V each rank needs: the least any schedule can bring it."""
        needs = self.world_needs
        return np.bincount(needs[:, 0], needs[:, 3], self.world_size).astype(np.int64)

    @cached_property
    def visits(self) -> Ints:
        """Rows (rank, host, start, length, step): the query spans (``q_offset`` included) that travel."""
        wanted = axis_spans(self.guests, Q_AXIS)
        merged = merge_spans(wanted[:, 0], wanted[:, 1:])
        rank, host = np.divmod(merged[:, 0], self.world_size)
        return columns(rank, host, merged[:, 1:])

    @property
    def visits_made(self) -> Ints:
        """Rows (rank, host, queries): there and back again."""
        return self.visits[:, [0, 1, 3]]

    def guest_tiles(self, host: int, guests: Frame) -> Tiles:
        """The tiles of the queries that visit ``host``, against its shard."""
        bands = self.guests.take(self.guests.data[:, TAG] % self.world_size == host)
        return localise(bands, guests, self.k_layout.frame(host))

    def tiles(self, rank: int, keys: Frame) -> Tiles:
        """The rank's tiles against a frame of keys, coalesced, in order of queries then keys."""
        return localise(self.world.take(self.world.data[:, TAG] == rank), self.q_frame(rank), keys)

    def own_tiles(self, rank: int, keys: Frame) -> Tiles:
        """The same from :meth:`own_bands`."""
        return localise(self.own_bands(rank), self.q_frame(rank), keys)


def by_kind(bands: Bands, rank: Ints, count: int) -> Ints:
    """Pairs of regular bands by their number of bounds and by rank, ``[3, count]``."""
    kind = (bands.data[:, [LO, HI]] * (-1, 1) < INF).sum(1)
    return np.bincount(kind * count + rank, areas(bands), 3 * count).astype(np.int64).reshape(3, count)


def axis_spans(bands: Bands, axis: tuple[int, ...]) -> Ints:
    """Rows (tag, start, length, step) of all positions the bands hold on an axis; a tag's spans may still overlap."""
    data, (first_of, length_of, step_of, set_of) = bands.data, axis
    parts = [data[data[:, set_of] == ANY][:, [TAG, first_of, length_of, step_of]]]
    for i, members in enumerate(bands.sets, start=1):
        # Queries of one rank see nested ranges of the same scattered keys: join the ranges first.
        rows = data[data[:, set_of] == i]
        runs = _merge_runs(rows[:, TAG], rows[:, first_of], rows[:, length_of])
        tag, start, stop = runs[:, 0], runs[:, 1], runs[:, 1] + runs[:, 2]
        first = np.searchsorted(members.bounds[:, 1], start, "right")
        of, within = expand(np.maximum(np.searchsorted(members.bounds[:, 0], stop, "left") - first, 0))
        bounds = members.bounds[first[of] + within]
        low, high = np.maximum(bounds[:, 0], start[of]), np.minimum(bounds[:, 1], stop[of])
        parts.append(columns(tag[of], low, high - low, 1))
    return np.concatenate(parts)


def merge_spans(group: Ints, spans: Ints, step: int = 0) -> Ints:
    """Union of spans within each group, as rows (group, start, length, step), disjoint, sorted.

    Spans of one step come back with that step. Mixed steps are merged by residue class of their least
    common multiple (or of ``step``, if given), and those that together hold a gapless run become one span.
    """
    if not len(spans):
        return np.empty((0, 4), np.int64)
    if step <= 1 and (spans[:, 2] == 1).all():
        merged = _merge_runs(group, spans[:, 0], spans[:, 1])
        return columns(merged, 1)
    common = step or lcm(*np.unique(spans[:, 2]).tolist())
    parts = common // spans[:, 2]
    rows, residue = expand(np.minimum(parts, spans[:, 1]))
    start = spans[rows, 0] + residue * spans[rows, 2]
    length = -((residue - spans[rows, 1]) // parts[rows])
    lane = group[rows] * common + start % common
    merged = _merge_runs(lane, start // common, length)
    out = columns(merged[:, 0] // common, merged[:, 1] * common + merged[:, 0] % common, merged[:, 2])
    out = columns(out, common)
    return out if step or common == 1 else _join_residues(out)


def _merge_runs(lane: Ints, start: Ints, length: Ints) -> Ints:
    """Union of step-1 runs within each lane, as rows (lane, start, length), sorted."""
    if not len(lane):
        return np.empty((0, 3), np.int64)
    # Lanes are laid end to end on one axis, so that one sort and one running maximum serve all of them.
    end = start + length
    base = (lane - lane.min()) * (int(end.max()) + 2)
    order = np.argsort(base + start)
    lane, start, end, base = lane[order], start[order], end[order], base[order]
    reach = np.maximum.accumulate(base + end)
    new = np.concatenate(([True], (base + start)[1:] > reach[:-1]))
    first = np.flatnonzero(new)
    last = np.append(first[1:] - 1, len(lane) - 1)
    return columns(lane[first], start[first], (reach - base)[last] - start[first])


def _join_residues(spans: Ints) -> Ints:
    """Spans (group, start, length, step) of which some together hold a gapless run, replaced by that run."""
    group, start, length, step = spans.T
    runs = _merge_runs(group, start, (length - 1) * step + 1)
    width = int((start + length * step).max()) + 1
    of = np.searchsorted(runs[:, 0] * width + runs[:, 1], group * width + start, "right") - 1
    whole = np.bincount(of, length, len(runs)) == runs[:, 2]
    runs = columns(runs, 1)
    out = np.concatenate((runs[whole], spans[~whole[of]]))
    return out[np.lexsort((out[:, 1], out[:, 0]))]
