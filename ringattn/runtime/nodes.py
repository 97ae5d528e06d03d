"""Nodes: which ranks of a group share one, as its launcher says."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ringattn.planning.topology import Topology

# Who starts ranks, and under which names it tells each how many ranks its node has, its number, and its place there.
LAUNCHERS = (
    ("torchrun", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("Open MPI", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI", "MPI_LOCALNRANKS", "PMI_RANK", "MPI_LOCALRANKID"),
    ("Slurm", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Nodes:
    """The nodes of a group: so many of its ranks each, which are neighbours, or None where they are no such nodes.
    ``why``: who says so, or what speaks against it."""

    ranks_per_node: int | None
    why: str

    def of(self, known: Topology) -> Topology:
        """Links between these ranks, as they are known of the hardware. Ranks of no regular nodes are all as far from
        each other as nodes are."""
        if self.ranks_per_node is None:
            return Topology(known.links[1])
        return replace(known, ranks_per_node=self.ranks_per_node)

    def __str__(self) -> str:
        if self.ranks_per_node is None:
            return f"all ranks equally far from each other: {self.why}"
        return f"{self.ranks_per_node} {'rank' if self.ranks_per_node == 1 else 'ranks'} a node, says {self.why}"


def told_nodes(environ: Mapping[str, str], ranks: Sequence[int], rank: int) -> Nodes | None:
    """The nodes of a group of these ranks of the job, by what its launcher has told this one; None where none has."""
    for name, *keys in LAUNCHERS:
        size, number, place = (environ.get(key, "") for key in keys)
        if size.isdecimal() and int(size) and number == str(rank) and place.isdecimal():
            nodes = [one // int(size) for one in ranks]
            return regular(name, nodes, in_order=rank % int(size) == int(place))
    return None


def regular(name: str, nodes: Sequence[Hashable], in_order: bool = True) -> Nodes:
    """The nodes of ranks of which each is on one of these, as ``name`` says."""
    runs = [(node, len(list(run))) for node, run in groupby(nodes)]
    counts = sorted({count for _, count in runs})
    if not in_order or len({node for node, _ in runs}) < len(runs):
        return Nodes(None, f"the ranks of a node are no neighbours, says {name}")
    if len(counts) > 1:
        return Nodes(None, f"nodes have {' and '.join(map(str, counts))} of them, says {name}")
    return Nodes(counts[0], name)
