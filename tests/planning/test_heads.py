"""Shares of heads, places of ranks in rings and teams, and pieces of layouts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.layouts import NAMED
from ringattn.planning.heads import Split, head_chunks, head_shares, ring_topology, shared_shape
from ringattn.planning.shape import Shape
from ringattn.planning.topology import Link, Topology


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12))
def test_shares_are_runs_that_are_as_equal_as_they_can_be(kv_heads, group, members):
    heads = kv_heads * group
    members = min(members, heads)
    shares = head_shares(heads, kv_heads, members)
    assert [h for s in shares for h in range(s.queries.start, s.queries.stop)] == list(range(heads))
    assert max(s.queries.stop - s.queries.start for s in shares) == -(-heads // members)
    for share in shares:
        needed = [head // group for head in range(share.queries.start, share.queries.stop)]
        assert list(range(share.keys.start, share.keys.stop)) == sorted(set(needed)), "each KV head once, no other"
        queries, keys = share.sizes
        assert queries % keys == 0
        of = share.of or [at // (queries // keys) for at in range(queries)]
        assert [share.keys.start + at for at in of] == needed


def test_few_shares_need_copies_of_kv_heads():
    assert all(share.of is None for members in (1, 2, 4, 8, 16, 32) for share in head_shares(32, 8, members))
    assert [share.of for share in head_shares(6, 3, 2)] == [(0, 0, 1), (0, 1, 1)]


@pytest.mark.parametrize("ulysses", [1, 2, 3, 6])
def test_every_rank_stands_in_one_ring_and_one_team(ulysses):
    splits = [Split(6, ulysses, rank) for rank in range(6)]
    for split in splits:
        assert split.ring[split.ring_rank] == split.team[split.member] == split.rank
        assert all(splits[peer].ring == split.ring for peer in split.ring)
        assert all(splits[peer].team == split.team for peer in split.team)
        assert set(split.ring) & set(split.team) == {split.rank}
    assert [list(split.team) for split in splits[:2]] == ([[0], [1]] if ulysses == 1 else [list(range(ulysses))] * 2)


@pytest.mark.parametrize(("build", "world", "count"), [*itertools.product(NAMED, (1, 2, 3), (1, 2, 3, 4))])
def test_pieces_are_shards_cut_in_storage_order(build, world, count):
    for seqlen in (7, 64, 257):
        layout = build(seqlen, world)
        pieces = layout.pieces(count)
        pieces.check()
        for rank in range(world):
            parts = [pieces.frame(rank * count + member).positions() for member in range(count)]
            assert (np.concatenate(parts) == layout.frame(rank).positions()).all()
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_ring_is_planned_for_what_its_ranks_compute():
    assert shared_shape(Shape(32, 8, 128), 16) == Shape(2, 1, 128)
    assert shared_shape(Shape(6, 3, 128), 2) == Shape(3, 3, 128), "KV heads are copied where they serve unequal numbers"
    links = Topology(Link(1e11), Link(1e9), 8)
    assert ring_topology(links, 4).ranks_per_node == 2 and ring_topology(links, 16).ranks_per_node == 1


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 6), st.integers(1, 4))
def test_chunks_are_shares_cut_again(kv_heads, group, members, count):
    shares = head_shares(kv_heads * group, kv_heads, min(members, kv_heads * group))
    count = min(count, *(s.queries.stop - s.queries.start for s in shares))
    chunks = head_chunks(shares, group, count)
    assert len(chunks) == count
    for member, share in enumerate(shares):
        parts = [chunk[member] for chunk in chunks]
        heads = [h for part in parts for h in range(part.queries.start, part.queries.stop)]
        assert heads == list(range(share.queries.start, share.queries.stop))
        sizes = [part.queries.stop - part.queries.start for part in parts]
        assert max(sizes) - min(sizes) <= 1 or max(sizes) == -(-sum(sizes) // count)
        assert all(part.sizes[0] % part.sizes[1] == 0 for part in parts)
