"""The roll against the same on the whole sequence: values, gradients, bytes, and arguments that do not fit."""

import random

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.rolling import roll
from ringattn.testing import run_processes
from tests.support import cases

S = cases.SEQLEN  # 29, divisible by no number of ranks
LAYOUTS = ["contiguous", "zigzag", "striped", "balanced", "mixed", "lopsided"]
DISTANCES = [0, 1, -1, 2, 5, -13, S - 1, -(S - 1), S, 3 * S]


def layout_of(name, world):
    """Layouts by name, and two of spans in no order: with steps through each other, and with nearly empty shards."""
    if name == "mixed":
        shards = [[] for _ in range(world)]
        for i, span in enumerate([(20, 9), (1, 10, 2), (0, 1), (2, 3, 6), (4, 3, 6), (6, 2, 6), (18, 1)]):
            shards[i % world].append(span)
        return ra.Layout.from_spans(shards)
    if name == "lopsided":
        singles = [[(5 * r + 1, 1)] for r in range(world - 1)]
        rest = sorted(set(range(S)) - {5 * r + 1 for r in range(world - 1)}, reverse=True)
        return ra.Layout.from_spans([*singles, [(p, 1) for p in rest]])
    return name


def rolled(whole, by, dim=1, fill=0, bounds=(0, S)):
    """The definition, token by token."""
    document = torch.bucketize(torch.arange(S), torch.tensor(bounds), right=True)
    out = torch.full_like(whole, fill)
    for p in range(S):
        if 0 <= p + by < S and document[p] == document[p + by]:
            out.select(dim, p).copy_(whole.select(dim, p + by))
    return out


def whole_tensors():
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(2, S, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, weight, torch.randint(0, 100, (2, S), generator=generator)


def on_one_rank(group, layouts):
    """Every layout, distance and kind of border on this rank: what must equal one process's."""
    x, weight, labels = whole_tensors()
    first = ra.ContextParallel(group, S)
    found = {}
    for layout in layouts:
        cp = first.replace(layout=layout_of(layout, first.world_size))
        for by in DISTANCES:
            for bounds in (None, cases.CU):
                local = cp.shard(x).clone().requires_grad_()
                out = roll(cp, local, by, cu_seqlens=bounds)
                (out * cp.shard(weight)).sum().backward()
                ints = roll(cp, cp.shard(labels), by, fill=-100, cu_seqlens=bounds)
                found[layout, by, bounds] = [cp.unshard(t) for t in (out.detach(), local.grad, ints)]
    return found


def check(found):
    x, weight, labels = whole_tensors()
    for (layout, by, bounds), tensors in found.items():
        borders = bounds or (0, S)
        whole = x.clone().requires_grad_()
        out = rolled(whole, by, bounds=borders)
        ((out * weight).sum() + 0 * whole.sum()).backward()  # connected also where nothing is left
        expected = out.detach(), whole.grad, rolled(labels, by, fill=-100, bounds=borders)
        for name, a, b in zip(("values", "gradient", "labels"), tensors, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"{name} of {layout} by {by} within {borders}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_layout_and_distance(world, poison):
    for found in ra.Loopback(world, timeout=20).run(lambda transport: on_one_rank(transport, LAYOUTS)):
        assert len(found) == 2 * len(LAYOUTS) * len(DISTANCES)
        check(found)


def test_it_is_torch_roll_but_for_the_ends():
    x = whole_tensors()[0]
    for by in (1, 4, -3):
        ours, theirs = rolled(x, by), torch.roll(x, -by, 1)
        inside = slice(0, S - by) if by > 0 else slice(-by, S)
        assert torch.equal(ours[:, inside], theirs[:, inside]) and not ours[:, S - by :].any()


def over_gloo(rank, world):
    return on_one_rank(dist.group.WORLD, ("contiguous", "zigzag", "mixed"))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes(world):
    for found in run_processes(over_gloo, world):
        check(found)


def test_without_a_group():
    check(on_one_rank(None, ["contiguous"]))


def random_layout(seed, world):
    """Runs of the sequence, each dealt to random ranks in residues of a random step, and shuffled."""
    rng = random.Random(seed)
    shards = [[] for _ in range(world)]
    at = 0
    while at < S:
        length, step = min(rng.randint(1, 12), S - at), rng.randint(1, 4)
        for residue in range(min(step, length)):
            shards[rng.randrange(world)].append((at + residue, len(range(residue, length, step)), step))
        at += length
    for spans in shards:
        rng.shuffle(spans)
    return ra.Layout.from_spans(shards)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout(seed):
    labels = whole_tensors()[2]

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, layout=random_layout(seed, 3))
        return {by: cp.unshard(roll(cp, cp.shard(labels), by, cu_seqlens=cases.CU)) for by in (1, 2, -3, 8)}

    for found in ra.Loopback(3, timeout=20).run(one_rank):
        for by, values in found.items():
            assert torch.equal(values, rolled(labels, by, bounds=cases.CU)), by


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.bool])
def test_any_dim_strides_and_dtype(dim, dtype):
    shape = [3, 4, 5]
    shape[dim] = S
    whole = (torch.randn(shape) * 9).to(dtype)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, layout="zigzag")
        strided = cp.shard(whole, dim=dim).transpose(0, 2).contiguous().transpose(0, 2)
        return cp.unshard(roll(cp, strided, 3, dim, fill=1), dim=dim)

    for found in ra.Loopback(2, timeout=20).run(one_rank):
        assert found.dtype == dtype and torch.equal(found, rolled(whole, 3, dim, fill=1))


def test_only_tokens_that_cross_travel():
    token = 2 * 3 * 8  # batch, channels, bytes

    def sent(transport, layout, by, bounds=None):
        cp = ra.ContextParallel(transport, S, layout=layout)
        out = roll(
            cp, torch.ones(2, cp.local_seqlen, 3, dtype=torch.float64, requires_grad=True), by, cu_seqlens=bounds
        )
        forward = cp.traffic()
        out.sum().backward()
        total = cp.traffic()
        assert set(total["sent"]) == set(total["received"]) == {"roll"}
        return [counts["roll"] // token for counts in (forward["sent"], forward["received"], total["sent"])]

    def tokens(world, *case):
        return ra.Loopback(world, timeout=20).run(lambda transport: sent(transport, *case))

    # Rank r needs the first token of rank r + 1; backward sends each gradient where the token came from.
    assert tokens(4, "contiguous", 1) == [[0, 1, 1], [1, 1, 2], [1, 1, 2], [1, 0, 1]]
    assert tokens(3, "contiguous", -2) == [[2, 0, 2], [2, 2, 4], [0, 2, 2]]
    # zigzag: runs 0 1 2 | 2 1 0, the middle ones neighbours on one rank
    assert tokens(3, "zigzag", 1) == [[1, 1, 2], [2, 2, 4], [1, 1, 2]]
    assert tokens(1, "contiguous", 1) == [[0, 0, 0]]
    # a step of striped is a whole turn of the ranks
    assert tokens(4, "striped", 4) == [[0, 0, 0]] * 4
    # borders of documents that are borders of shards: nothing to move
    assert tokens(2, "contiguous", 1, [0, 15, S]) == [[0, 0, 0]] * 2


def test_the_gradient_has_a_gradient():
    def one_rank(transport):
        x, weight, _ = whole_tensors()
        cp = ra.ContextParallel(transport, S, layout="zigzag")
        local = cp.shard(x).clone().requires_grad_()
        (first,) = torch.autograd.grad((roll(cp, local, 2) ** 3).sum(), local, create_graph=True)
        (second,) = torch.autograd.grad((first * cp.shard(weight)).sum(), local)
        return cp.unshard(second)

    x, weight, _ = whole_tensors()
    whole = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((rolled(whole, 2) ** 3).sum(), whole, create_graph=True)
    (expected,) = torch.autograd.grad((first * weight).sum(), whole)
    for found in ra.Loopback(2, timeout=20).run(one_rank):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"local": torch.zeros(2, S + 1)}, r"local_seqlen=29: roll\(\) takes this rank's shard"),
        ({"dim": 2}, r"dim=2 of a tensor of shape \(2, 29\)"),
        ({"by": 1.5}, "by=1.5: must be an integer"),
        ({"by": 1 << 50}, "must be at most"),
        ({"fill": "x"}, "fill='x': must be a number"),
        ({"local": torch.zeros(2, S, dtype=torch.int64), "fill": 0.5}, "fill=0.5: .* torch.int64 can hold"),
        ({"local": torch.zeros(2, S, dtype=torch.uint8), "fill": -100}, "fill=-100: .* torch.uint8 can hold"),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens ends at 7 but seqlen=29"),
        ({"cu_seqlens": [1, S]}, "must start with 0"),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    arguments = {"local": torch.zeros(2, S), "by": 1} | change
    with pytest.raises(ValueError, match=text):
        roll(ra.ContextParallel(None, S), **arguments)


@pytest.mark.parametrize(
    ("of_rank", "text"),
    [
        (lambda rank: {"by": 1 - 2 * rank}, r"by: 1, fill 0 on rank 0; -1, fill 0 on rank 1"),
        (lambda rank: {"by": 1, "fill": rank}, "by: 1, fill 0 on rank 0; 1, fill 1 on rank 1"),
        (lambda rank: {"by": 1, "cu_seqlens": [0, 9 + rank, S]}, "documents: 2 "),
    ],
)
def test_ranks_that_disagree_are_told(of_rank, text):
    def one_rank(transport):
        cp = ra.ContextParallel(transport, S)
        with pytest.raises(ValueError, match=text):
            roll(cp, torch.zeros(1, cp.local_seqlen), **of_rank(transport.rank))

    ra.Loopback(2, timeout=20).run(one_rank)


def test_known_calls_are_not_compared_again():
    def one_rank(transport):
        cp = ra.ContextParallel(transport, S)
        for _ in range(5):
            roll(cp, torch.zeros(1, cp.local_seqlen), 1)
        return transport.log.course.ballots

    assert ra.Loopback(2, timeout=20).run(one_rank) == [1, 1]
