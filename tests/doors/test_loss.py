"""The loss over data x context ranks against one process: values, every rank's gradients, counts, and the meter."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ringattn as ra
from ringattn.loss import TokenMeter, count_targets, linear_token_mean, shift_labels, sum_over, token_mean
from ringattn.testing import run_processes
from tests.support.loss_model import (
    CU,
    VOCABULARY,
    WIDTH,
    S,
    assert_same,
    make_model,
    one_process,
    samples,
    whole_logits,
)

GRID = [(1, 2), (2, 2), (1, 3), (1, 4)]  # data x context


# -- labels and counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1, 2, 7, S, S + 5])
@pytest.mark.parametrize("bounds", [None, CU])
def test_shifted_labels(by, bounds):
    tokens = torch.randint(0, VOCABULARY, (2, S), dtype=torch.int32)
    tokens[0, 5] = -100
    labels = shift_labels(tokens, cu_seqlens=bounds, by=by)
    document = torch.bucketize(torch.arange(S), torch.tensor(bounds or (0, S)), right=True)
    assert labels.dtype == torch.int64 and labels.is_contiguous()
    for p in range(S):
        within = p + by < S and document[p] == document[p + by]
        expected = tokens[:, p + by] if within else torch.full((2,), -100)
        assert labels[:, p].tolist() == expected.tolist(), p


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tokens": torch.zeros(S, dtype=torch.int64)}, r"must be integers \[batch, seqlen\]"),
        ({"tokens": torch.zeros(1, S)}, "torch.float32: must be integers"),
        ({"cu_seqlens": [0, 9]}, "cu_seqlens ends at 9 but tokens has 61 positions"),
        ({"by": 0}, "by=0: must be at least 1"),
    ],
)
def test_labels_that_cannot_be_shifted(arguments, text):
    with pytest.raises(ValueError, match=text):
        shift_labels(**({"tokens": torch.zeros(1, S, dtype=torch.int64)} | arguments))


def count_everywhere(rank, world, data, context):
    mesh = init_device_mesh("cpu", (data, context), mesh_dim_names=("dp", "cp"))
    cp = ra.ContextParallel(mesh["cp"], S, layout="zigzag")
    whole = samples(data)[1][mesh["dp"].get_local_rank()][None]
    shard = cp.shard(whole)
    return {
        "shards": int(count_targets(shard, mesh)),
        "of a process group": int(count_targets(shard, dist.group.WORLD)),
        "whole, told so": int(count_targets(whole, mesh, cp=cp)),
        "shards, told so": int(count_targets(shard, mesh, cp=cp)),
        "two micro-batches": int(count_targets([shard, shard[:, :3]], mesh)),
        "whole, not told": int(count_targets(whole, mesh)),
        "this rank": int(count_targets(shard)),
        "first three": int((shard[:, :3] != -100).sum()),
        "dtype": count_targets(shard, mesh).dtype,
    }


@pytest.mark.parametrize(("data", "context"), GRID)
def test_counts(data, context):
    right = int((samples(data)[1] != -100).sum())
    ranks = run_processes(count_everywhere, data * context, data, context)
    extra = sum(found["first three"] for found in ranks)
    for found in ranks:
        assert {found[case] for case in ("shards", "of a process group", "whole, told so", "shards, told so")} == {
            right
        }
        assert found["two micro-batches"] == right + extra and found["dtype"] == torch.int64
        assert found["whole, not told"] == right * context  # why there is a `cp` argument
    assert sum(found["this rank"] for found in ranks) == right


def test_labels_that_cannot_be_counted():
    cp = ra.ContextParallel(None, S)
    with pytest.raises(
        ValueError, match=r"labels of 60 tokens: must be this rank's shard \(local_seqlen=61\) or whole"
    ):
        count_targets(torch.zeros(1, S - 1, dtype=torch.int64), cp=cp)
    with pytest.raises(ValueError, match="must be int64"):
        count_targets(torch.zeros(1, S))

    def alone(transport):
        with pytest.raises(ValueError, match="pass the group of data x context too"):
            count_targets(torch.zeros(1, S, dtype=torch.int64), cp=ra.ContextParallel(transport, S))

    ra.Loopback(2).run(alone)
    with pytest.raises(ValueError, match="must be int64, one tensor or several"):
        count_targets([])
    with pytest.raises(ValueError, match="pass a ProcessGroup that this rank is in"):
        count_targets(torch.zeros(1, S, dtype=torch.int64), dist.GroupMember.NON_GROUP_MEMBER)


# -- the mean ---------------------------------------------------------------------------------------


def train_everywhere(rank, world, data, context, layout):
    """A step by both functions, and one of two micro-batches; loss and gradients summed over the ranks."""
    mesh = init_device_mesh("cpu", (data, context), mesh_dim_names=("dp", "cp"))
    cp = ra.ContextParallel(mesh["cp"], S, layout=layout)
    tokens, labels = (cp.shard(t[mesh["dp"].get_local_rank() :: data]) for t in samples(2 * data))
    found, targets = {}, [int((t != -100).sum()) for t in labels]
    for name, mean in (("whole", whole_logits), ("chunked", linear_token_mean)):
        for group in (mesh, dist.group.WORLD):
            model = make_model()
            share = mean(model.hidden(tokens), model.head, labels, group=group)
            share.backward()
            found[name, type(group).__name__] = results(model, share, group)
        model = make_model()
        count = count_targets(labels, mesh)
        shares = [mean(model.hidden(x), model.head, y, count=count) for x, y in zip(tokens, labels, strict=True)]
        for share in shares:
            share.backward()
        found[name, "accumulated"] = results(model, torch.stack(shares).sum(), mesh)
    return found, targets


def results(model, share, group):
    gradients = {name: sum_over(p.grad, group) for name, p in model.named_parameters()}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    return sum_over(share, group), gradients


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("data", "context"), GRID)
def test_loss_and_gradients_are_those_of_one_process(data, context, layout):
    expected = one_process(make_model(), *samples(2 * data))
    ranks = run_processes(train_everywhere, data * context, data, context, layout)
    if layout == "contiguous":
        assert any(targets[1] == 0 for _, targets in ranks), "one rank is to have no targets in a micro-batch"
    for found, _ in ranks:
        assert len(found) == 6
        for case in found.values():
            assert_same(case, expected)


def test_the_mean_of_means_is_another():
    tokens, labels = samples(2)
    right, gradients = one_process(make_model(), tokens, labels)
    model = make_model()
    means = [token_mean(model.head(model.hidden(x)), y) for x, y in zip(tokens, labels, strict=True)]
    mean = torch.stack(means).mean()
    mean.backward()
    assert abs(mean - right) > 1e-3 * right
    assert (model.linear.weight.grad - gradients["linear.weight"]).norm() > 0.1 * gradients["linear.weight"].norm()


@pytest.mark.parametrize("mean", [whole_logits, linear_token_mean])
@pytest.mark.parametrize("length", [0, 5])
def test_without_targets_all_is_zero_and_connected(mean, length):
    model = make_model()
    tokens, labels = torch.zeros(1, length, dtype=torch.int64), torch.full((1, length), -100)
    share = mean(model.hidden(tokens), model.head, labels)
    share.backward()
    assert share == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# -- what does not fit, and what to log -------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (
            {"labels": torch.zeros(1, S - 1, dtype=torch.int64)},
            r"labels \(1, 60\) torch.int64: must be int64 \(1, 61\)",
        ),
        ({"labels": torch.zeros(1, S, dtype=torch.int32)}, "torch.int32: must be int64"),
        ({"count": -1}, "count=-1: must be at least 0"),
        ({"count": 2.5}, "count=2.5: must be an integer"),
        ({"count": torch.ones(2, dtype=torch.int64)}, "must be an integer scalar"),
        ({"count": torch.tensor(1.0)}, "must be an integer scalar"),
        ({"group": "dp_cp"}, "group='dp_cp': pass a ProcessGroup"),
        ({"chunks": 0}, "chunks=0: must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(how, text):
    arguments = {"labels": torch.zeros(1, S, dtype=torch.int64)} | how
    with pytest.raises(ValueError, match=text):
        linear_token_mean(torch.zeros(1, S, WIDTH), nn.Linear(WIDTH, VOCABULARY), **arguments)
    if "chunks" not in how:
        with pytest.raises(ValueError, match=text):
            token_mean(torch.zeros(1, S, VOCABULARY), **arguments)


def count_twice(rank, world):
    with pytest.raises(ValueError, match="a count is that of all ranks already"):
        token_mean(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), group=dist.group.WORLD, count=3)


def test_a_count_is_not_counted_again():
    run_processes(count_twice, 2)


def meter_everywhere(rank, world, data, context):
    mesh = init_device_mesh("cpu", (data, context), mesh_dim_names=("dp", "cp"))
    cp = ra.ContextParallel(mesh["cp"], S)
    tokens, labels = (t[mesh["dp"].get_local_rank()][None] for t in samples(data))
    model = make_model()
    meter = TokenMeter(mesh)
    readings = []
    for steps in (1, 3):
        for _ in range(steps):
            share = linear_token_mean(model.hidden(cp.shard(tokens)), model.head, cp.shard(labels), group=mesh)
            meter.add(cp.shard(tokens) if steps == 1 else tokens, share, cp=cp)
        readings.append(meter.read(steps))
    return readings


@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2)])
def test_tokens_are_metered_once(data, context):
    loss = float(one_process(make_model(), *samples(data))[0])
    for first, then in run_processes(meter_everywhere, data * context, data, context):
        assert (first.tokens, then.tokens) == (data * S, 4 * data * S)  # not times the context ranks
        assert first.loss == pytest.approx(loss, rel=1e-12) and then.loss == pytest.approx(loss, rel=1e-12)
        assert first.tokens_per_second > 0 and then.tokens_per_second > 0


def test_the_rate_is_that_since_the_last_reading(monkeypatch):
    now = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("ringattn.loss.time.perf_counter", lambda: next(now))
    meter = TokenMeter()
    rates = []
    for tokens in (30, 100):
        meter.add(torch.zeros(1, tokens), torch.tensor(1.0))
        rates.append(meter.read().tokens_per_second)
    assert rates == [15.0, 20.0]


def refuse_labels(rank: int, world: int) -> list[str]:
    """What one rank refuses, in each of the losses, and a loss after it."""
    logits, labels = torch.zeros(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    odd, group, texts = rank == 1, dist.group.WORLD, []
    calls = (
        lambda: ra.loss.count_targets(labels.int() if odd else labels, group),
        lambda: ra.loss.token_mean(logits, labels + 9 * odd, group=group),
        lambda: ra.loss.linear_token_mean(logits, lambda x: x, labels[:, :3] if odd else labels, group=group),
    )
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        texts.append(str(caught.value))
        assert ra.loss.count_targets(labels, group) == 4 * world
    return texts


def test_labels_that_one_rank_refuses_are_refused_by_all():
    ranks = run_processes(refuse_labels, 3)
    for texts in (ranks[0], ranks[2]):
        assert all("another rank refused" in text for text in texts)
    assert "int64" in ranks[1][0] and "a label of 9" in ranks[1][1] and "must be int64" in ranks[1][2]


def sum_apart(rank: int, world: int) -> list[tuple[str, str, float]]:
    """Sums in which one rank is not like the others: what it raises and they, and how long that takes."""
    logits, labels = torch.zeros(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    odd, group = rank == 1, dist.group.WORLD
    meter = TokenMeter(group)

    def exhausted():
        yield labels
        raise KeyError("the loader's file is gone")

    def parameters(*sizes, frozen=False):
        made = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)
        made[0].requires_grad_(not frozen)
        return made

    def no_room(*_):
        raise MemoryError("no room for logits")

    def lossy():
        kept = ra.loss._sum
        ra.loss._sum = no_room if odd else kept
        try:
            token_mean(logits, labels, group=group)
        finally:
            ra.loss._sum = kept

    ways = {
        "one of the two": lambda: token_mean(logits, labels, group=group, count=4 if odd else None),
        "MemoryError": lossy,
        "the loader's file": lambda: count_targets(exhausted() if odd else [labels], group),
        "steps=0": lambda: meter.read(0 if odd else 1),
        "value is a list": lambda: sum_over([1.0] if odd else torch.ones(()), group),
        "chunks=0": lambda: linear_token_mean(logits, torch.nn.Identity(), labels, group=group, chunks=0 if odd else 1),
        "a label of 99": lambda: linear_token_mean(
            logits, torch.nn.Identity(), torch.full_like(labels, 99) if odd else labels, group=group
        ),
        "is an int": lambda: ra.loss.sum_gradients([7] if odd else parameters(3), group),
        "sum_over() of (4,)": lambda: sum_over(torch.ones(4 if odd else 2), group),
        "float16": lambda: sum_over(torch.ones(4, dtype=torch.float16 if odd else torch.float32), group),
        "a count of targets": lambda: count_targets(labels, group) if odd else sum_over(torch.ones(()), group),
        "of 1 parameters": lambda: ra.loss.sum_gradients(parameters(3, 2, frozen=odd), group),
        "(5, torch.float32": lambda: ra.loss.sum_gradients(parameters(5 if odd else 3), group),
        "of 0 parameters": lambda: ra.loss.sum_gradients(parameters(3, frozen=odd), group),
    }
    found = []
    for name, way in ways.items():
        start = time.monotonic()
        try:
            way()
            text = "nothing"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        found.append((name, text, time.monotonic() - start))
        assert sum_over(torch.full((2,), rank + 1.0), group).tolist() == [world * (world + 1) / 2] * 2
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_a_sum_that_ranks_do_not_make_alike_is_refused_by_all(world):
    ranks = run_processes(sum_apart, world)
    for outcomes in zip(*ranks, strict=True):
        name, odd, seconds = outcomes[1]
        assert name in odd and seconds < 2.0, outcomes
        for _, text, seconds in (outcomes[0], *outcomes[2:]):
            assert text.startswith("ValueError") and seconds < 2.0, outcomes
            assert "another rank refused" in text or "and other ranks do not" in text, outcomes


def test_gradients_are_summed_where_some_ranks_have_none():
    assert run_processes(sum_some_gradients, 3) == [[[6.0], [2.0], None]] * 3


def sum_some_gradients(rank: int, world: int) -> list[list[float] | None]:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad = torch.tensor([rank + 1.0])
    parameters[1].grad = torch.tensor([2.0]) if rank == 2 else None
    ra.loss.sum_gradients(parameters, dist.group.WORLD)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def sum_odd_gradients(rank: int, world: int) -> list[list[float]]:
    """Of ranks that hold equal tensors in other memory formats: transposed, expanded, sparse."""
    group, numbers = dist.group.WORLD, torch.arange(12.0).view(3, 4)
    other = numbers.t().contiguous().t() if rank else numbers
    transposed, expanded = torch.nn.Parameter(other), torch.nn.Parameter(torch.zeros(3, 4))
    (transposed * numbers).sum().backward()
    expanded.grad = torch.ones(1, 4).expand(3, 4)
    tables = [torch.nn.Embedding(3, 2, sparse=sparse) for sparse in (True, True, rank == 0)]
    for table in tables[:1] if rank else tables:
        table(torch.tensor([0, 2])).sum().backward()
    tables[2](torch.tensor([1])).sum().backward()
    ra.loss.sum_gradients([transposed, expanded, *(table.weight for table in tables)], group)
    found = [sum_over(other, group), transposed.grad, expanded.grad, *(table.weight.grad for table in tables)]
    assert found[3].is_sparse and found[4].is_sparse and not found[5].is_sparse
    return [x.to_dense().flatten().tolist() for x in found]


@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_of_numbers_and_not_of_memory(world):
    numbers = [float(world * i) for i in range(12)]
    rows = [[float(world)] * 2 + [0.0] * 2 + [float(world)] * 2, [1.0] * 2 + [0.0] * 2 + [1.0] * 2]
    mixed = [1.0] * 2 + [float(world)] * 2 + [1.0] * 2
    want = [numbers, numbers, [float(world)] * 12, *rows, mixed]
    assert run_processes(sum_odd_gradients, world) == [want] * world


def sum_another_dtype(rank: int, world: int) -> str:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    if rank:
        parameter.grad_dtype = None  # any
    parameter.grad = torch.zeros(2, dtype=torch.float32 if rank else torch.bfloat16)
    with pytest.raises(ValueError) as raised:
        ra.loss.sum_gradients([parameter], dist.group.WORLD)
    return str(raised.value)


def test_a_gradient_of_another_dtype_is_refused_by_all():
    told, own = run_processes(sum_another_dtype, 2)
    assert "another rank refused" in told and "must be of its dtype" in own
