"""Stacks: equal small tiles in one kernel call, in few calls, and with the same result."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels.blockwise import Blockwise
from ringattn.kernels.sdpa import Sdpa
from ringattn.planning.launches import SMALL, Stacking, launches
from ringattn.runtime.settings import Load
from tests.support.ring import check, on_ranks, single_process


def tile(q, k, window=(None, None)):
    left, right = (7 if side is None else side for side in window)
    return q, 8, 1, k, 8, 1, -left, right


def test_equal_tiles_are_stacked_where_their_queries_are_apart():
    tiles = [tile(8 * i, 8 * j) for i in range(6) for j in (0, 3, 9)]
    made = launches(Tiles(np.array(tiles)))
    assert len(made) == 3 and sum(launch.count for launch in made) == len(tiles)
    for launch in made:
        rows = np.concatenate([np.arange(48)[t.q] for t in launch.tiles])
        assert len(np.unique(rows)) == len(rows)
        assert (np.arange(48)[launch.q] == rows).all()
    assert made[0].q == slice(0, 48, 1), "rows that lie side by side are a view"
    for few in ([tile(0, 0), tile(8, 0, (None, 0))], [tile(0, 0), tile(8, 8)]):
        assert [launch.count for launch in launches(Tiles(np.array(few)))] == [1, 1]


def test_large_and_scattered_tiles_stay_alone():
    large = np.array([(i, SMALL + 1, 1, 0, 4, 1, -SMALL, 3) for i in (0, 1000, 2000, 3000)])
    scattered = (Tile(np.array([1, 5, 6]), slice(0, 4, 1), (None, None), 12),) * 4
    assert [launch.count for launch in launches(Tiles(large, scattered))] == [1] * 8


@pytest.mark.parametrize("schedule", ["ring", "exchange"])
@pytest.mark.parametrize(("name", "mask"), [("bigbird", ra.bigbird(64, 3, 2, 3)), ("chunks", ra.chunked(64))])
def test_calls_of_a_step_are_bounded_by_its_shapes(name, mask, schedule):
    """2,048 block rows over 8 ranks: about a thousand tiles a rank."""
    cp = ra.ContextParallel(PlanningRank(3, 8), 1 << 17, mask=mask, layout="contiguous", schedule=schedule)
    program = cp.program(mask, Load(8, 0, Stacking.ALL))
    assert sum(len(work.tiles) for turn in program.forward for work in turn.work) >= (900 if name == "bigbird" else 256)
    assert max(len(turn.launches) for turn in program.forward) <= 12
    assert f"in {cp.program(mask).calls:,} kernel call" in cp.describe()
    assert ("tiles)" in cp.describe()) == (name == "chunks"), "on a CPU only rows that lie side by side are stacked"


@pytest.mark.parametrize("mask", [ra.bigbird(16, 3, 1, 2), ra.chunked(16), ra.strided(6)], ids=str)
@pytest.mark.parametrize("bias", [None, ra.alibi([0.5, 0.25])], ids=["plain", "alibi"])
def test_a_program_says_how_many_calls_run(mask, bias, monkeypatch):
    kernel, ran = (Blockwise if bias else Sdpa), []
    forward = kernel.forward_tile
    monkeypatch.setattr(kernel, "forward_tile", lambda self, *args: ran.append(1) or forward(self, *args))
    cp = ra.ContextParallel(None, 256, mask=mask)
    q, k, v = (torch.randn(1, 256, 2, 16) for _ in range(3))
    ra.attention(q, k, v, cp=cp, bias=bias)
    load = Load(2, 0, Stacking.of("cpu", alone=bias is not None))
    assert len(ran) == cp.program(mask, load).calls


MASKS = [ra.bigbird(4, 3, 1, 2), ra.chunked(4), ra.strided(6), ra.bigbird(4, 1, 1, 2, causal=False), ra.dilated(6, 2)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("batch", [1, 3])
def test_stacks_give_the_same(mask, schedule, batch, poison, monkeypatch):
    monkeypatch.setattr(Stacking, "of", lambda device, alone: Stacking.ALL)
    sizes = {"q_len": 72, "kv_len": 72, "batch": batch}
    for world in (1, 2):
        settings = {"layout": "contiguous", "schedule": schedule}
        stacks = []

        def look(transport, settings=settings, stacks=stacks):
            cp = ra.ContextParallel(transport, 72, mask=mask, **settings)
            turns = cp.program(mask, Load(8, 0, Stacking.ALL)).forward
            stacks.extend(call for turn in turns for call in turn.launches if call.count > 1)

        ra.Loopback(world).run(look)
        assert stacks
        check(on_ranks(world, mask, sizes=sizes, **settings), single_process(mask, **sizes))


def test_a_stack_in_sixteen_bits_is_as_exact_as_its_tiles():
    q, k, v = (torch.randn(2, 64, 4, 16).bfloat16() for _ in range(3))
    cp = ra.ContextParallel(None, 64, mask=ra.chunked(8))
    (stack,) = cp.program(cp.masks[0]).forward[0].launches
    assert stack.count == 8
    got = ra.attention(q, k, v, cp=cp)
    for i in range(8):
        part = slice(8 * i, 8 * i + 8)
        alone = ra.attention(q[:, part], k[:, part], v[:, part], cp=ra.ContextParallel(None, 8, mask=ra.full()))
        assert torch.equal(got[:, part], alone)
