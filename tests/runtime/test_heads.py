"""The head split: whatever is split over rings and teams, every rank finds what one process finds."""

import itertools

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import PlanningRank, Transport
from ringattn.geometry.layouts import contiguous
from ringattn.planning.heads import head_shares
from ringattn.testing import dense_attention, dense_results, results, run_processes
from tests.support import cases
from tests.support.grids import mostly_slow
from tests.support.ring import S, check, on_ranks, single_process, tensors

GRID = ("full", "causal", "two_sided", "global_scattered", "documents_window_globals", "full_minus_strided")
SPLITS = [(2, 2), (3, 3), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2), (8, 4)]
HEADS = [(4, 2), (4, 4), (4, 1), (5, 1), (6, 3), (7, 7), (6, 2)]
FEW = [((2, 2), (4, 2)), ((4, 2), (6, 3)), ((6, 3), (5, 1)), ((3, 3), (4, 4)), ((8, 4), (6, 2))]


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("name", GRID)
def test_every_mask_and_schedule(name, schedule, poison):
    mask = cases.ALL[name][0]
    for world, ulysses, layout in ((2, 2, "zigzag"), (4, 2, "striped"), (6, 3, "auto")):
        found = on_ranks(world, mask, layout=layout, schedule=schedule, ulysses=ulysses)
        check(found, single_process(mask), 1e-10)


@pytest.mark.parametrize("case", mostly_slow([*itertools.product(SPLITS, HEADS)], FEW), ids=str)
def test_other_worlds_and_heads(case, poison):
    (world, ulysses), (heads, kv_heads) = case
    if heads < ulysses:
        pytest.skip("refused")
    mask, sizes = cases.ALL["documents_window_globals"][0], {"heads": heads, "kv_heads": kv_heads, "v_dim": 5}
    for schedule in ("ring", "gather"):
        found = on_ranks(world, mask, sizes=sizes, ulysses=ulysses, schedule=schedule)
        check(found, single_process(mask, **sizes), 1e-10)


def test_keys_of_another_length_and_layout(poison):
    """Queries and keys are cut apart; some ranks hold none."""
    q, k, v, dout, dlse = tensors(q_len=3, kv_len=50)
    mask = ra.causal()

    def one_rank(transport):
        cp = ra.ContextParallel(transport, 3, mask=mask, kv_seqlen=50, q_offset=47, kv_layout="cyclic", ulysses=2)
        assert cp.local_seqlen in (0, 1) and cp.kv_position_ids.numel() == cp.local_kv_seqlen
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        local = [cp.shard(inputs[0]), cp.shard_kv(inputs[1]), cp.shard_kv(inputs[2])]
        out, lse = ra.attention(*local, cp=cp, return_lse=True)
        return results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)

    check(ra.Loopback(4).run(one_rank), dense_results(q, k, v, mask.dense(3, 50, 47), dout, dlse), 1e-10)


def test_a_given_layout_is_that_of_the_ring():
    own = ra.Layout.from_spans([[(10, S - 10)], [(0, 10)]])
    check(on_ranks(4, ra.causal(), layout=own, ulysses=2), single_process(ra.causal()), 1e-10)
    with pytest.raises(ValueError, match="over a ring of 2 ranks \\(4 with ulysses=2\\)"):
        ra.ContextParallel(PlanningRank(0, 4), S, layout=contiguous(S, 3), ulysses=2)


def test_a_layout_may_say_what_all_ranks_hold():
    """So a context goes on with the layout of another."""
    own = ra.Layout.from_spans([[(20, S - 20)], [(10, 10)], [(0, 4)], [(4, 6)]])
    check(on_ranks(4, ra.causal(), layout=own, ulysses=2), single_process(ra.causal()), 1e-10)
    for layout in ("striped", "zigzag", "balanced", "cyclic", own):
        cp = ra.ContextParallel(PlanningRank(1, 4), S, layout=layout, ulysses=2)
        again = cp.replace(layout=cp.q_layout, mask=ra.full())
        assert (again.position_ids == cp.position_ids).all()
        for rank in range(2):
            rings = (made.plan.q_layout.frame(rank).positions() for made in (again, cp))
            assert (next(rings) == next(rings)).all(), "and the ring computes what it computed"


def test_a_cache_that_grows_is_appended_to():
    """Key by key, in a window, and no key ever moves."""
    q, k, v, _, _ = tensors(q_len=140, kv_len=140, dtype=torch.float64)
    mask = ra.sliding_window(20)
    expected = single_process(mask, q_len=140, kv_len=140).out

    def one_rank(transport):
        made = {"mask": mask, "layout": "contiguous", "kv_layout": "cyclic", "ulysses": 2}
        cp = ra.ContextParallel(transport, 1, kv_seqlen=101, q_offset=100, **made)
        held = cp.kv_position_ids[:0]
        for n in range(101, 140):
            cp = cp.replace(kv_seqlen=n, q_offset=n - 1)
            assert (cp.kv_position_ids[: len(held)] == held).all()
            held = cp.kv_position_ids
            out = ra.attention(cp.shard(q[:, n - 1 : n]), k[:, held], v[:, held], cp=cp)
            torch.testing.assert_close(cp.unshard(out), expected[:, n - 1 : n])

    ra.Loopback(4).run(one_rank)


@pytest.mark.parametrize("what", ["lse", "bias"])
def test_a_gradient_that_only_some_ranks_have(what):
    q, k, v, dout, _ = tensors()

    def one_rank(transport):
        cp, first = ra.ContextParallel(transport, S, ulysses=2), transport.rank == 0
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        if what == "lse":
            out, lse = ra.attention(*local, cp=cp, return_lse=True)
            ((out * cp.shard(dout)).sum() + (lse.sum() if first else 0.0)).backward()
            return [cp.unshard(t.grad) for t in local]
        bias = torch.zeros(1, 1, cp.local_seqlen, S, dtype=q.dtype).requires_grad_(first)
        with pytest.raises(ValueError, match="gradient of the bias"):
            ra.attention(*local, cp=cp, bias=bias)

    found = ra.Loopback(4).run(one_rank)
    if what == "lse":
        mine = ra.ContextParallel(PlanningRank(0, 4), S, ulysses=2).position_ids
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = dense_attention(*inputs, ra.causal().dense(S, S))
        ((out * dout).sum() + lse[:, :, mine].sum()).backward()
        for grads in found:
            for a, b in zip(grads, inputs, strict=True):
                torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize(("heads", "kv_heads", "ulysses"), [(4, 2, 2), (6, 2, 3), (3, 3, 2), (6, 3, 2)])
def test_bytes_are_those_of_the_formula(heads, kv_heads, ulysses):
    """Every member receives each head that it computes of each token once, and its own rows of the others' results."""
    batch, dim, v_dim, size = 2, 8, 5, 4
    q, k, v, dout, _ = tensors(heads=heads, kv_heads=kv_heads, v_dim=v_dim, dtype=torch.float32)
    shares = head_shares(heads, kv_heads, ulysses)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, schedule="exchange", ulysses=ulysses)
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        before = dict(cp.traffic()["received"])
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        received = cp.traffic()["received"]
        own, others = shares[transport.rank], [s for s in shares if s is not shares[transport.rank]]
        tokens, foreign = cp.local_seqlen, S - cp.local_seqlen
        (h, hk), rest = _counts(own), [sum(x) for x in zip(*map(_counts, others), strict=True)]
        gathered = foreign * (h * dim + hk * (dim + v_dim))
        forward = gathered + tokens * rest[0] * (v_dim + 1)
        backward = gathered + foreign * h * (2 * v_dim + 1) + tokens * (rest[0] * dim + rest[1] * (dim + v_dim))
        assert received["forward heads"] == forward * batch * size and "forward kv" not in before
        assert received["backward heads"] == backward * batch * size

    ra.Loopback(ulysses).run(one_rank)


def _counts(share):
    return share.queries.stop - share.queries.start, share.keys.stop - share.keys.start


def test_gradients_of_kv_heads_that_are_shared_are_summed_before_they_are_rounded():
    """In bf16: rounded once, they are those of a call in which nothing is split."""
    q, k, v, dout, _ = (t.to(torch.bfloat16) for t in tensors(heads=8, kv_heads=1))

    def one_rank(transport, ulysses):
        cp = ra.ContextParallel(transport, S, ulysses=ulysses)
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        return [cp.unshard(t.grad).float() for t in local]

    whole, split = ra.Loopback(1).run(lambda t: one_rank(t, 1))[0], ra.Loopback(4).run(lambda t: one_rank(t, 4))[0]
    for a, b in zip(whole, split, strict=True):
        off = (a - b).abs() / a.abs().clamp_min(1e-2)
        assert (off > 0).float().mean() < 0.05 and off.max() < 2**-6, "fp32 sums of another order, rounded once"


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("world", "ulysses"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_chunks_of_heads(world, ulysses, chunks, poison):
    """Also those that share KV heads; with a bias for all heads, whose gradient is a sum over the chunks."""
    mask, options = cases.ALL["documents_window_globals"][0], ra.Options(head_chunks=chunks)
    for heads, kv_heads in ((12, 4), (12, 1), (13, 13), (15, 5)):
        sizes = {"heads": heads, "kv_heads": kv_heads, "v_dim": 5}
        for schedule in ("ring", "gather"):
            found = on_ranks(world, mask, sizes=sizes, ulysses=ulysses, schedule=schedule, options=options)
            check(found, single_process(mask, **sizes), 1e-10)


def test_chunks_use_the_memory_of_one():
    """What a call needs beyond its inputs and results, by the workspace."""
    q, k, v, dout, _ = tensors(heads=8, kv_heads=8, dim=64, v_dim=64)

    def one_rank(transport, chunks):
        cp = ra.ContextParallel(transport, S, ulysses=2, options=ra.Options(head_chunks=chunks))
        ra.attention(*(cp.shard(t).requires_grad_() for t in (q, k, v)), cp=cp).backward(cp.shard(dout))
        return sum(buffer.nbytes for buffer in cp.link.workspace.buffers())

    whole, parts = (ra.Loopback(2).run(lambda t, n=n: one_rank(t, n))[0] for n in (1, 4))
    assert parts * 4 == pytest.approx(whole, rel=0.05)


def test_a_context_may_change_its_split():
    def one_rank(transport):
        first = ra.ContextParallel(transport, S)
        for ulysses in (4, 1, 2, 4):
            cp = first.replace(ulysses=ulysses)
            assert cp.ulysses == ulysses and cp.plan.world_size == 4 // ulysses
            q, k, v, dout, dlse = tensors()
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, return_lse=True)
            check([results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)], single_process(ra.causal()))

    ra.Loopback(4).run(one_rank)


def in_processes(rank, world, make):
    """Attention on a 2-D mesh and as an operator that a compiler sees."""
    group = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("ring", "ulysses")) if make else None
    cp = ra.ContextParallel(group or dist.group.WORLD, S, ulysses=1 if make else 2)
    assert cp.ulysses == 2 and cp.rank == rank and "2 ranks compute the heads of one shard: rings of 2" in cp.describe()
    q, k, v, dout, dlse = tensors()
    found = []
    for fn in (ra.attention, torch.compile(ra.attention, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = fn(*map(cp.shard, inputs), cp=cp, return_lse=True)
        found.append(results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs))
    return found


@pytest.mark.parametrize("mesh", mostly_slow([True, False], [True]))
def test_processes_meshes_and_compilers(mesh):
    ranks = run_processes(in_processes, 4, mesh)
    for one in zip(*ranks, strict=True):
        check(one, single_process(ra.causal()), 1e-10)


def a_mesh_without_its_names(rank, world):
    for names, words in (((("data", "cp")), "must have the dims"), (("ulysses", "ring"), "in this order")):
        mesh = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=names)
        with pytest.raises(ValueError, match=words):
            ra.ContextParallel(mesh, S)
    mesh = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ValueError, match="ulysses=2, but the mesh's dim 'ulysses' has 4 ranks"):
        ra.ContextParallel(mesh, S, ulysses=2)


def test_a_mesh_without_its_names_is_refused():
    run_processes(a_mesh_without_its_names, 4)


def a_rank_that_asks_otherwise(rank, world):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ValueError, match="ulysses=3, but the mesh"):
        ra.ContextParallel(mesh, S, ulysses=3 if rank == 1 else 1, options=ra.Options(timeout=20))
    turned = dist.DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ValueError, match="must be neighbours"):
        ra.ContextParallel(turned, S)


def test_what_one_rank_asks_of_a_mesh_all_hear():
    run_processes(a_rank_that_asks_otherwise, 4)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="ulysses=3 does not divide the 4 ranks of the group: must be one of 1, 2, 4"):
        ra.ContextParallel(PlanningRank(0, 4), S, ulysses=3)
    with pytest.raises(ValueError, match="ulysses=0"):
        ra.ContextParallel(PlanningRank(0, 4), S, ulysses=0)
    with pytest.raises(ValueError, match="ulysses=4 over the 2 heads of shape"):
        ra.ContextParallel(PlanningRank(0, 4), S, ulysses=4, shape=ra.Shape(2, 2, 8))

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, ulysses=4)
        local = [cp.shard(t) for t in tensors(heads=3, kv_heads=3)[:3]]
        with pytest.raises(ValueError, match="3 heads over ulysses=4"):
            ra.attention(*local, cp=cp)
        cp = cp.replace(ulysses=2, options=ra.Options(head_chunks=2))
        with pytest.raises(ValueError, match="head_chunks=2, but a rank computes 1 of the 3 heads"):
            ra.attention(*local, cp=cp)

    ra.Loopback(4).run(one_rank)


def test_auto_weighs_the_split():
    """Many heads over fast links are split; few that share one KV head over slow links are not."""
    fast, slow = (ra.Topology(ra.Link(bandwidth, 1e-5)) for bandwidth in (1e12, 1e7))
    rates = ra.Rates(1e14, 1e14, call=1e-6, step=2e-3, merge=1e-12, exposed=1.0)

    def made(shape, topology, **more):
        options = ra.Options(topology=topology, rates=rates)
        return ra.ContextParallel(PlanningRank(0, 8), 65536, ulysses="auto", shape=shape, options=options, **more)

    many, few = ra.Shape(64, 64, 64), ra.Shape(6, 1, 64)
    split, whole = made(many, fast), made(few, slow)
    assert split.ulysses == 8 and whole.ulysses == 1
    assert made(few, fast).ulysses in (1, 2, 4), "8 ranks would compute no head"
    text = split.describe()
    assert "ulysses 8: 1.00 x the time" in text and ": taken" in text and "ulysses 2: " in text
    assert made(many, fast, layout=contiguous(65536, 4)).ulysses == 2, "a layout that is given says how long a ring is"
    with pytest.raises(ValueError, match="a ring of 8 or 4 or 2 or 1 ranks"):
        made(many, fast, layout=contiguous(65536, 3))
    with pytest.raises(ValueError, match="tell them with shape="):
        ra.ContextParallel(PlanningRank(0, 8), 64, ulysses="auto")
    with pytest.raises(ValueError, match="or 'auto'"):
        ra.ContextParallel(PlanningRank(0, 8), 64, ulysses="all")


def test_what_auto_takes_is_right():
    sizes, shape = {"heads": 4, "kv_heads": 4}, ra.Shape(4, 4, 8, dtype="float64")
    options = ra.Options(topology=ra.Topology(ra.Link(1e12)), rates=ra.Rates(1e14, 1e14, step=1e-2, exposed=1.0))
    found = on_ranks(4, ra.causal(), sizes=sizes, ulysses="auto", shape=shape, options=options)
    check(found, single_process(ra.causal(), **sizes))


def test_ranks_that_split_otherwise_are_told():
    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, layout="contiguous", ulysses=1 if transport.rank else 2)
        with pytest.raises(ValueError, match="ulysses: 2 on rank 0; 1 on rank 1"):
            ra.attention(*(cp.shard(t) for t in tensors()[:3]), cp=cp)

    ra.Loopback(2).run(one_rank)


@pytest.mark.parametrize(("world", "heads", "kv_heads"), [(2, 4, 2), (4, 4, 2), (4, 6, 3)])
def test_describe_says_what_the_all_to_alls_move(world: int, heads: int, kv_heads: int) -> None:
    shape = ra.Shape(heads, kv_heads, 8, dtype="float32")

    def one_rank(transport: Transport) -> tuple[int, str]:
        cp = ra.ContextParallel(transport, 16 * world, ulysses=world, shape=shape)
        q, k, v = (torch.randn(1, 16, n, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads))
        ra.attention(q, k, v, cp=cp).sum().backward()
        received = cp.traffic()["received"]
        return received["forward heads"] + received["backward heads"], cp.describe()

    found = ra.Loopback(world, timeout=20).run(one_rank)
    assert f"{found[0][0]:,} bytes received by the rank with most heads" in found[0][1]
    assert ("1 query head a rank" in found[0][1]) == (heads == world)
