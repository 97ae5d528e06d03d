"""The head split (DeepSpeed Ulysses, arXiv 2309.14509): the ranks of a *team* hold the pieces of one shard of the ring,
and compute with all of its tokens, each for some of the heads. World = ring x ulysses, the second fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ringattn.planning.rates import Rates
from ringattn.planning.shape import BYTES, Shape
from ringattn.planning.topology import Topology
from ringattn.planning.wanted import Wanted


@dataclass(frozen=True)
class Split:
    """Where a rank stands: in a ring, whose ranks compute the same heads of different tokens, and in a team, whose
    ranks compute different heads of the same tokens. Both are listed as ranks of the group, in order."""

    world_size: int
    ulysses: int
    rank: int

    @property
    def ring(self) -> Sequence[int]:
        return range(self.member, self.world_size, self.ulysses)

    @property
    def team(self) -> Sequence[int]:
        first = self.ring_rank * self.ulysses
        return range(first, first + self.ulysses)

    @property
    def ring_size(self) -> int:
        return self.world_size // self.ulysses

    @property
    def ring_rank(self) -> int:
        """The rank's place in its ring."""
        return self.rank // self.ulysses

    @property
    def member(self) -> int:
        """The rank's place in its team."""
        return self.rank % self.ulysses


@dataclass(frozen=True)
class HeadShare:
    """The query heads that a member computes and the KV heads these need. ``of``: where its KV heads do not serve
    equally many of its query heads, the KV head within the share that each of them needs, else None."""

    queries: slice
    keys: slice
    of: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Query heads and KV heads as they are computed: where these serve unequal numbers, there is one for each."""
        queries, keys = (heads.stop - heads.start for heads in (self.queries, self.keys))
        return queries, keys if self.of is None else queries


def head_shares(num_heads: int, num_kv_heads: int, members: int) -> tuple[HeadShare, ...]:
    """The heads of every member: runs of query heads, as equal as they can be, cut between KV heads where that makes no
    share larger. ``members`` must be at most ``num_heads``."""
    cuts = _cut(num_heads, num_kv_heads, members)
    return tuple(_share(queries, num_heads // num_kv_heads) for queries in cuts)


def head_chunks(shares: Sequence[HeadShare], group: int, count: int) -> list[tuple[HeadShare, ...]]:
    """Every share cut into so many runs, again between KV heads where that makes none longer: for each chunk what the
    members compute. ``group``: query heads of a KV head. No share may have fewer query heads than ``count``."""
    return list(zip(*(_chunks(share.queries, group, count) for share in shares), strict=True))


def _chunks(queries: slice, group: int, count: int) -> list[HeadShare]:
    first, heads = queries.start, queries.stop - queries.start
    whole = not (first % group or heads % group)
    cuts = _cut(heads, heads // group if whole else 1, count)
    return [_share(slice(first + cut.start, first + cut.stop), group) for cut in cuts]


def _cut(heads: int, kv_heads: int, count: int) -> list[slice]:
    """Runs of heads as equal as they can be, between KV heads where that makes none longer."""
    even, aligned = list(_runs(heads, count, 1)), list(_runs(kv_heads, count, heads // kv_heads))
    return aligned if kv_heads >= count and aligned[0].stop == even[0].stop else even


def _runs(count: int, members: int, group: int) -> Iterator[slice]:
    """So many heads, ``group`` query heads each, in runs of which the first ones are larger by one."""
    stop = 0
    for member in range(members):
        start, stop = stop, stop + group * (count // members + (member < count % members))
        yield slice(start, stop)


def _share(queries: slice, group: int) -> HeadShare:
    keys = slice(queries.start // group, -(-queries.stop // group))
    of = [head // group - keys.start for head in range(queries.start, queries.stop)]
    each = len(of) // (keys.stop - keys.start)
    uneven = any(key != at // each for at, key in enumerate(of)) or len(of) % each
    return HeadShare(queries, keys, tuple(of) if uneven else None)


@dataclass(frozen=True)
class Swapped:
    """What the all-to-alls of a call cost a rank, forward and backward: bytes that it receives, messages, and elements
    that are copied."""

    received: int
    messages: int
    copied: int

    @staticmethod
    def of(shape: Shape, members: int, tokens: tuple[int, int]) -> Swapped:
        """For the member with most heads; ``tokens``: the queries and the keys that each member holds."""
        if members == 1:
            return Swapped(0, 0, 0)
        shares = head_shares(shape.num_heads, shape.num_kv_heads, members)
        (h, k), d, v, size = _counts(shares[0]), shape.head_dim, shape.values, BYTES[shape.dtype]
        total = sum(_counts(share)[1] for share in shares)
        (n, m), others, heads, keys = tokens, members - 1, shape.num_heads, total - k
        wide = shape.wide if total > shape.num_kv_heads else size
        inputs = n * h * d + m * k * (d + v)  # of a member
        forward = others * inputs * size + n * (heads - h) * (v * size + shape.wide)
        rows = n * h * v
        if not shape.gradients:
            return Swapped(shape.batch * forward, 5 * others, shape.batch * members * (inputs + rows))
        wanted, saved = Wanted.of(shape.gradients), n * h * (2 * v * size + shape.wide)
        columns = wanted.key_columns(d, v)
        backward = others * (inputs * size + saved)
        backward += n * (heads - h) * d * wanted.q * size + m * keys * columns * wide
        grads = n * h * d * wanted.q + m * k * columns
        copied = members * (2 * inputs + grads + 3 * rows)  # in twice, gradients out; results out, and in with dout
        return Swapped(shape.batch * (forward + backward), (11 + sum(wanted)) * others, shape.batch * copied)

    def seconds(self, topology: Topology, rates: Rates, members: int) -> float:
        """All of it, as nothing hides it. A team is within a node where nodes are whole teams."""
        apart = topology.ranks_per_node is not None and bool(topology.ranks_per_node % members)
        link = topology.links[apart]
        return self.received / link.bytes_per_second + self.messages * link.latency + rates.merge * self.copied


def _counts(share: HeadShare) -> tuple[int, int]:
    return share.queries.stop - share.queries.start, share.keys.stop - share.keys.start


def divisors(world_size: int) -> list[int]:
    """The numbers of ranks of a team that a world can be split into."""
    return [n for n in range(1, world_size + 1) if world_size % n == 0]


def shared_shape(shape: Shape, members: int) -> Shape:
    """What the member with most heads computes."""
    if members == 1:
        return shape
    shares = head_shares(shape.num_heads, shape.num_kv_heads, min(members, shape.num_heads))
    sizes = max(share.sizes for share in shares)
    return replace(shape, num_heads=sizes[0], num_kv_heads=sizes[1])


def ring_topology(topology: Topology, members: int) -> Topology:
    """The links between the ranks of one ring, of which a node has every ``members``-th."""
    if topology.ranks_per_node is None or members == 1:
        return topology
    return replace(topology, ranks_per_node=max(topology.ranks_per_node // members, 1))
