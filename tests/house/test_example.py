"""The example to read first: three tokens, two ranks, the numbers of a calculation by hand."""

import torch

import ringattn


def test_three_tokens_on_two_ranks():
    q = torch.tensor([[0.06, 0.08], [0.14, 0.24], [0.22, 0.40]]).view(1, 3, 1, 2)
    k = torch.tensor([[0.04, 0.08], [0.12, 0.20], [0.20, 0.32]]).view(1, 3, 1, 2)
    v = torch.tensor([[0.03, 0.03], [0.11, 0.11], [0.19, 0.19]]).view(1, 3, 1, 2)

    def one_rank(transport):
        cp = ringattn.ContextParallel(transport, seqlen=3, mask=ringattn.full())
        out = ringattn.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
        return cp.unshard(out)

    for out in ringattn.Loopback(2).run(one_rank):
        expected = torch.tensor([0.1105, 0.1115, 0.1125]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
        assert torch.allclose(out, expected, atol=5e-5)
