"""A schedule: who computes which tile in which turn, and who sends what to whom in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ringattn.geometry.mask_words import words_of
from ringattn.geometry.spans import Ints
from ringattn.pictures import numbers
from ringattn.pictures.charts import matrix, summed_most
from ringattn.pictures.colours import INK, PAPER, QUIET, Colours, of_ranks, of_shares, written
from ringattn.pictures.mask import ranks_legend
from ringattn.pictures.scene import Arrow, Axis, Border, Entry, Layer, Panel, Rect, Scene
from ringattn.planning.cost import Terms
from ringattn.planning.plan import Plan
from ringattn.planning.scenes.work import NAMES
from ringattn.planning.shape import Shape
from ringattn.planning.survey import Meetings, Pass
from ringattn.planning.topology import Topology

RANKS, TURNS, ARROWS = 16, 16, 160  # of a time line; beyond, matrices alone tell
BOX = 0.64  # of a turn's width that the most work takes; messages are drawn in the rest
LOOPS = ("forward", "backward")
SWATCHES = 9  # of turns in a legend
SEVERAL, ORANGE, VIOLET = "#b8b8b8", "#d55e00", "#7a3fb0"
LINKS = (("inside of a node", "solid"), ("between nodes", "dashed"))  # how arrows are drawn, by level
SENT: dict[str, tuple[set[str], str]] = {  # arrows by what they bring
    INK: ({"kv"}, "sends K/V"),
    ORANGE: ({"grad", "dk", "dv"}, "sends gradients of K/V"),
    VIOLET: ({"q", "query", "partial", "dq"}, "sends queries, or results of them"),
}


def picture(
    plan: Plan, name: str, terms: Terms, meetings: Meetings, loops: Sequence[Pass], notes: Sequence[str]
) -> Scene:
    """``loops``: both passes of all ranks' programs; none where these are too many. Of several nodes a message takes
    the link inside of one or the one between them."""
    topology = None if terms.topology.flat(plan.world_size) else terms.topology
    rows: list[tuple[Panel, ...]] = []
    small = [loop for loop in loops if loop.turns and loop.turns <= TURNS and plan.world_size <= RANKS]
    for number, loop in enumerate(small):
        rows.append((_time_line(LOOPS[number], loop, topology, meetings if number == 0 else None),))
    said = list(notes)
    if not small:
        turns = [loop.pairs for loop in loops] or [meetings.by_turn]
        rows.append(tuple(_by_turn(name, pairs) for name, pairs in zip(LOOPS, turns, strict=False)))
    if any(len(loop.messages) > ARROWS for loop in small):
        said.append(f"time lines with more than {ARROWS} messages leave out their arrows; the matrix has all of them")
    if not loops:
        said.append(
            f"{plan.world_size:,} ranks: work and needs are the plan's, exactly; programs were not compiled, so what a "
            "relay carries for others, and each turn's messages, are not drawn"
        )
    sent = _sent(plan, terms.shape, meetings, loops)
    if topology is not None:
        said.append(_by_link(topology, sent, bool(loops)))
    title = "bytes sent, forward and backward" if loops else "bytes needed of others, both passes"
    rows.append((_tiles(meetings), _bytes(title, sent, topology)))
    return Scene(f"schedule {name} of {words_of(plan.mask.mask)}", tuple(said), tuple(rows))


def _time_line(name: str, loop: Pass, topology: Topology | None, meetings: Meetings | None) -> Panel:
    """Boxes as long as the work of a rank in a turn, arrows as wide as its messages are large, and dashed between
    nodes."""
    ranks, turns = loop.pairs.shape
    marks: list[Rect | Arrow] = list(_boxes(loop, meetings))
    if len(loop.messages) <= ARROWS:
        marks += _arrows(loop, topology)
    legend = [*_boxes_legend(marks, ranks, meetings), *_arrows_legend(loop, topology)]
    head = "pairs in boxes" + (", of a part of the heads" if meetings is not None and meetings.parts > 1 else "")
    if 0 < len(loop.messages) <= ARROWS:
        most = numbers.amount(int(loop.messages[:, 3].max()), "B")
        head += f"; the thicker an arrow the more bytes, {most} at most"
    return Panel(
        f"{name}: who computes and sends what in each turn",
        Axis("turn", 0, turns, "turn"),
        Axis("rank", 0, ranks, "rank", down=True),
        (*_borders(ranks, topology), *marks),
        int(np.clip(110 * turns, 260, 900)),
        int(np.clip(34 * ranks, 90, 420)),
        tuple(legend),
        head,
        tuple(_in_words(loop, topology)),
    )


def _boxes_legend(marks: Sequence[Rect | Arrow], ranks: int, meetings: Meetings | None) -> Iterator[Entry]:
    """Colours that boxes have."""
    fills = {mark.fill for mark in marks if isinstance(mark, Rect)}
    if meetings is not None:
        yield from (
            Entry(colour, f"keys of {rank}") for colour, rank, _ in ranks_legend(ranks, RANKS) if colour in fills
        )
    if SEVERAL in fills:
        yield Entry(SEVERAL, "keys of several ranks" if meetings is not None else "computes gradients")


def _arrows_legend(loop: Pass, topology: Topology | None) -> Iterator[Entry]:
    """Colours and strokes that arrows have."""
    if not len(loop.messages) or len(loop.messages) > ARROWS:
        return
    yield from (Entry(colour, name, "solid") for colour, (kinds, name) in SENT.items() if kinds & set(loop.kinds))
    if topology is not None:
        levels = set(topology.level(loop.messages[:, 1], loop.messages[:, 2]).tolist())
        yield from (Entry(QUIET, name, kind) for level, (name, kind) in enumerate(LINKS) if level in levels)


def _borders(ranks: int, topology: Topology | None) -> list[Border]:
    """Lines between nodes, unless these are many."""
    size = ranks if topology is None else topology.ranks_per_node or ranks
    return [Border(rank) for rank in range(size, ranks, size)] if ranks // size <= RANKS else []


def _boxes(loop: Pass, meetings: Meetings | None) -> Iterator[Rect]:
    """One for each rank and turn with work, of the colour of the keys' owner, where it is one."""
    ranks, turns = loop.pairs.shape
    colours, most = of_ranks(ranks), int(loop.pairs.max(initial=1)) or 1
    for rank in range(ranks):
        for turn in range(turns):
            pairs = int(loop.pairs[rank, turn])
            if not pairs:
                continue
            owners = _owners(meetings, rank, turn)
            whose = f", with keys of {_listed(owners)}" if owners else ""
            fill = written(colours[owners[0]]) if len(owners) == 1 else SEVERAL
            calls = int(loop.calls[rank, turn])
            many = f"{calls:,} kernel call{'' if calls == 1 else 's'}"
            note = f"turn {turn}, rank {rank}{whose}\n{pairs:,} pairs in {many}"
            right = turn + 0.03 + BOX * pairs / most
            yield Rect(turn + 0.03, rank + 0.12, right, rank + 0.88, fill, note, numbers.amount(pairs))


def _owners(meetings: Meetings | None, rank: int, turn: int) -> list[int]:
    """Whose keys a rank computes with in a turn of the forward loop."""
    if meetings is None:
        return []
    first = meetings.turn[rank]
    here = (first <= turn) & (turn < first + meetings.parts) & (meetings.pairs[rank] > 0)
    return [int(owner) for owner in np.flatnonzero(here)]


def _listed(ranks: Sequence[int]) -> str:
    return (
        f"rank {ranks[0]}"
        if len(ranks) == 1
        else f"ranks {', '.join(map(str, ranks[:6]))}{' ...' if len(ranks) > 6 else ''}"
    )


def _arrows(loop: Pass, topology: Topology | None) -> Iterator[Arrow]:
    most, levels = int(loop.messages[:, 3].max(initial=1)) or 1, _levels(loop, topology)
    for (turn, src, dst, size), kind, level in zip(loop.messages.tolist(), loop.kinds, levels, strict=True):
        link = "" if topology is None else f", {LINKS[level][0]}"
        note = f"turn {turn}, rank {src} to rank {dst}{link}\n{size:,} bytes of {NAMES[kind]}"
        colour = next(colour for colour, (kinds, _) in SENT.items() if kind in kinds)
        width = 0.8 + 2.2 * size / most
        yield Arrow(turn + BOX + 0.06, src + 0.5, turn + 0.98, dst + 0.5, colour, width, note, dashed=bool(level))


def _levels(loop: Pass, topology: Topology | None) -> list[int]:
    """Of each message, the link that it takes: 0 inside of a node, 1 between nodes."""
    if topology is None:
        return [0] * len(loop.messages)
    return [int(level) for level in topology.level(loop.messages[:, 1], loop.messages[:, 2])]


def _in_words(loop: Pass, topology: Topology | None) -> Iterator[str]:
    """Turn by turn and rank by rank, for a terminal."""
    levels = _levels(loop, topology)
    if any(levels):
        yield "*: between nodes"
    for turn in range(loop.turns):
        rows = np.flatnonzero(loop.messages[:, 0] == turn)
        yield f"turn {turn}"
        for rank in range(len(loop.pairs)):
            pairs, sent = int(loop.pairs[rank, turn]), dict[tuple[str, int, int], int]()
            for n in rows[loop.messages[rows, 1] == rank].tolist():  # one of several spans may be several messages
                to = loop.kinds[n], int(loop.messages[n, 2]), levels[n]
                sent[to] = sent.get(to, 0) + int(loop.messages[n, 3])
            work = f"{numbers.amount(pairs):>8} pairs" if pairs else f"{'-':>8}      "
            told = [
                f"{numbers.amount(size, 'B')} {kind} to {dst}{'*' * level}" for (kind, dst, level), size in sent.items()
            ]
            more = f" and {len(told) - 4} more" if len(told) > 4 else ""
            yield f"  rank {rank:<3} {work}  {'sends ' if told else ''}{', '.join(told[:4])}{more}".rstrip()


def _by_turn(name: str, pairs: np.ndarray) -> Panel:
    lines = (
        f"turn {turn}: {numbers.amount(int(column.sum()))} pairs, the most {numbers.amount(int(column.max()))} on rank "
        f"{int(np.argmax(column)):,}"
        for turn, column in enumerate(pairs.T[:SWATCHES])
    )
    rest = (f"and {pairs.shape[1] - SWATCHES:,} more turns",) if pairs.shape[1] > SWATCHES else ()
    return matrix(
        f"{name}: pairs that each rank computes in each turn", "rank", "turn", [Layer("pairs", pairs)],
        units=("rank", "turn"), size=(int(np.clip(60 * pairs.shape[1], 160, 460)), 300), legend=_amounts(pairs, ""),
        legend_title="pairs in a cell", lines=(*lines, *rest),
    )  # fmt: skip


def _tiles(meetings: Meetings) -> Panel:
    """Pairs by the rank that computes and the rank whose keys they are, coloured by turn."""
    here = meetings.pairs > 0
    turn = np.where(here, meetings.turn, -1)
    last = max(int(turn.max(initial=0)), 1)
    seen = np.unique(turn[here])
    chosen = seen[np.unique(np.linspace(0, max(len(seen) - 1, 0), SWATCHES).astype(int))].tolist() if len(seen) else []
    first = f" (first of {meetings.parts}, for a part of the heads each)" if meetings.parts > 1 else ""
    return matrix(
        "tiles: whose keys, in which turn",
        "rank",
        "owner of the keys",
        [Layer("pairs", meetings.pairs), Layer(f"turn{first}", turn, "turn")],
        tint=_of_turns(np.maximum(turn, 0) / last),
        legend=[
            Entry(PAPER, "no pairs"),
            *(Entry(written(_of_turns(np.array(at / last))), f"turn {at:,}") for at in chosen),
        ],
        legend_title="first turn, forward" if meetings.parts > 1 else "turn, forward",
        lines=_grid(meetings) if len(turn) <= RANKS else (),
    )


def _of_turns(place: np.ndarray) -> Colours:
    return of_shares(0.02 + 0.98 * place**2)  # the ink of shares is their root


def _grid(meetings: Meetings) -> list[str]:
    """Turns as numbers, by rank and owner."""
    size = len(meetings.pairs)
    lines = ["      keys of " + " ".join(f"{owner:>3}" for owner in range(size))]
    for rank in range(size):
        cells = (f"{meetings.turn[rank, o]:>3}" if meetings.pairs[rank, o] else "  ." for o in range(size))
        lines.append(f"rank {rank:<8} " + " ".join(cells))
    return lines


def _sent(plan: Plan, shape: Shape, meetings: Meetings, loops: Sequence[Pass]) -> Ints:
    """Bytes ``[src, dst]`` of both passes; where programs are not known, what is needed of each other."""
    if not loops:
        return np.asarray(meetings.needs.T * (shape.forward.token + shape.backward.token), np.int64)
    sent = np.zeros((plan.world_size, plan.world_size), np.int64)
    for loop in loops:
        np.add.at(sent, (loop.messages[:, 1], loop.messages[:, 2]), loop.messages[:, 3])
    return sent


def _by_link(topology: Topology, sent: Ints, known: bool) -> str:
    """Nodes, and how many of the bytes go where, in a sentence."""
    src, dst = np.nonzero(sent)
    inside, between = (
        numbers.amount(int(sent[src, dst][topology.level(src, dst) == level].sum()), "B") for level in range(2)
    )
    lines = ", with lines between nodes" if _borders(len(sent), topology) else ""
    how = f"{inside} go inside of nodes, {between} between nodes"
    if not known:
        how = f"{inside} are needed of ranks of the same node, {between} of other nodes"
    return f"{topology.ranks_per_node} of these ranks share a node{lines}: {how}"


def _bytes(title: str, sent: Ints, topology: Topology | None) -> Panel:
    """Bytes from rank to rank."""
    total = f"{numbers.amount(int(sent.sum()), 'B')} in all, the most from one rank to another "
    lines = [total + numbers.amount(int(sent.max(initial=0)), "B")]
    layers = [Layer("bytes", sent, "B")]
    made = matrix(
        title, "from rank", "to rank", layers, legend=_amounts(sent, "B"), legend_title="bytes in a cell", lines=lines
    )
    borders = _borders(len(sent), topology)
    return replace(made, marks=(*made.marks, *borders, *(replace(border, across=False) for border in borders)))


def _amounts(values: np.ndarray, unit: str) -> list[Entry]:
    """Colours of some amounts, as :func:`matrix` draws them."""
    most = summed_most(values)
    parts = (0.0, 0.01, 0.1, 0.5, 1.0) if most else (0.0,)
    return [Entry(written(of_shares(np.array(part))), numbers.amount(part * most, unit)) for part in parts]
