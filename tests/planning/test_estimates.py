"""The estimate of kernel calls beside the programs that are compiled."""

import time

import numpy as np
import pytest

import ringattn as ra
from ringattn.geometry.layouts import LAYOUTS, chunks, contiguous, cyclic, dealt, zigzag
from ringattn.planning.cost import settled
from ringattn.planning.deals import deal_by_weight
from ringattn.planning.estimates import estimate, estimates
from ringattn.planning.launches import Stacking, launches
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import SCHEDULES, by_name
from ringattn.planning.turns import compile_program

S = 8192


def documents(seqlen, count):
    sizes = np.random.default_rng(0).lognormal(0, 1, count)
    cuts = np.unique((sizes.cumsum() / sizes.sum() * seqlen).astype(int)[:-1])
    return ra.documents([0, *cuts[cuts > 0].tolist(), seqlen])


MASKS = {
    "causal": ra.causal(),
    "full": ra.full(),
    "window": ra.sliding_window(1023),
    "longformer": ra.longformer(255, [0, 7, 3000, 8000]),
    "longformer both": ra.longformer(255, 64, causal=False),
    "bigbird": ra.bigbird(64, 3, 2, 3),
    "bigbird both": ra.bigbird(64, 3, 2, 3, causal=False),
    "chunked": ra.chunked(64),
    "strided": ra.strided(64),
    "dilated": ra.dilated(8, 64),
    "documents": documents(S, 50) & ra.causal(),
    "prefix": ra.prefix_lm(S // 4),
}


def balanced(seqlen, world):
    """Chunks dealt as they would be for work that jumps about."""
    spans = chunks(seqlen, 8 * world)
    return dealt("balanced", seqlen, world, spans, deal_by_weight(np.random.default_rng(1).integers(0, 100, len(spans)), world))  # fmt: skip # noqa: E501


def true_calls(plan, schedule, cut, stacking):
    return [compile_program(plan, schedule, cut, rank, stacking).calls for rank in range(plan.world_size)]


@pytest.mark.parametrize("layout", [*LAYOUTS, balanced])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("world", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_estimated_and_compiled_calls(world, name, layout):
    check(MASKS[name], layout, world)


@pytest.mark.parametrize("layout", [zigzag, balanced])
@pytest.mark.parametrize("name", ["causal", "longformer", "documents", "bigbird", "dilated"])
def test_estimated_and_compiled_calls_of_eight_ranks(name, layout):
    check(MASKS[name], layout, 8)


def check(mask, layout, world):
    placed = layout(S, world)
    plan = Plan(mask.bind(S, S), placed, placed, ranks_per_node=4 if world == 8 else None)
    for schedule in SCHEDULES:
        cut, _ = settled(plan, schedule, 8)
        programs = [compile_program(plan, schedule, cut, rank, Stacking.NONE) for rank in range(world)]
        for stacking in Stacking:
            calls = max(stacked_calls(program, stacking) for program in programs)
            guess = int(estimate(plan, schedule, cut, stacking).calls.max())
            assert calls / 1.5 - 4 <= guess <= 1.5 * calls + 4, (schedule.name, stacking, calls, guess)


def stacked_calls(program, stacking):
    """Of a program compiled without stacks, had it been compiled with them: the tiles of its turns are the same."""
    if stacking is program.stacking:
        return program.calls
    return sum(len(launches(work.tiles, stacking)) for turn in program.forward for work in turn.work)


@pytest.mark.parametrize("stacking", Stacking)
@pytest.mark.parametrize("name", ["causal", "bigbird", "strided"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_stacks_are_those_of_the_same_tiles(schedule, name, stacking):
    placed = zigzag(2048, 4)
    plan = Plan(MASKS[name].bind(2048, 2048), placed, placed, ranks_per_node=2)
    for rank in (0, 3):
        plain, stacked = (compile_program(plan, schedule, 1, rank, how) for how in (Stacking.NONE, stacking))
        assert stacked_calls(plain, stacking) == stacked.calls


def test_estimates_of_every_rank():
    """Not only of the largest; and the rows that they compute."""
    placed = zigzag(S, 4)
    plan = Plan(MASKS["documents"].bind(S, S), placed, placed)
    for name in ("ring", "exchange", "gather"):
        schedule = by_name(name)
        found = estimate(plan, schedule, 2, Stacking.NONE)
        programs = [compile_program(plan, schedule, 2, rank, Stacking.NONE) for rank in range(4)]
        assert found.calls.tolist() == [program.calls for program in programs]
        chunks_of_heads = 2 if name == "gather" else 1
        works = [[work for turn in program.forward for work in turn.work] for program in programs]
        rows = [sum(int(work.tiles.boxes[:, 1].sum()) for work in each) for each in works]
        assert (found.rows * chunks_of_heads).tolist() == rows


def test_other_lengths_of_keys_and_first_queries():
    for q_len, kv_len, offset, mask in ((1000, 3000, 2000, ra.causal()), (500, 4000, 0, ra.global_tokens([3, 77]))):
        plan = Plan(mask.bind(q_len, kv_len, offset), zigzag(q_len, 4), contiguous(kv_len, 4))
        for schedule in SCHEDULES:
            cut, _ = settled(plan, schedule, 8)
            assert abs(max(true_calls(plan, schedule, cut, Stacking.ALL))
                       - int(estimate(plan, schedule, cut, Stacking.ALL).calls.max())) <= 2  # fmt: skip


def test_travelling_queries_are_calls_of_their_hosts():
    placed = contiguous(S, 4)
    bound = ra.longformer(255, 8, causal=False).bind(S, S)
    stays, goes = Plan(bound, placed, placed), Plan(bound, placed, placed, travel=6)
    assert len(goes.guests)
    for plan in (stays, goes):
        found = estimate(plan, by_name("exchange"), 1, Stacking.NONE).calls
        assert abs(int(found.max()) - max(true_calls(plan, by_name("exchange"), 1, Stacking.NONE))) <= 1


@pytest.mark.parametrize("layout", [contiguous, zigzag])
def test_strides_beside_runs_cost_a_relay_its_calls(layout):
    """It carries all keys on one lattice, so that runs are cut to residues and few tiles join."""
    mask = ra.bigbird(16, 3, 2, 2, seed=6) | (ra.sliding_window(0, 309) & ra.strided(17))
    plan = Plan(mask.bind(1247, 1569, 722), layout(1247, 5), layout(1569, 5))
    for schedule in SCHEDULES:
        calls = max(true_calls(plan, schedule, 1, Stacking.VIEWS))
        assert calls / 1.5 <= int(estimate(plan, schedule, 1, Stacking.VIEWS).calls.max()) <= 1.5 * calls
    alone = [estimate(plan, schedule, 1, Stacking.VIEWS) for schedule in SCHEDULES]
    together = estimates(plan, [(schedule, 1) for schedule in SCHEDULES], Stacking.VIEWS)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.calls, b.calls, rtol=0.02)


@pytest.mark.parametrize("kv_len", [4100, 100_000])
def test_decoding_over_dealt_blocks_is_a_call_a_rank(kv_len):
    """The query travels to keys that lie in blocks of 64, which are side by side on their ranks."""
    plan = Plan(ra.causal().bind(1, kv_len, kv_len - 1), contiguous(1, 2), cyclic(kv_len, 2), travel=6)
    assert len(plan.guests)
    for schedule in SCHEDULES:
        assert max(true_calls(plan, schedule, 1, Stacking.VIEWS)) == 1
        assert int(estimate(plan, schedule, 1, Stacking.VIEWS).calls.max()) == 1


def test_some_ranks_stand_for_a_world_of_many_pieces(monkeypatch):
    placed = zigzag(1 << 16, 64)
    bound = ra.causal().bind(1 << 16, 1 << 16)
    whole = estimate(Plan(bound, placed, placed), by_name("ring"), 1, Stacking.NONE).calls
    monkeypatch.setattr("ringattn.planning.contacts.PIECES", 1000)
    plan = Plan(bound, placed, placed)
    some = estimate(plan, by_name("ring"), 1, Stacking.NONE).calls
    assert not plan.contacts.known.all() and whole.max() / 1.5 <= some.max() <= 1.5 * whole.max()


def test_a_thousand_ranks_take_milliseconds():
    """Processor time, the least of a few turns: about ten milliseconds on an idle core."""
    rng, seqlen, world = np.random.default_rng(0), 1 << 20, 1024
    cuts = np.sort(rng.choice(np.arange(1, seqlen), 4999, replace=False)).tolist()
    mask = ra.documents([0, *cuts, seqlen]) & ra.sliding_window(1023)
    plan = Plan(mask.bind(seqlen, seqlen), contiguous(seqlen, world), contiguous(seqlen, world))
    assert plan.contacts.known.all()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        assert estimate(plan, by_name("exchange"), 1, Stacking.ALL).calls.max() < 64
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
