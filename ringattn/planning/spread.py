"""What a document costs when so many ranks share it, in closed form: no plan is made.

A document is cut over all ranks of its group. They share its pairs evenly, and each receives the keys of the others,
or, of a mask that sees less of a document than that, twice as many keys as a query sees on average. What travels hides
behind the group's compute as in a ring, and each hop is a kernel call, a step and a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry import rules
from ringattn.geometry.bands import Q0
from ringattn.geometry.masks import Expression
from ringattn.geometry.regular import areas, regular
from ringattn.geometry.spans import Ints
from ringattn.planning.cost import Terms, unhidden

# Masks that are the same wherever a document lies in a pack.
ANYWHERE = (rules.full, rules.causal, rules.sliding_window, rules.strided, rules.dilated)
PACKED = 1 << 31  # tokens whose pairs are counted in one pack


def pairs(mask: Expression, lengths: Ints) -> Ints:
    """The exact number of attending pairs of each document, the mask's positions counted from its own start."""
    bounds = np.append(0, lengths.cumsum())
    if not _anywhere(mask) or bounds[-1] > PACKED:
        each, place = np.unique(lengths, return_inverse=True)
        return np.array([mask.area(n, n) for n in each.tolist()])[place]
    pack = mask & Expression(rules.documents, (tuple(bounds.tolist()),))
    bands = regular(pack.bind(int(bounds[-1]), int(bounds[-1])).whole)
    counted = np.zeros(len(lengths), np.int64)
    np.add.at(counted, np.searchsorted(bounds, bands.data[:, Q0], "right") - 1, areas(bands))
    return counted


def _anywhere(mask: Expression) -> bool:
    inner = [arg for arg in mask.args if isinstance(arg, Expression)]
    return all(map(_anywhere, inner)) if inner else mask.rule in ANYWHERE


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents to be spread over a world, and what that costs.

    lengths, areas: tokens and attending pairs of each document.
    memory: tokens that a rank holds at most in a micro-batch.
    token_seconds: what a token takes beyond attention, forward and backward.
    """

    lengths: Ints
    areas: Ints
    world: int
    memory: int
    terms: Terms
    token_seconds: float = 0.0

    @property
    def node(self) -> int:
        return min(self.terms.topology.ranks_per_node or self.world, self.world)

    @cached_property
    def sizes(self) -> Ints:
        """Group sizes in question, rising: all up to 8, then four to a doubling; beyond a node, nodes; all ranks."""
        nodes = [self.node * number for number in _graded(self.world // self.node)]
        return np.array(sorted({*_graded(self.node), *nodes, self.world}))

    @cached_property
    def doublings(self) -> NDArray[np.bool_]:
        """Which sizes are a power of two, of ranks or of nodes, or all ranks."""
        units = np.where(self.sizes > self.node, self.sizes // self.node, self.sizes)
        return np.asarray((units & (units - 1) == 0) | (self.sizes == self.world))

    @cached_property
    def least(self) -> Ints:
        """The ranks that each document needs to be held."""
        return -(-self.lengths // self.memory)

    @cached_property
    def device(self) -> NDArray[Any]:
        """Seconds of each document on groups of each size, ``[documents, sizes]``; those of a part add up."""
        shape, rates, ranks = self.terms.shape, self.terms.rates, self.sizes
        compute = np.multiply.outer(self.areas, rates.pair_seconds(shape).sum() / (rates.diagonal * ranks))
        foreign = np.multiply.outer(self.lengths, 1 - 1 / ranks)
        foreign = np.minimum(foreign, (2 * self.areas / self.lengths)[:, None])
        token = (shape.forward.token + shape.backward.token) / self._links("bytes_per_second")
        rest = np.multiply.outer(self.lengths, self.token_seconds / ranks)
        return np.asarray(compute + unhidden(token * foreign, compute, rates) + rest)

    @cached_property
    def host(self) -> NDArray[Any]:
        """Seconds of a part's calls, steps and messages, whatever it computes, on groups of each size."""
        rates, hops = self.terms.rates, self.sizes - 1
        passes = self.terms.shape.passes
        return np.asarray(passes * (rates.call * self.sizes + (rates.step + self._links("latency")) * hops))

    @cached_property
    def alone(self) -> NDArray[Any]:
        """Seconds of each document as a part of its own, ``[documents, sizes]``; infinite where it does not fit."""
        seconds = np.maximum(self.device, self.host) if self.terms.rates.queued else self.device + self.host
        return np.where(self.sizes >= self.least[:, None], seconds, np.inf)

    def _links(self, name: str) -> NDArray[Any]:
        """A figure of the link that groups of each size use."""
        inside, between = (getattr(link, name) for link in self.terms.topology.links)
        return np.where(self.sizes > self.node, between, inside)


def _graded(most: int) -> set[int]:
    """1 to 8, then four numbers to a doubling, up to the most."""
    return {n for power in range(most.bit_length()) for n in (k << power for k in range(1, 8)) if n <= most}
