"""A batch whose documents `assign` has given to groups of ranks, computed by `cp.on`: what one process computes."""

import pytest
import torch
from torch import Tensor

import ringattn as ra
from ringattn.comm import Transport
from ringattn.testing import dense_attention
from tests.support.grids import mostly_slow

HEADS = (2, 1, 1)
BATCHES = {
    "long_and_short": [61, 3, 17, 1, 2, 40, 9, 5],
    "tiny": [1, 1, 2],
    "one": [50],
    "even": [16] * 8,
}


def documents_of(lengths: list[int]) -> list[list[Tensor]]:
    """q, k, v and the gradient of the output, document by document."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(1, n, h, 8, dtype=torch.float64, generator=generator) for h in (*HEADS, HEADS[0])] for n in lengths
    ]


def alone(lengths: list[int]) -> list[Tensor]:
    """Output and gradients of all documents, one behind the other."""
    found = []
    for q, k, v, dout in documents_of(lengths):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = dense_attention(*leaves, ra.causal().dense(q.shape[1], q.shape[1]))
        out.backward(dout)
        found.append([out.detach(), *(x.grad for x in leaves)])
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def share(transport: Transport, lengths: list[int], memory: int | None) -> list[Tensor]:
    """This rank's part of them, zeros elsewhere."""
    cp = ra.ContextParallel(transport, sum(lengths) + transport.world_size)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    whole = [torch.zeros(1, sum(lengths), h, 8, dtype=torch.float64) for h in (HEADS[0], *HEADS)]
    batch = documents_of(lengths)
    for part in ra.assign(lengths, cp.world_size, memory=memory).of(cp.rank):
        if not part.documents:
            continue
        some = cp.on(part.ranks, seqlen=part.seqlen, mask=ra.causal() & ra.documents(part.cu_seqlens))
        assert memory is None or some.local_seqlen <= memory
        packed = [torch.cat(x, 1) for x in zip(*(batch[n] for n in part.documents), strict=True)]
        q, k, v, dout = map(some.shard, packed)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ra.attention(*leaves, cp=some)
        out.backward(dout)
        rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in part.documents])[some.position_ids]
        for target, found in zip(whole, (out.detach(), *(x.grad for x in leaves)), strict=True):
            target[:, rows] += found
    return whole


@pytest.mark.parametrize("case", mostly_slow(
    [(world, name, memory) for world in (1, 2, 3, 4, 8) for name in BATCHES for memory in (None, 20)],
    [(4, "long_and_short", 20), (3, "tiny", None)],
))  # fmt: skip
def test_a_batch_is_what_one_process_computes(case: tuple[int, str, int | None]) -> None:
    world, name, memory = case
    lengths = BATCHES[name]
    if memory is not None and max(lengths) > world * memory:
        with pytest.raises(ValueError, match="together"):
            ra.assign(lengths, world, memory=memory)
        return
    found = ra.Loopback(world, timeout=20).run(lambda t: share(t, lengths, memory))
    for sums, expected in zip(zip(*found, strict=True), alone(lengths), strict=True):
        torch.testing.assert_close(torch.stack(sums).sum(0), expected)
