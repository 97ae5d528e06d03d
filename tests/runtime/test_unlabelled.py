"""Where messages carry no label: the ranks compare their calls, and after one that failed they go on only where nothing
of it is left under way. NCCL on a GPU, and gloo in its place elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import PeerError, ProcessGroupTransport
from ringattn.rolling import roll
from ringattn.testing import dense_attention, run_processes
from tests.support.exits import exit_codes
from tests.support.faults import Faults
from tests.support.lanes import unlabelled_transport
from tests.support.steps import S, inputs_of

BACKENDS = pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
DEADLINE = 20.0


def unlabelled(communicators: int = 0) -> ProcessGroupTransport:
    return unlabelled_transport(DEADLINE, communicators)


def context(transport: Any, compare_every: int, **settings: Any) -> ra.ContextParallel:
    return ra.ContextParallel(transport, S, options=ra.Options(compare_every=compare_every), **settings)


def tensors(cp: ra.ContextParallel, number: int) -> list[torch.Tensor]:
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    return [cp.shard(t.to(device, torch.float32)) for t in inputs_of(number)]


def train(cp: ra.ContextParallel, inputs: list[torch.Tensor], backward: bool = True) -> list[torch.Tensor]:
    *leaves, dout = inputs
    q, k, v = (t.clone().requires_grad_() for t in leaves)
    out = ra.attention(q, k, v, cp=cp)
    if not backward:
        return [out.detach()]
    out.backward(dout)
    return [out.detach(), *(t.grad for t in (q, k, v))]


def step(cp: ra.ContextParallel, number: int, inputs: list[torch.Tensor] | None = None) -> str:
    """ "right", the error, or an assertion that a number is wrong."""
    try:
        found = train(cp, inputs or tensors(cp, number))
    except (PeerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    q, k, v, dout = inputs_of(number)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, _ = dense_attention(*leaves, cp.masks[0].dense(S, S))
    out.backward(dout)
    rows = cp.position_ids
    for a, b in zip(found, (out.detach(), *(t.grad for t in leaves)), strict=True):
        torch.testing.assert_close(a.cpu().double(), b[:, rows], rtol=1e-4, atol=1e-4)
    return "right"


def steps(rank: int, world: int, communicators: int = 0) -> list[str]:
    transport, found = unlabelled(communicators), []
    masks = [ra.causal(), ra.documents([0, 5, 6, 20, S]) & ra.causal(), ra.longformer(4, [1, 9])]
    for mask in masks:
        for schedule in ("ring", "exchange", "gather"):
            cp = context(transport, 3, mask=mask, layout="zigzag", schedule=schedule)
            found += [step(cp, number) for number in range(2)]
            x = tensors(cp, 1)[0]
            whole = cp.unshard(roll(cp, x, 1))
            assert torch.equal(whole[:, :-1].cpu(), inputs_of(1)[0][:, 1:].float())
    return found


@BACKENDS
@pytest.mark.parametrize("world", [2, 3, 4])
def test_steps_are_right(backend: str, world: int) -> None:
    for found in run_processes(steps, world, backend=backend):
        assert set(found) == {"right"}, found


@pytest.mark.gpu
@pytest.mark.parametrize("communicators", [1, 2])
def test_steps_on_communicators_of_our_own_are_right(communicators: int) -> None:
    for found in run_processes(steps, 2, communicators, backend="nccl"):
        assert set(found) == {"right"}, found


def skip_a_backward(rank: int, world: int, compare_every: int) -> list[str]:
    """Rank 0 does not call backward in step 1."""
    cp = context(unlabelled(), compare_every)
    found = [step(cp, 0)]
    for number in range(1, 5):
        try:
            train(cp, tensors(cp, number), backward=rank > 0 or number > 1)
        except (PeerError, ValueError) as error:
            return [*found, f"{type(error).__name__}: {error}", *(step(cp, number) for number in (5, 6))]
    return found


@BACKENDS
@pytest.mark.parametrize("compare_every", [1, 2])
def test_a_skipped_backward_shows_at_the_next_comparison(backend: str, compare_every: int) -> None:
    for first, text, *later in run_processes(skip_a_backward, 2, compare_every, backend=backend):
        assert first == "right"
        assert text.startswith("CallMismatch") and "call 4: attention forward; " in text, text
        assert "attention backward; " in text, text
        assert all("CallMismatch" in one and "a new process group" in one for one in later), later


def refuse(rank: int, world: int) -> list[str]:
    """Rank 1 refuses a call of a kind that is known."""
    cp = context(unlabelled(), 1)
    found = [step(cp, 0)]
    q, k, v, _ = tensors(cp, 1)
    try:
        ra.attention(*(x[:, 1:] if rank == 1 else x for x in (q, k, v)), cp=cp)
    except ValueError as error:
        found.append(str(error))
    return [*found, step(cp, 1)]


@BACKENDS
def test_a_refusal_is_heard_at_the_next_comparison(backend: str) -> None:
    for first, text, last in run_processes(refuse, 2, backend=backend):
        assert first == last == "right" and "tokens, but rank" in text, (text, last)


def fail_at(rank: int, world: int, points: tuple[int, ...], communicators: int = 0) -> list[str]:
    """Rank r fails at its point r of a forward; what the steps after it say."""
    transport = unlabelled(communicators)
    faults, cp = Faults(transport), context(transport, 1, layout="zigzag", schedule="ring")
    # all on the device by now: a copy would wait behind what never arrives
    first, second, *later = (tensors(cp, number) for number in range(4))
    found = [step(cp, 0, first)]
    faults.arm(points[rank])
    try:
        train(cp, second, backward=False)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    faults.arm(None)
    return [*found, *(step(cp, number, inputs) for number, inputs in enumerate(later, 2))]


# the first batch of a forward: before it is posted (1), after that (2), before the wait for it (3)
@BACKENDS
@pytest.mark.parametrize(
    "points, left", [((1, 1), False), ((2, 2), False), ((2, 3), False), ((1, 2), True), ((3, 1), True)]
)
@pytest.mark.parametrize("communicators", [0, 2])
def test_ranks_that_fail_go_on_if_no_transfer_is_left(
    backend: str, points: tuple[int, ...], left: bool, communicators: int
) -> None:
    for first, failed, *later in run_processes(fail_at, 2, points, communicators, backend=backend):
        assert first == "right" and failed.startswith("Injected")
        if left:
            assert all("CallMismatch" in text and "a new process group" in text for text in later), later
        else:
            assert later == ["right", "right"], later


@pytest.mark.gpu
def test_a_fault_on_one_rank_of_a_gpu_group_is_heard_by_all() -> None:
    for rank, (first, *rest) in enumerate(run_processes(fail_at, 2, (99, 2), backend="nccl")):
        assert first == "right"
        told = rest[0]
        assert ("Injected" in told) if rank else ("rank 1 failed" in told and "Injected" in told), rest
        assert all("CallMismatch" in text for text in rest[1:]), rest


@pytest.mark.gpu
def test_right_runs_on_gpus_end_as_such(tmp_path: Path) -> None:
    held = ("global", "closure", "model", "graph", "exception", "nothing")
    assert exit_codes(held, 2, tmp_path, "nccl") == [[0, 0]] * len(held)


def make_contexts(rank: int, world: int) -> list[str]:
    """Contexts made on the group itself: one that a rank refuses, two called in different orders, one after that."""
    group, options = dist.group.WORLD, ra.Options(timeout=DEADLINE)
    found = []
    try:
        ra.ContextParallel(group, -1 if rank else S, options=options)
    except ValueError as error:
        found.append(str(error))
    training = ra.ContextParallel(group, S, options=options)
    evaluation = ra.ContextParallel(group, S, options=options, mask=ra.full())
    assert training.link.transport is evaluation.link.transport
    inputs = tensors(training, 1)
    try:
        train(training if rank else evaluation, inputs)
    except ValueError as error:
        found.append(str(error))
    return [*found, step(training, 2), step(evaluation, 3)]


@pytest.mark.gpu
def test_contexts_of_a_gpu_group_are_made_and_called_by_all() -> None:
    for rank, found in enumerate(run_processes(make_contexts, 2, backend="nccl")):
        assert ("rank 1 refused" in found[0]) != rank and "seqlen=-1" in found[0], found
        assert "mask: " in found[1] and found[2:] == ["right", "right"], found


def sum_on_gpus(rank: int, world: int) -> list[str]:
    group, labels = dist.group.WORLD, torch.tensor([[1, -100, 2]], device="cuda")
    assert int(ra.loss.count_targets(labels, group)) == 2 * world
    assert ra.loss.sum_over(torch.full((2,), rank + 1.0, device="cuda"), group).tolist() == [3.0, 3.0]
    parameters = [torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2)]
    parameters[0].grad = torch.full((3,), rank + 1.0, device="cuda")
    ra.loss.sum_gradients(parameters, group)
    assert parameters[0].grad.tolist() == [3.0] * 3 and parameters[1].grad is None
    meter = ra.loss.TokenMeter(group)
    meter.add(labels, torch.tensor(0.5, device="cuda"))
    assert meter.read().loss == 1.0 and meter.read().tokens == 3 * world
    texts = []
    for way in (lambda: meter.read(rank), lambda: ra.loss.sum_gradients(parameters[rank:], group)):
        try:
            way()
        except ValueError as error:
            texts.append(str(error))
    return texts


@pytest.mark.gpu
def test_sums_over_gpus_are_right_or_refused_by_all() -> None:
    first, second = run_processes(sum_on_gpus, 2, backend="nccl")
    assert "steps=0" in first[0] and "another rank refused" in second[0]
    assert "sum_gradients() of 2" in first[1] and "sum_gradients() of 1" in second[1]
