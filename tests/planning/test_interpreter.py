"""A program is the whole truth: its turns, executed by a few lines of NumPy that know no mask, layout or schedule, give
dense attention, forward and backward."""

import numpy as np
import pytest

from ringattn.geometry.frames import Frame
from ringattn.geometry.layouts import LAYOUTS, contiguous, zigzag
from ringattn.planning.launches import Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.program import Row
from ringattn.planning.schedules import SCHEDULES
from ringattn.planning.turns import compile_program
from tests.support import cases
from tests.support.grids import mostly_slow

HEADS, DIM = 3, 2


def allowed(tile):
    (nq, nk), (left, right) = (np.arange(10**3)[r].shape[0] for r in (tile.q, tile.k)), tile.window
    gap = np.arange(nk)[None] - np.arange(nq)[:, None] - (nk - nq)
    return ((left is None) | (gap >= -(left or 0))) & ((right is None) | (gap <= (right or 0)))


def merged(one, other):
    lse = np.logaddexp(one[1], other[1])
    shares = [np.where(x[1] == -np.inf, 0.0, np.exp(x[1] - np.where(lse == -np.inf, 0.0, lse))) for x in (one, other)]
    return sum(w[..., None] * x[0] for w, x in zip(shares, (one, other), strict=True)), lse


def attended(q, k, v, allowed):
    logits = np.where(allowed[..., None], np.einsum("qhd,khd->qkh", q, k), -np.inf)
    lse = np.logaddexp.reduce(logits, 1) if logits.shape[1] else np.full(q.shape[:2], -np.inf)
    return np.einsum("qkh,khd->qhd", np.exp(logits - np.where(lse == -np.inf, 0.0, lse)[:, None]), v), lse


def differentiated(q, k, v, dout, lse, delta, allowed):
    logits = np.where(allowed[..., None], np.einsum("qhd,khd->qkh", q, k), -np.inf)
    p = np.exp(logits - np.where(lse == -np.inf, 0.0, lse)[:, None])
    ds = p * (np.einsum("qhd,khd->qkh", dout, v) - delta[:, None])
    grads = np.einsum("qkh,khd->qhd", ds, k), np.einsum("qkh,qhd->khd", ds, q), np.einsum("qkh,qhd->khd", p, dout)
    return grads


class Rank:
    """One rank's memory: what is its own, and the slots of the program's buffers."""

    def __init__(self, program, **own):
        self.program, self.own, self.slots = program, own, {}

    def rows(self, buffer, row):
        """The columns of a place, arrays ``[rows, heads, *]``."""
        if buffer is None:
            return [self.own[name] for name in OWN[row]]
        widths = [x.shape[2:] for x in (self.own[name] for name in OWN[row])]
        heads = len(range(HEADS)[buffer.heads.of(HEADS)])
        if (buffer.slot, "view") not in self.slots or self.slots[buffer.slot, "view"] != buffer:
            self.slots[buffer.slot, "view"] = buffer
            self.slots[buffer.slot] = [np.full((buffer.rows, heads, *w), np.nan) for w in widths]
        return self.slots[buffer.slot]

    def copy(self, copy, how):
        sources, targets = (self.rows(end, copy.row) for end in (copy.source, copy.target))
        of = [slice(None) if end is not None else copy.heads.of(HEADS) for end in (copy.source, copy.target)]
        for there, here in copy.pairs:
            now = [
                [x[rows, heads] for x in side]
                for side, rows, heads in zip((targets, sources), (here, there), of[::-1], strict=True)
            ]
            for target, value in zip(targets, how(*now), strict=True):
                target[here, of[1]] = value

    def forward(self, work):
        q, (k, v) = self.rows(work.queries, Row.Q)[0], self.rows(work.keys, Row.KV)
        heads = work.heads.of(HEADS)
        k, v = (x if work.keys is not None else x[:, heads] for x in (k, v))
        out, lse = self.rows(work.result, Row.PARTIAL)
        if work.result is not None:
            out[:], lse[:] = 0.0, -np.inf
        for launch in work.launches:
            for tile in launch.tiles:
                got = attended(q[tile.q][:, heads], k[tile.k], v[tile.k], allowed(tile))
                if not launch.fresh:
                    got = merged((out[tile.q][:, heads], lse[tile.q][:, heads]), got)
                rows = np.arange(len(out))[tile.q]
                out[np.ix_(rows, range(HEADS)[heads])], lse[np.ix_(rows, range(HEADS)[heads])] = got

    def backward(self, work):
        (k, v), heads = self.rows(work.keys, Row.KV), work.heads.of(HEADS)
        k, v = (x if work.keys is not None else x[:, heads] for x in (k, v))
        q, dout, lse, delta = self.rows(work.queries, Row.QUERY)
        (dq,) = self.rows(work.result, Row.DQ)
        if work.result is not None:
            dq[:] = 0.0
        dk, dv = (x if work.grads is not None else x[:, heads] for x in self.rows(work.grads, Row.GRAD))
        for tile, of in ((tile, launch) for launch in work.launches for tile in launch.tiles):
            rows, cols = np.arange(len(q))[tile.q], np.arange(len(k))[tile.k]
            own = [x[rows][:, heads] for x in (q, dout, lse, delta)]
            found = differentiated(own[0], k[cols], v[cols], *own[1:], allowed(tile))
            if of.fresh:  # what was there, NaN for instance, is no matter
                dq[rows] = 0.0
            if of.fresh_keys:
                dk[cols] = dv[cols] = 0.0
            dq[np.ix_(rows, range(HEADS)[heads])] += found[0]
            np.add.at(dk, cols, found[1])
            np.add.at(dv, cols, found[2])


OWN = {
    Row.KV: ("k", "v"), Row.GRAD: ("dk", "dv"), Row.Q: ("q",), Row.PARTIAL: ("out", "lse"),
    Row.QUERY: ("q", "dout", "lse", "delta"), Row.DQ: ("dq",),
}  # fmt: skip


def walk(ranks, direction):
    """All ranks in step: as the loops do, but for the messages, which are handed over."""
    programs = [getattr(rank.program, direction) for rank in ranks]
    for t in range(max(map(len, programs))):
        now = [(rank, turns[t]) for rank, turns in zip(ranks, programs, strict=True) if t < len(turns)]
        posted = {}
        for rank, turn in now:
            send(rank, turn, posted)
        for rank, turn in now:
            for x in (x for buffer in turn.zeros for x in rank.rows(buffer, buffer.row)):
                x[:] = 0.0
            for work in turn.work:
                getattr(rank, direction)(work)
        for rank, turn in now:
            receive(rank, turn, posted)
        assert not any(posted.values()), "every message has a receiver"


def send(rank, turn, posted):
    for copy in turn.copies:
        rank.copy(copy, lambda target, source: source)
    for parcel in turn.sends:
        content = [x[parcel.rows].copy() for x in rank.rows(parcel.buffer, parcel.buffer.row)]
        posted.setdefault((rank.program.rank, parcel.peer), []).append(content)


def receive(rank, turn, posted):
    for parcel in turn.recvs:
        content = posted[parcel.peer, rank.program.rank].pop(0)
        for x, value in zip(rank.rows(parcel.buffer, parcel.buffer.row), content, strict=True):
            assert x[parcel.rows].shape == value.shape
            x[parcel.rows] = value
    for copy in turn.adds:
        rank.copy(copy, merged if copy.row is Row.PARTIAL else added)


def added(target, source):
    return [x + y for x, y in zip(target, source, strict=True)]


def check(plan, schedule, cut, stacking, dense, hides=True):
    q, k, v, dout = (np.random.randn(n, HEADS, DIM) for n in (len(dense), dense.shape[1], dense.shape[1], len(dense)))
    out, lse = attended(q, k, v, dense)
    delta = (dout * out).sum(-1)
    grads = differentiated(q, k, v, dout, lse, delta, dense)
    ranks = []
    for number in range(plan.world_size):
        program = compile_program(plan, schedule, cut, number, stacking, hides)
        mine, keys = program.q_frame.positions() - plan.mask.q_offset, program.k_frame.positions()
        own = {"q": q[mine], "dout": dout[mine], "k": k[keys], "v": v[keys]}
        blank = 0.0 if program.blank else np.nan
        own |= {
            "out": np.full_like(own["q"], blank),
            "lse": np.full(own["q"].shape[:2], -np.inf if program.blank else np.nan),
        }
        zeros = dict(zip("qkv", (program.zeros[0], program.zeros[1], program.zeros[1]), strict=True))
        own |= {f"d{name}": np.full_like(own[name], 0.0 if zeros[name] else np.nan) for name in "qkv"}
        ranks.append(Rank(program, **own))
    walk(ranks, "forward")
    for rank in ranks:
        mine = rank.program.q_frame.positions() - plan.mask.q_offset
        np.testing.assert_allclose(rank.own["out"], out[mine], atol=1e-12)
        np.testing.assert_allclose(rank.own["lse"], lse[mine], atol=1e-12)
        rank.own["delta"] = (rank.own["dout"] * rank.own["out"]).sum(-1)
        rank.slots.clear()
    walk(ranks, "backward")
    for rank in ranks:
        mine, keys = rank.program.q_frame.positions() - plan.mask.q_offset, rank.program.k_frame.positions()
        for name, want, rows in zip("qkv", grads, (mine, keys, keys), strict=True):
            np.testing.assert_allclose(rank.own[f"d{name}"], want[rows], atol=1e-12)


@pytest.mark.parametrize("worlds", [(1, 2, 3), pytest.param((5,), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if not s.by_nodes], ids=lambda s: s.name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.ALL)
def test_turns_give_dense_attention(name, layout, schedule, worlds):
    mask, predicate = cases.ALL[name]
    for world in worlds:
        made = layout(cases.SEQLEN, world)
        plan = Plan(mask.bind(cases.SEQLEN, cases.SEQLEN), made, made)
        for cut in {min(schedule.cuts(plan, HEADS)), max(schedule.cuts(plan, HEADS))}:
            stacking = Stacking.ALL if world % 2 else Stacking.VIEWS
            check(plan, schedule, cut, stacking, cases.dense(predicate), hides=world != 3)


NODES = ((4, 2), (6, 2), (6, 3), (8, 2), (8, 4))  # ranks, and ranks of a node
OVER_NODES = [(layout, nodes) for layout in LAYOUTS for nodes in NODES]


@pytest.mark.parametrize("case", mostly_slow(OVER_NODES, [(zigzag, (4, 2))]))
@pytest.mark.parametrize("name", cases.ALL)
def test_turns_of_nodes_give_dense_attention(name, case):
    (mask, predicate), (layout, (world, size)) = cases.ALL[name], case
    for schedule in (s for s in SCHEDULES if s.by_nodes):
        plan = plan_of_nodes(mask, layout, world, size)
        for cut in schedule.cuts(plan, HEADS):
            check(plan, schedule, cut, Stacking.VIEWS, cases.dense(predicate), hides=size != 3)


def plan_of_nodes(mask, layout, world, size, **how):
    made = layout(cases.SEQLEN, world)
    return Plan(mask.bind(cases.SEQLEN, cases.SEQLEN), made, made, ranks_per_node=size, **how)


@pytest.mark.parametrize("name", ["full", "dilated"])
def test_turns_of_blocks_that_cross_in_parts(name):
    """Three nodes, so that gradients come home in parts too."""
    mask, predicate = cases.ALL[name]
    plan = plan_of_nodes(mask, contiguous, 9, 3)
    for schedule in (s for s in SCHEDULES if s.by_nodes):
        check(plan, schedule, 2, Stacking.NONE, cases.dense(predicate))
        slots = {b.slot for rank in range(9) for b in compile_program(plan, schedule, 2, rank).buffers}
        assert {"kv ahead", "grads behind"} <= slots


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["global_count", "global_scattered", "documents_window_globals", "longformer_both"])
def test_turns_of_travelling_queries(name, schedule):
    mask, predicate = cases.ALL[name]
    for world, size in ((4, 2),) if schedule.by_nodes else ((2, None), (3, None), (5, None)):
        plan = plan_of_nodes(mask, contiguous, world, size, travel=2)
        assert len(plan.visits)
        check(plan, schedule, max(schedule.cuts(plan, HEADS)), Stacking.NONE, cases.dense(predicate))


def test_an_offset_and_keys_of_another_length():
    for schedule in SCHEDULES:
        mask, predicate = cases.ALL["longformer"]
        nodes = 2 if schedule.by_nodes else None
        plan = Plan(mask.bind(9, 31, 22), contiguous(9, 4), contiguous(31, 4), ranks_per_node=nodes)
        check(plan, schedule, max(schedule.cuts(plan, HEADS)), Stacking.ALL, cases.dense(predicate, 9, 31, 22))


def test_slots_are_all_that_a_program_holds():
    made = contiguous(64, 4)
    plan = Plan(cases.ALL["causal"][0].bind(64, 64), made, made)
    program = compile_program(plan, SCHEDULES[0], 1, 2)
    assert {buffer.slot for buffer in program.buffers} <= {
        "kv 0",
        "kv 1",
        "kv out 0",
        "grads 0",
        "grads 1",
        "grad in 0",
        "grad in 1",
    }
    assert isinstance(program.q_frame, Frame) and all(buffer.rows <= 16 for buffer in program.buffers)
