"""Gradients that nobody wants are neither found nor moved: every subset of q, k and v on every rank beside one process,
with the bytes that the program says and a closed formula gives."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.comm import CallMismatch
from ringattn.planning.program import Row
from ringattn.planning.topology import Topology
from ringattn.planning.wanted import Wanted
from ringattn.testing import run_processes
from tests.support import cases
from tests.support.grids import mostly_slow
from tests.support.ring import S, tensors
from tests.support.tape import taped

SUBSETS = ["".join(names) for n in (1, 2, 3) for names in itertools.combinations("qkv", n)]
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 8, "v_dim": 5}
NODES = ra.Options(topology=Topology(ra.Link(1e9), ra.Link(1e8), 2))
MASK = cases.ALL["documents_window_globals"][0]
KEY = 2 * 2 * 8  # bytes of a number of a key's, of all batch rows and KV heads, in fp64


def leaves(wanted, given):
    return [x.clone().requires_grad_(name in wanted) for name, x in zip("qkv", given, strict=True)]


def step(cp, wanted, dout, given, mask=None, attend=ra.attention, **extras):
    """What a call finds: the gradients of the whole q, k and v, None where there are none."""
    inputs = leaves(wanted, given)
    q, k, v = cp.shard(inputs[0]), cp.shard_kv(inputs[1]), cp.shard_kv(inputs[2])
    out, lse = attend(q, k, v, cp=cp, mask=mask, return_lse=True, **extras)
    if out.requires_grad:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        ((out * cp.shard(dout)).sum() + (finite * finite.detach().cos()).sum()).backward()
    return [x.grad for x in inputs]


@functools.cache
def alone(mask, **extras):
    """All three gradients of one process."""
    q, k, v, dout, _ = tensors(**SIZES)
    return step(ra.ContextParallel(None, S, mask=mask), "qkv", dout, (q, k, v), **extras)


def check(found, wanted, expected):
    for name, mine, truth in zip("qkv", found, expected, strict=True):
        if name not in wanted:
            assert mine is None, name
        else:
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}")


def of_program(cp, mask, sent):
    """Bytes of the messages of backward, by kind, as the programs of the calls that were made have them."""
    names = {Row.KV: "kv", Row.QUERY: "q", Row.DQ: "dq"}
    found = {}
    for call in cp.binding.known(mask):
        for turn in call.program.backward:
            for parcel in turn.sends if sent else turn.recvs:
                row = parcel.buffer.row
                numbers = row.width(8, 5) * (2 if row.keys else 4) * 2 * 8
                kind = f"backward {names.get(row, 'grad')}"
                found[kind] = found.get(kind, 0) + int(parcel.tokens * numbers)
    return found


GRID = [
    *itertools.product(SUBSETS, ("ring", "exchange", "gather"), (1, 2, 3, 4)),
    *((some, "double_ring", 4) for some in SUBSETS),
]
FAST = [
    ("q", "ring", 3), ("k", "exchange", 2), ("v", "gather", 2), ("qk", "ring", 2), ("qv", "exchange", 3),
    ("kv", "gather", 3), ("v", "double_ring", 4), ("v", "ring", 4), ("qv", "ring", 1),
]  # fmt: skip


@pytest.mark.parametrize("case", mostly_slow(GRID, FAST), ids=str)
def test_every_subset_and_schedule(case, poison):
    wanted, schedule, world = case
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport):
        options = NODES if schedule == "double_ring" else ra.Options(rates=ra.Rates(6e10, 6e10))
        shape = ra.Shape(4, 2, 8, 5, batch=2, dtype="float64", gradients=wanted)
        cp = ra.ContextParallel(
            transport, S, mask=MASK, layout="zigzag", schedule=schedule, options=options, shape=shape
        )
        found = step(cp, wanted, dout, given)
        whole = cp.replace(shape=ra.Shape(4, 2, 8, 5, batch=2, dtype="float64")).program(MASK)
        return found, cp.traffic(), cp.program(MASK), whole, *(of_program(cp, MASK, sent) for sent in (False, True))

    for found, traffic, program, whole, recvs, sends in ra.Loopback(world, timeout=20).run(one_rank):
        check(found, wanted, alone(MASK))
        width = 8 * ("k" in wanted) + 5 * ("v" in wanted)
        for way, sent, of in (("received", False, recvs), ("sent", True, sends)):
            moved = {kind: n for kind, n in traffic[way].items() if kind.startswith("backward") and n}
            assert moved == {kind: n for kind, n in of.items() if n}, "the program's"
            assert moved.get("backward grad", 0) == KEY * width * whole.tokens(Row.GRAD, sent=sent)
            assert moved.get("backward kv", 0) == KEY * 13 * whole.tokens(Row.KV, sent=sent)
        assert program.wanted == Wanted.of(wanted) and (world == 1 or bool(recvs))


def test_the_shape_counts_what_moves():
    """Costs, the text and the program of a shape say what a call of that shape moves."""
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport, wanted):
        shape = ra.Shape(4, 2, 8, 5, batch=2, dtype="float64", gradients=wanted)
        cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="contiguous", schedule="exchange", shape=shape)
        step(cp, wanted, dout, given)
        received, sent = (cp.traffic()[way] for way in ("received", "sent"))
        moved = received.get("backward kv", 0) + sent.get("backward grad", 0)
        assert moved == cp.plan.received[transport.rank] * shape.backward.token
        return cp.binding.offers[0].choice.lines[0].offers[0].moved[0], shape, cp.describe()

    for wanted in ("", "q", "v", "qkv"):
        for priced, shape, text in ra.Loopback(3).run(lambda t, w=wanted: one_rank(t, w)):
            most = S - S // 3
            assert priced == most * (shape.forward.token + shape.backward.token)
            said = "" if wanted == "qkv" else f", gradients wanted: {Wanted.of(wanted)}"
            assert f"batch 2, float64{said} on" in text
            assert (" 0 of gradients" in text) == (not set(wanted) & set("kv"))
    with pytest.raises(ValueError, match=r"Shape.gradients='kk'.*letters of 'qkv'"):
        ra.Shape(4, 2, 8, gradients="kk")


def head_bytes(n, n_, m, m_, wanted):
    """The contract's formula of what backward receives, of a team of two with two of four query heads each."""
    asked = [name in wanted for name in "qkv"]
    inputs = (n - n_) * 2 * 8 + (m - m_) * 1 * 13 + (n - n_) * 2 * (2 * 5 + 2)  # with a gradient of lse
    return 2 * 8 * (inputs + n_ * 2 * 8 * asked[0] + m_ * 1 * (8 * asked[1] + 5 * asked[2]))


SPLITS = ((2, 2, 1), (4, 2, 2), (3, 3, 1), (2, 1, 2))  # ranks, of them for heads, and chunks


@pytest.mark.parametrize(
    "case", mostly_slow([*itertools.product(SUBSETS, SPLITS)], [("q", SPLITS[0]), ("qv", SPLITS[2])]), ids=str
)
def test_head_splits_and_chunks(case, poison):
    wanted, (world, ulysses, chunks) = case
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport):
        options = ra.Options(head_chunks=chunks)
        cp = ra.ContextParallel(transport, S, mask=MASK, ulysses=ulysses, options=options)
        return step(cp, wanted, dout, given), cp.traffic()["received"], cp.local_seqlen

    for found, received, own in ra.Loopback(world).run(one_rank):
        check(found, wanted, alone(MASK))
        if (world, chunks) == (2, 1):
            assert received["backward heads"] == head_bytes(S, own, S, own, wanted)


@pytest.mark.parametrize("wanted", mostly_slow(SUBSETS, ["q", "v"]))
def test_travelling_queries(wanted, poison):
    seqlen, mask = 150, ra.longformer(5, 2, causal=False)
    *given, dout, _ = tensors(**SIZES, q_len=seqlen, kv_len=seqlen)
    expected = step(ra.ContextParallel(None, seqlen, mask=mask), "qkv", dout, given)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, seqlen, mask=mask, layout="contiguous")
        return step(cp, wanted, dout, given), cp.traffic()["received"], of_program(cp, mask, False)

    homes = 0
    for found, received, recvs in ra.Loopback(3).run(one_rank):
        check(found, wanted, expected)
        moved = {kind: n for kind, n in received.items() if kind.startswith("backward") and n}
        assert moved == {kind: n for kind, n in recvs.items() if n}
        homes += moved.get("backward dq", 0)
        assert received.get("forward q", 0) or received.get("forward partial", 0), "queries travel"
    assert bool(homes) == ("q" in wanted)


EXTRAS = {
    "bias": {"bias": torch.randn(2, 1, S, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3))},
    "sinks": {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    "dropout": {"dropout_p": 0.4, "seed": 5},
}


def with_extra(cp, name, wanted, dout, given):
    """The gradients, that of a tensor beside q, k and v last, of this rank's rows."""
    extras = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in EXTRAS[name].items()}
    leaf = extras.get(name)
    if leaf is not None:
        leaf.requires_grad_()
    if name == "bias":
        extras["bias"] = cp.shard(leaf, dim=2)
    found = step(cp, wanted, dout, given, **extras)
    return [*found, None if leaf is None else leaf.grad]


@pytest.mark.parametrize(
    "split", mostly_slow([{}, {"ulysses": 2}, {"options": ra.Options(head_chunks=2)}], [{}]), ids=str
)
@pytest.mark.parametrize("name", EXTRAS)
def test_what_a_call_brings_along(name, split, poison):
    """A bias or sinks alone, and beside some others; what dropout keeps does not depend on what is wanted."""
    *given, dout, _ = tensors(**SIZES)
    one = with_extra(ra.ContextParallel(None, S, mask=ra.causal()), name, "qkv", dout, given)

    def one_rank(transport, wanted):
        cp = ra.ContextParallel(transport, S, mask=ra.causal(), **split)
        return with_extra(cp, name, wanted, dout, given), cp.traffic()["received"]

    for wanted in ("", "v") if name == "sinks" else ("", "q") if name == "bias" else ("v", "qk"):
        ranks = ra.Loopback(2).run(lambda t, w=wanted: one_rank(t, w))
        for found, received in ranks:
            check(found[:3], wanted, one[:3])
            moved = {kind for kind, n in received.items() if n and kind.startswith("backward")}
            if not wanted:  # a bias needs the keys of other ranks, sinks need nothing
                assert "backward grad" not in moved and bool(moved) == (name == "bias")
            if name == "bias":
                torch.testing.assert_close(found[3], one[3], rtol=1e-11, atol=1e-11)
        if name == "sinks":
            torch.testing.assert_close(sum(found[3] for found, _ in ranks), one[3], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers(reentrant):
    *given, dout, _ = tensors(**SIZES)

    def attend(*inputs, **settings):
        return checkpoint(lambda *x: ra.attention(*x, **settings), *inputs, use_reentrant=reentrant)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=MASK)
        return [step(cp, wanted, dout, given, attend=attend) for wanted in ("q", "qv")]

    for found in ra.Loopback(3).run(one_rank):
        for mine, wanted in zip(found, ("q", "qv"), strict=True):
            check(mine, wanted, alone(MASK))


def test_compiled_calls():
    """A call that wants others is another graph, whose backward gives what is wanted."""
    torch._dynamo.reset()
    *given, dout, _ = tensors(**SIZES)
    cp, counter = ra.ContextParallel(None, S, mask=MASK), CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda *x: ra.attention(*x, cp=cp), fullgraph=True, backend=counter)
    plain = leaves("qkv", given)
    ra.attention(*plain, cp=cp).backward(dout)
    for wanted in ("v", "qk"):
        mine = leaves(wanted, given)
        attend(*mine).backward(dout)
        check([x.grad for x in mine], wanted, [x.grad for x in plain])
    assert counter.frame_count == 2


def over_processes(rank, world, wanted):
    *given, dout, _ = tensors(**SIZES)
    cp = ra.ContextParallel(dist.group.WORLD, S, mask=MASK)
    found = step(cp, wanted, dout, given)
    moved = {kind: n for kind, n in cp.traffic()["received"].items() if kind.startswith("backward") and n}
    assert moved == {kind: n for kind, n in of_program(cp, MASK, False).items() if n}
    return found


@pytest.mark.slow
def test_processes():
    for found in run_processes(over_processes, 2, "v"):
        check(found, "v", alone(MASK))


def test_the_operators_of_a_rank_move_as_much():
    """A mode that looks on sends calls through the dispatcher."""
    *given, dout, _ = tensors(**SIZES)

    class Looking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def one_rank(transport, wanted, looking):
        cp = ra.ContextParallel(transport, S, mask=MASK)
        if not looking:
            return step(cp, wanted, dout, given), cp.traffic()["received"]
        with Looking():
            return step(cp, wanted, dout, given), cp.traffic()["received"]

    for wanted in ("kv", "v"):
        plain, seen = (ra.Loopback(2).run(lambda t, w=wanted, x=x: one_rank(t, w, x)) for x in (False, True))
        for (found, moved), (same, as_much) in zip(plain, seen, strict=True):
            check(found, wanted, alone(MASK))
            check(same, wanted, found)
            assert moved == as_much


def test_rows_mapped_one_by_one_want_what_their_tensors_do():
    *given, dout, _ = tensors(**SIZES)
    q, k, v = leaves("qv", given)
    cp = ra.ContextParallel(None, S, mask=MASK)
    out = torch.func.vmap(lambda *x: ra.attention(*(t[None] for t in x), cp=cp)[0])(q, k, v)
    out.backward(dout)
    again = leaves("qkv", given)
    ra.attention(*again, cp=cp).backward(dout)
    check([q.grad, k.grad, v.grad], "qv", [x.grad for x in again])


def test_replays_of_each_subset():
    """Captured on tapes: each subset is a series of its own."""
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport):
        cp = taped(ra.ContextParallel(transport, S, mask=MASK, kernel="reference", options=ra.Options(graphs="on")))
        return [(wanted, step(cp, wanted, dout, given)) for _ in range(3) for wanted in ("q", "v", "qkv")]

    for found in ra.Loopback(2).run(one_rank):
        for wanted, mine in found:
            check(mine, wanted, alone(MASK))


def test_some_ranks_of_a_group():
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=MASK)
        pair = (0, 1) if transport.rank < 2 else (2, 3)
        return step(cp.on(pair), "v" if transport.rank < 2 else "qk", dout, given)

    for rank, found in enumerate(ra.Loopback(4).run(one_rank)):
        check(found, "v" if rank < 2 else "qk", alone(MASK))


@pytest.mark.parametrize("there", ["q", "qkv"])
def test_ranks_that_want_others_are_told(there):
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=MASK)
        step(cp, "qv" if transport.rank else there, dout, given)

    said = "q" if there == "q" else "q, k and v"
    with pytest.raises(CallMismatch, match=f"gradients wanted of q, k and v.*{said}.*q and v"):
        ra.Loopback(3).run(one_rank)


def test_ranks_that_want_a_bias_alone_are_told():
    """Its gradient moves nothing, but keys move for it where for nothing else."""
    *given, dout, _ = tensors(**SIZES)

    def one_rank(transport, wanted):
        cp = ra.ContextParallel(transport, S, mask=ra.causal())
        bias = EXTRAS["bias"]["bias"].clone().requires_grad_(transport.rank == 0)
        step(cp, wanted, dout, given, bias=cp.shard(bias, dim=2), sinks=torch.zeros(4).requires_grad_())
        return bias.grad

    with pytest.raises(CallMismatch, match=r"gradient of the bias.*wanted.*not wanted"):
        ra.Loopback(2).run(lambda t: one_rank(t, ""))
