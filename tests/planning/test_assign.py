"""Documents given to groups of ranks: every one once, within memory, balanced, sooner than groups of one size, alike on
all ranks, in milliseconds."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.planning.assign import best, bound
from ringattn.planning.cost import Terms
from ringattn.planning.filling import fill
from ringattn.planning.hardware import HOPPER
from ringattn.planning.spread import Batch, pairs
from tests.support.clock import patience

NODES = ra.Topology(ra.Link(4e11, 3e-5), ra.Link(5e10, 4e-5), 4)
GPU = Terms(HOPPER.topology, HOPPER.rates)


def lengths_of(kind: str, count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return {
        "long tail": np.where(
            rng.random(count) < 0.1,
            np.clip(rng.lognormal(9.7, 0.6, count), 8192, 65536),
            np.clip(rng.lognormal(6.9, 1.0, count), 64, 8192),
        ).astype(int),
        "two kinds": np.where(
            rng.random(count) < 0.9, rng.integers(200, 2000, count), rng.integers(30000, 65536, count)
        ),
        "even": rng.integers(1024, 65536, count),
        "alike": np.full(count, 4096),
    }[kind].tolist()


KINDS = ("long tail", "two kinds", "even", "alike")


def batch_of(lengths, world, memory=None, terms=GPU, mask=None):
    found = np.array(lengths)
    return Batch(found, pairs(mask or ra.causal(), found), world, memory or int(found.sum()), terms)


def check_partition(plan, lengths, world, memory=None):
    for parts in plan.micro_batches:
        assert [rank for part in parts for rank in part.ranks] == list(range(world))
        assert any(part.documents for part in parts), "no micro-batch is idle altogether"
    assert sorted(document for part in plan.parts for document in part.documents) == list(range(len(lengths)))
    for part in plan.parts:
        assert part.lengths == tuple(lengths[document] for document in part.documents)
        assert part.cu_seqlens == (0, *np.cumsum(part.lengths)) and part.cu_seqlens[-1] == part.seqlen
        assert list(part.documents) == sorted(part.documents)
        if memory is not None:
            assert -(-part.seqlen // len(part.ranks)) <= memory
    for rank in range(world):
        mine = plan.of(rank)
        assert len(mine) == len(plan.micro_batches) and all(rank in part.ranks for part in mine)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    st.integers(1, 13),
    st.integers(1, 6000),
    st.sampled_from([None, 1, 3, 4]),
    st.booleans(),
)
def test_every_document_is_computed_once_within_memory(lengths, world, memory, ranks_per_node, queued):
    memory = max(memory, -(-max(lengths) // world))
    rates = replace(HOPPER.rates, queued=queued)
    topology = ra.Topology(ra.Link(4e11, 3e-5), ra.Link(5e10, 4e-5) if ranks_per_node else None, ranks_per_node)
    plan = ra.assign(lengths, world, memory=memory, rates=rates, topology=topology)
    check_partition(plan, lengths, world, memory)
    node = ranks_per_node or world
    for part in plan.parts:
        first, last = part.ranks[0] // node, part.ranks[-1] // node
        whole = part.ranks[0] % node == 0 and (len(part.ranks) % node == 0 or len(part.ranks) == world)
        assert first == last or whole, "groups lie within a node, or are whole nodes"


def members_wait(plan) -> float:
    """Each rank walks its own parts and waits for the members of each, written rank by rank."""
    free = [0.0] * plan.world
    for parts in plan.micro_batches:
        for part in parts:
            if part.documents:
                end = max(free[rank] for rank in part.ranks) + part.seconds
                for rank in part.ranks:
                    free[rank] = end
    return max(free)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "count"), [(1, 9), (8, 64), (12, 64), (32, 256), (128, 256)])
@pytest.mark.parametrize("terms", [Terms(), GPU], ids=["cpu", "gpu"])
def test_no_groups_of_one_size_are_done_sooner(kind, world, count, terms):
    for memory in (None, 65536 // min(world, 8)):
        batch = batch_of(lengths_of(kind, count), world, memory, terms)
        plan = best(batch)
        check_partition(plan, batch.lengths.tolist(), world, memory)
        assert plan.seconds == pytest.approx(members_wait(plan), rel=1e-12)
        for size in np.flatnonzero(batch.doublings & (batch.sizes >= batch.least.max())):
            fixed = fill(batch, np.full(count, size))
            assert plan.seconds <= fixed.seconds * (1 + 1e-12)
            assert fixed.seconds == pytest.approx(fixed.assignment(batch).seconds, rel=1e-12)
            assert fixed.seconds >= bound(batch, np.full(count, size)) * (1 - 1e-12)
            assert {len(part.ranks) for part in fixed.assignment(batch).parts} == {int(batch.sizes[size])}


def test_a_long_tail_gains_from_groups_of_many_sizes():
    """One in ten of 8k to 64k, beside groups that hold 64k."""
    batch = batch_of(lengths_of("long tail", 256), 32, 8192)
    plan = best(batch)
    fixed = min(
        fill(batch, np.full(256, size)).seconds for size in np.flatnonzero(batch.doublings & (batch.sizes >= 8))
    )
    assert fixed > 1.4 * plan.seconds
    assert plan.idle < 0.1
    sizes = {len(part.ranks) for part in plan.parts}
    assert 1 in sizes and max(sizes) >= 4


def test_one_giant_gets_what_it_needs_and_short_ones_one_rank_each():
    lengths = [65536, *[512] * 300]
    plan = ra.assign(lengths, 8, memory=16384, device="h100")
    check_partition(plan, lengths, 8, 16384)
    (giant,) = [part for part in plan.parts if 0 in part.documents]
    assert len(giant.ranks) >= 4
    assert {len(part.ranks) for part in plan.parts if part is not giant} == {1}
    alone = ra.assign([65536], 8, device="h100")
    assert [part.ranks for part in alone.parts] == [range(8)], "all ranks, since nothing else is to be done"


def test_sizes_are_no_powers_of_two_where_memory_asks_for_others():
    plan = ra.assign([3000] * 20 + [5000] * 6, 8, memory=1000, device="h100")
    assert {3, 5} <= {len(part.ranks) for part in plan.parts}


def test_links_between_nodes_keep_groups_small():
    slow = ra.Topology(ra.Link(4e11, 3e-5), ra.Link(1e8, 4e-5), 4)
    lengths = [8192] * 4
    assert max(len(part.ranks) for part in ra.assign(lengths, 8, device="h100", topology=slow).parts) <= 4
    assert max(len(part.ranks) for part in ra.assign([65536], 8, rates=ra.Rates(6e10, 6e10)).parts) == 8


def test_balance_is_by_area_by_the_mask_and_by_tokens():
    """One long document and sixteen of an eighth of its length, over links too slow to share any."""
    lengths, slow = [8192, *[1024] * 16], ra.Topology(ra.Link(1e3))

    def beside_the_long_one(**changes):
        plan = ra.assign(lengths, 2, rates=ra.Rates(1e12, 1e12), topology=slow, **changes)
        (long,) = [part for part in plan.parts if 0 in part.documents]
        return len(long.documents) - 1

    assert beside_the_long_one() == 0, "four fifths of the pairs are its own"
    assert beside_the_long_one(mask=ra.sliding_window(63)) == 4, "a third of the tokens, and four of sixteen to half"
    assert beside_the_long_one(token_seconds=1e-2) == 4


@pytest.mark.parametrize(
    "mask",
    [
        ra.causal(), ra.full(), ra.sliding_window(9, 3), ra.dilated(3, 2), ra.strided(4) & ra.causal(),
        ra.full() - ra.causal(), ra.prefix_lm(7), ra.longformer(3, 2), ra.chunked(16),
    ],
    ids=repr,
)  # fmt: skip
def test_pairs_are_exact(mask):
    lengths = [1, 300, 7, 1, 40, 300, 2]
    assert pairs(mask, np.array(lengths)).tolist() == [int(mask.dense(n, n).sum()) for n in lengths]


def test_pairs_beyond_one_pack_are_exact():
    lengths = [1 << 31, 5, 1 << 30]
    assert pairs(ra.causal(), np.array(lengths)).tolist() == [n * (n + 1) // 2 for n in lengths]


def test_all_ranks_get_the_same():
    lengths = lengths_of("long tail", 200)
    plans = [ra.assign(given, 16, memory=8192) for given in (lengths, np.array(lengths), torch.tensor(lengths))]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0] != ra.assign(lengths[::-1], 16, memory=8192)


def test_a_plan_in_words():
    plan = ra.assign([4000, 10, 10], 3, memory=2000, device="h100")
    assert str(plan) == plan.describe()
    first, *rest = str(plan).splitlines()
    assert first.startswith("3 documents of 4,020 tokens over 3 ranks in ") and len(rest) == len(plan.micro_batches)
    assert "1 x 2 ranks (1 document, at most 2,000 tokens a rank)" in str(plan)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lengths": []}, "lengths is empty.*skip this batch"),
        ({"lengths": [3, 0]}, r"lengths\[1\]=0: a document has at least one token; leave empty ones out"),
        ({"lengths": [3, -1]}, r"lengths\[1\]=-1: must be at least 0"),
        ({"lengths": 7}, "lengths=7: must be a sequence of integers"),
        ({"lengths": [2.5]}, r"lengths\[0\]=2.5"),
        ({"lengths": [1 << 40, 1]}, "tokens in all: must be at most"),
        ({"world": 0}, "world=0: must be at least 1"),
        ({"world": True}, "world=True: must be an integer"),
        ({"memory": 0}, "memory=0: must be at least 1.*None is no limit"),
        ({"lengths": [3, 9], "memory": 2}, r"lengths\[1\]=9: 4 ranks of 2 tokens each \(memory\) hold 8.*give more"),
        ({"mask": "causal"}, "mask='causal': must be a mask"),
        ({"device": 3}, "device=3: must be"),
        ({"shape": 3}, "shape=3: must be a ringattn.Shape"),
        ({"rates": 3}, "rates=3: must be a ringattn.Rates"),
        ({"topology": 3}, "topology=3: must be a ringattn.Topology"),
        ({"token_seconds": -1.0}, "token_seconds=-1.0: must be a number"),
    ],
)
def test_bad_input_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        ra.assign(**{"lengths": [4, 4], "world": 4, **given})
    with pytest.raises(ValueError, match="rank=4: must be at most 3"):
        ra.assign([4, 4], 4).of(4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_milliseconds(kind):
    """256 documents on 64 ranks; three times the 10 ms that it may take, since others use the machine."""
    lengths, seconds = lengths_of(kind, 256), []
    for _ in range(5):
        start = time.perf_counter()
        ra.assign(lengths, 64, memory=8192, device="h100")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < patience(0.03)
