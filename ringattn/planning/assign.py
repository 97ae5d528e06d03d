"""Assigning documents to groups of ranks: long ones to many, short ones to few.

The moldable tasks of scheduling (Turek, Wolf and Yu, SPAA 1992): for a time in which the batch should be done, each
document gets the fewest ranks that compute it within that time and can hold it, since fewer ranks send less. Then
groups are filled from the largest size to the smallest, the longest document first, each to the group that is free
first. Of several times, and of groups all of one size, what is done first is taken; a bound tells which need not be
tried. Orders are fixed and no sum depends on how a processor adds up, so all ranks get the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ringattn.arguments.values import LARGEST, MANY, integer, integers, number, shown
from ringattn.geometry import rules
from ringattn.geometry.masks import Expression
from ringattn.geometry.spans import Ints
from ringattn.planning.assignment import Assignment
from ringattn.planning.cost import Terms
from ringattn.planning.filling import fill
from ringattn.planning.hardware import hardware
from ringattn.planning.rates import Rates
from ringattn.planning.shape import TYPICAL, Shape
from ringattn.planning.spread import Batch, pairs
from ringattn.planning.topology import Topology

# Times in question, beside the least that is possible: above it, groups are small and the last ones end unevenly;
# below it, groups are larger than they need be and even.
TIMES = (2.0, 1.4, 1.2, 1.0, 0.8, 0.5, 0.35, 0.25, 0.12, 0.06)
ENOUGH = 1.02  # what could gain less than this is not tried
LONGEST = 1.0  # seconds a token


def assign(
    lengths: Iterable[int],
    world: int,
    *,
    mask: Expression = Expression(rules.causal),  # noqa: B008 - a mask is immutable
    memory: int | None = None,
    shape: Shape | None = None,
    device: str = "cpu",
    rates: Rates | None = None,
    topology: Topology | None = None,
    token_seconds: float = 0.0,
) -> Assignment:
    """Give each document of a batch to a group of ranks, of any size, so that the batch is done soon.

        plan = ringattn.assign(lengths, cp.world_size, memory=8192)
        for part in plan.of(cp.rank):  # part.ranks compute part.documents, packed, part.cu_seqlens their bounds

    Balanced by exact areas and by what groups cost: seconds of pairs, K/V and messages, from the rates and links that
    every ``auto`` counts with. Groups wait for their own members only; gradients are summed once, at the end of the
    batch. Pure arithmetic, a few milliseconds: call it with equal arguments on all ranks, or in a data loader.

    Args:
        lengths: tokens of each document, at least 1 each.
        world: the number of ranks.
        mask: of a document alone, positions counted from its start. Masks of full, causal, sliding_window, strided and
            dilated are counted all at once, others length by length (a millisecond each).
        memory: tokens that a rank may hold in a micro-batch; None is no limit.
        shape: of the attention calls; None is 32 heads over 8 of 128 in bf16.
        device: whose figures stand for what `rates` or `topology` does not say: "cpu", or a GPU's name.
        rates, topology: what a device does in a second, and the links between ranks. Groups lie within nodes, or are
            whole nodes.
        token_seconds: what the rest of a layer takes for a token on one rank, forward and backward; 0 balances
            attention alone.

    Raises:
        ValueError: no documents, an empty one, one that all ranks together cannot hold, or another argument that is
            not what it must be.
    """
    known = hardware(_text("device", device))
    terms = Terms(
        _kind("topology", topology, Topology) or known.topology,
        _kind("rates", rates, Rates) or known.rates,
        _kind("shape", shape, Shape) or TYPICAL,
    )
    found, world = _lengths(lengths), integer("world", world, 1, MANY, ", a number of ranks")
    hint = ", a number of tokens; None is no limit"
    room = int(found.sum()) if memory is None else integer("memory", memory, 1, hint=hint)
    seconds = number("token_seconds", token_seconds, 0.0, LONGEST, " seconds")
    longest = int(found.argmax())
    if found[longest] > world * room:
        raise ValueError(
            f"lengths[{longest}]={found[longest]}: {world} ranks of {room} tokens each (memory) hold {world * room} "
            "together; give more ranks or memory, or cut the document"
        )
    if not isinstance(mask, Expression):
        raise ValueError(f"mask={shown(mask)}: must be a mask, e.g. ringattn.causal()")
    return best(Batch(found, pairs(mask, found), world, room, terms, seconds))


def best(batch: Batch) -> Assignment:
    """The assignment that is done first."""
    taken, least = None, np.inf
    for reach, sizes in sorted(_choices(batch), key=lambda choice: choice[0]):
        if reach >= least:
            break
        filled = fill(batch, sizes, least)
        if filled and filled.seconds < least:
            taken, least = filled, filled.seconds
    assert taken is not None, "a group of all ranks holds every document"
    return taken.assignment(batch)


def _choices(batch: Batch) -> Iterator[tuple[float, Ints]]:
    """Bounds of what can be reached, and the size of each document's group, as an index into `Batch.sizes`."""
    fitting = np.where(np.isfinite(batch.alone), batch.device * batch.sizes, np.inf)
    least = max(math.fsum(fitting.min(1)) / batch.world, float(batch.alone.min(1).max()))
    seen = set()
    for allowed in (np.ones_like(batch.doublings), batch.doublings):
        alone = np.where(allowed, batch.alone, np.inf)
        for time in TIMES:
            soon = alone <= time * least
            sizes = np.where(soon.any(1), soon.argmax(1), alone.argmin(1))
            if sizes.tobytes() not in seen:
                seen.add(sizes.tobytes())
                yield ENOUGH * bound(batch, sizes), sizes
    for size in np.flatnonzero(batch.doublings & (batch.sizes >= batch.least.max())):
        sizes = np.full(len(batch.lengths), size)
        yield bound(batch, sizes), sizes


def bound(batch: Batch, sizes: Ints) -> float:
    """Seconds that groups of these sizes take at least: all that is computed, evenly; the longest document; and, of
    documents that want `k` times all ranks together and then some, `k + 1` on one rank."""
    documents, ranks = np.arange(len(sizes)), batch.sizes[sizes]
    seconds = batch.device[documents, sizes]
    falling = np.argsort(-seconds, kind="stable")
    stacked = -(-ranks[falling].cumsum() // batch.world) * seconds[falling]
    even, longest = math.fsum(seconds * ranks) / batch.world, batch.alone[documents, sizes].max()
    return float(max(even, longest, stacked.max()))


def _lengths(lengths: Iterable[int]) -> Ints:
    found = integers("lengths", lengths)
    if not found:
        raise ValueError("lengths is empty: there is nothing to assign; skip this batch")
    if 0 in found:
        raise ValueError(f"lengths[{found.index(0)}]=0: a document has at least one token; leave empty ones out")
    if sum(found) > LARGEST:
        raise ValueError(
            f"{sum(found)} tokens in all: must be at most {LARGEST} (2**40); assign fewer documents at once"
        )
    return np.array(found)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{name}={shown(value)}: must be "cpu" or the name of a GPU')
    return value


def _kind(name: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={shown(value)}: must be a ringattn.{kind.__name__}; None is what is known")
    return value
