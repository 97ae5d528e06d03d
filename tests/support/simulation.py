"""Programs run in time: what their turns take on nodes whose links have a rate, turn by turn and not by sums."""

from collections import defaultdict

import numpy as np


def simulated(programs, topology, sizes, pair):
    """Seconds of a forward and a backward pass of the slowest rank. ``sizes``: bytes of a row of each kind, of all
    heads; ``pair``: seconds of a pair forward, two and a half times as many backward."""
    return sum(
        _walked([getattr(program, way) for program in programs], topology, sizes, seconds)
        for way, seconds in (("forward", pair), ("backward", 2.5 * pair))
    )


def _walked(ranks, topology, sizes, pair):
    """A rank begins a turn when all of the one before is there and computed. Its cards, one for each level and
    direction, begin with a turn's messages when these are posted at both ends, and share their rate among them."""
    begin, free = [0.0] * len(ranks), defaultdict(float)
    for t in range(max(map(len, ranks))):
        end, messages, loads, posted = list(begin), [], defaultdict(float), defaultdict(float)
        for src, turn in ((rank, turns[t]) for rank, turns in enumerate(ranks) if t < len(turns)):
            end[src] += sum(launch.area for launch in turn.launches) * pair
            for parcel in turn.sends:
                level = int(topology.level(np.array([src]), np.array([parcel.peer]))[0])
                seconds = float(parcel.tokens) * sizes[parcel.buffer.row] / topology.links[level].bytes_per_second
                ends = (src, level, "out"), (parcel.peer, level, "in")
                messages.append((src, parcel.peer, level, ends))
                for card in ends:
                    loads[card] += seconds
                    posted[card] = max(posted[card], begin[src], begin[parcel.peer])
        for card, seconds in loads.items():
            free[card] = max(free[card], posted[card]) + seconds
        for src, dst, level, ends in messages:
            arrived = max(free[card] for card in ends) + topology.links[level].latency
            end[src], end[dst] = max(end[src], arrived), max(end[dst], arrived)
        begin = end
    return max(begin)
