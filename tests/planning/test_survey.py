"""Tables of a world: what is read of the plan is what the programs do, and bytes are those that calls move."""

import itertools

import numpy as np
import pytest
import torch

import ringattn
from ringattn.comm import PlanningRank
from ringattn.planning.schedules import by_name
from ringattn.planning.survey import meetings, passes
from ringattn.planning.turns import compile_program
from ringattn.show import _loops
from tests.support.cases import ALL, SEQLEN
from tests.support.grids import mostly_slow

MASKS = ("causal", "global_scattered", "strided", "documents_window_globals", "longformer_both")


CASES = itertools.product(["ring", "exchange", "gather"], ["zigzag", "striped", "balanced"], [1, 3, 4])
FAST = {("ring", "zigzag", 4), ("exchange", "balanced", 3), ("gather", "striped", 3)}


@pytest.mark.parametrize("case", mostly_slow(CASES, FAST), ids=str)
def test_meetings_are_what_programs_compute(case: tuple[str, str, int]) -> None:
    schedule, layout, world = case
    for name in MASKS:
        mask = ALL[name][0]
        cp = ringattn.ContextParallel(
            PlanningRank(0, world), SEQLEN, mask=mask, layout=layout, schedule=schedule
        )  # fmt: skip
        first, plan, terms = cp.program(mask), cp.plan, cp.binding.settings.terms
        found = meetings(plan, first.schedule, first.cut)
        assert (found.pairs.sum(1) + found.hosted == plan.work).all()
        dense = mask.dense(SEQLEN, SEQLEN).numpy()
        if not plan.travel:
            for rank in range(world):
                for owner in range(world):
                    q, k = plan.q_frame(rank).positions(), plan.k_layout.frame(owner).positions()
                    assert found.pairs[rank, owner] == dense[np.ix_(q, k)].sum()
        programs = [compile_program(plan, by_name(first.schedule), first.cut, rank) for rank in range(world)]
        forward, _ = passes(programs, terms.shape)
        turns = min(forward.turns, found.by_turn.shape[1])
        assert (forward.pairs[:, :turns] == found.by_turn[:, :turns]).all()
        assert not forward.pairs[:, turns:].any() and not found.by_turn[:, turns:].any()


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("name", ["causal", "global_scattered"])
def test_bytes_are_those_that_calls_move(schedule: str, name: str) -> None:
    """Of a call of the shape planned for, forward and backward, on every rank."""
    shape = ringattn.Shape(4, 2, 8, v_head_dim=4, batch=2, dtype="float32")
    world, mask = 3, ALL[name][0]

    def one_rank(transport):  # type: ignore[no-untyped-def]
        cp = ringattn.ContextParallel(transport, SEQLEN, mask=mask, schedule=schedule, layout="zigzag", shape=shape)
        sizes = (4, 8), (2, 8), (2, 4)
        inputs = [torch.randn(2, cp.local_seqlen, *size, requires_grad=True) for size in sizes]
        ringattn.attention(*inputs, cp=cp).sum().backward()
        return cp.traffic(), _loops(cp)

    for rank, (traffic, loops) in enumerate(ringattn.Loopback(world).run(one_rank)):
        messages = np.concatenate([loop.messages for loop in loops])
        assert messages[messages[:, 1] == rank, 3].sum() == sum(traffic["sent"].values())
        assert messages[messages[:, 2] == rank, 3].sum() == sum(traffic["received"].values())
