"""NCCL for real on one GPU: two and four ranks that share it, over sockets, in one group for all checks, because
processes take their time to come up. The same bodies run over gloo where there is no GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ringattn as ra
from ringattn.comm import ProcessGroupTransport
from ringattn.integrations.fsdp import data_context_mesh, shard_model
from ringattn.rolling import roll
from ringattn.testing import dense_results, run_processes

BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.gpu)]
)
S, HEADS, DIM, DEADLINE = 101, (4, 2), 16, 30.0
MASKS = (ra.causal(), ra.sliding_window(23), ra.documents([0, 30, 31, 77, S]) & ra.causal())
# the definition in fp64, which shows what messages do; and what a device computes with
KERNELS = ((torch.float64, "reference", 1e-10), (torch.float32, "auto", 1e-4))


def device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradients of out and lse, of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, S, heads, DIM) for heads in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])]
    made = [torch.randn(*shape, generator=generator) for shape in (*shapes, (1, HEADS[0], S))]
    return [x.to(device(), dtype) for x in made]


def messages(transport: Any) -> None:
    """Two messages to the next rank and two from the one before, posted together."""
    rank, world = transport.rank, transport.world_size
    after, before = (rank + 1) % world, (rank - 1) % world
    sent = [torch.full((5, 3), rank + part / 2, device=device()) for part in range(2)]
    found = [torch.zeros(5, 3, device=device()) for _ in range(2)]
    sends, recvs = [(x, after) for x in sent], [(x, before) for x in found]
    transport.post(sends, recvs, "messages").wait()
    for part, x in enumerate(found):
        assert (x == before + part / 2).all()


def attend(first: ra.ContextParallel, every: list[dict[str, Any]]) -> None:
    """Each of these settings, with each mask: results and gradients of the whole, on every rank."""
    for dtype, kernel, bound in KERNELS:
        q, k, v, dout, dlse = inputs(dtype)
        for mask in MASKS:
            expected = dense_results(q, k, v, mask.dense(S, S).to(q.device), dout, dlse)
            for settings in every:
                cp = first.replace(mask=mask, kernel=kernel, layout="zigzag", **settings)
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                out, lse = ra.attention(*map(cp.shard, leaves), cp=cp, return_lse=True)
                whole = cp.unshard(out), cp.unshard(lse, dim=2)
                ((whole[0] * dout).sum() + (whole[1] * dlse).sum()).backward()
                found = [x.detach() for x in whole] + [leaf.grad for leaf in leaves]
                for name, a, b in zip(expected._fields, found, expected, strict=True):
                    message = f"{name} of {mask} with {settings} in {dtype}"
                    torch.testing.assert_close(a, b, rtol=bound, atol=bound, msg=lambda said, m=message: f"{m}: {said}")


def schedules(first: ra.ContextParallel) -> None:
    """One ring of all ranks."""
    attend(first, [{"schedule": schedule} for schedule in ("ring", "exchange", "gather")])


def split_heads(first: ra.ContextParallel) -> None:
    """Heads over two ranks, or over all of them, and in chunks."""
    chunks = replace(first.options, head_chunks=2)
    splits = [{"ulysses": u, "schedule": "ring"} for u in sorted({2, min(first.world_size, HEADS[0])})]
    attend(first, [*splits, {"ulysses": 2, "options": chunks}])


def nodes(first: ra.ContextParallel) -> None:
    """A ring of nodes around rings inside of them."""
    if first.world_size == 4:
        two = ra.Topology(ra.Link(1e10), ra.Link(1e9), ranks_per_node=2)
        attend(first, [{"schedule": "double_ring", "options": replace(first.options, topology=two)}])


def subsets(first: ra.ContextParallel) -> None:
    """Some of the ranks attend together, then others, over the communicator of all."""
    last = first.world_size - 1
    for ranks in ([0, last], list(range(last)), [last]):
        if first.rank in ranks:
            attend(first.on(ranks), [{"schedule": "ring"}])
    attend(first, [{"schedule": "ring"}])


def moved(first: ra.ContextParallel) -> None:
    """shard, unshard and roll are those of the whole sequence."""
    x = torch.arange(2.0 * S, device=device()).view(2, S)
    for layout in ("contiguous", "zigzag", "striped"):
        cp = first.replace(layout=layout)
        assert torch.equal(cp.unshard(cp.shard(x)), x)
        assert torch.equal(cp.shard(x), x[:, cp.position_ids.to(x.device)])
        rolled = cp.unshard(roll(cp, cp.shard(x), 3, fill=-1.0))
        assert torch.equal(rolled, F.pad(x[:, 3:], (0, 3), value=-1.0))


def disagreement(first: ra.ContextParallel) -> None:
    """A rank that calls otherwise is named on all of them, and then they go on."""
    cp = first.replace(kernel="reference")
    q, k, v = (cp.shard(x) for x in inputs(torch.float64)[:3])
    with pytest.raises(ValueError, match="ranks disagree") as told:
        ra.attention(q, k, v, cp=cp, scale=0.5 if cp.rank == 1 else 0.25)
    assert "rank 1" in str(told.value) and "scale 0.5" in str(told.value) and "scale 0.25" in str(told.value)
    schedules(first)


class Block(nn.Module):
    """Attention between two maps."""

    def __init__(self, cp: ra.ContextParallel | None) -> None:
        super().__init__()
        self.cp = cp
        self.qkv = nn.Linear(DIM, sum((HEADS[0], 2 * HEADS[1])) * DIM, dtype=torch.float64)
        self.out = nn.Linear(HEADS[0] * DIM, DIM, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split((HEADS[0], HEADS[1], HEADS[1]), dim=2)
        cp = self.cp or ra.ContextParallel(None, S, kernel="reference")
        return x + self.out(ra.attention(q, k, v, cp=cp).flatten(2))


def block(cp: ra.ContextParallel | None) -> Block:
    torch.manual_seed(0)
    return Block(cp).to(device())


def sharded_parameters(first: ra.ContextParallel) -> None:
    """One step with FSDP2: loss, gradients and the parameters after it are those of one process."""
    cp = first.replace(kernel="reference")
    x = inputs(torch.float64)[0][:, :, 0]
    alone, model = block(None), block(cp)
    shard_model(model, data_context_mesh(device().type, data=1), [])
    losses = []
    for module, rows in ((alone, x), (model, cp.shard(x))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss = module(rows).square().sum() / x.numel()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    dist.all_reduce(losses[1])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    for (name, one), part in zip(alone.named_parameters(), model.parameters(), strict=True):
        for a, b in ((part.grad, one.grad), (part.detach(), one.detach())):
            torch.testing.assert_close(
                a.full_tensor(), b, rtol=1e-9, atol=1e-10, msg=lambda said, n=name: f"{n}: {said}"
            )


def checks(rank: int, world: int) -> str:
    """All of them, on one transport over the group."""
    transport = ProcessGroupTransport(dist.group.WORLD, DEADLINE)
    messages(transport)
    first = ra.ContextParallel(transport, S, options=ra.Options(compare_every=2))
    steps: tuple[Callable[[ra.ContextParallel], None], ...] = (
        moved, schedules, split_heads, nodes, subsets, disagreement, sharded_parameters,
    )  # fmt: skip
    for step in steps:
        step(first)
    return dist.get_backend()


@BACKENDS
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.gpu)])
def test_ranks_that_share_a_gpu_compute_what_one_does(world: int, backend: str) -> None:
    assert run_processes(checks, world, backend=backend, timeout=90) == [backend] * world
