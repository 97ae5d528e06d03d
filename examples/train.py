"""Trains a small decoder on the bytes of this file, every sequence sharded over all processes. Any number of them
prints the same losses:

    torchrun --standalone --nproc-per-node 2 examples/train.py
    torchrun --standalone --nproc-per-node 1 examples/train.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringattn

SEQLEN, WIDTH, HEADS, LAYERS = 1024, 64, 4, 2


class Layer(nn.Module):
    """Attention over all shards, and an MLP of each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, cp: ringattn.ContextParallel, mask: ringattn.Mask) -> Tensor:
        """x: this rank's tokens, [batch, local_seqlen, width]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        x = x + self.out(ringattn.attention(q, k, v, cp=cp, mask=mask).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    """A decoder of bytes. Positions are global: those of `cp.position_ids`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(SEQLEN, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, cp: ringattn.ContextParallel) -> Tensor:
        """tokens: this rank's, [batch, local_seqlen]; gives logits of them."""
        x = self.bytes(tokens) + self.positions(cp.position_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cp, cp.masks[index % len(cp.masks)])
        return self.head(x)


def main(steps: int = 30) -> list[float]:
    """The losses, in nats a byte: the mean over all ranks' targets."""
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same weights on all ranks
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cp = ringattn.ContextParallel(group, SEQLEN, mask=(ringattn.causal(), ringattn.sliding_window(127)))
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    losses = []
    for step in range(steps):
        begin = 64 * step % (len(text) - SEQLEN)
        whole = text[begin : begin + SEQLEN][None]  # every rank reads the same sequence
        tokens, labels = cp.shard(whole), cp.shard(ringattn.loss.shift_labels(whole))  # shifted, then cut
        share = ringattn.loss.token_mean(model(tokens, cp), labels, group=group)  # this rank's part of the mean
        optimizer.zero_grad()
        share.backward()
        ringattn.loss.sum_gradients(model.parameters(), group)
        optimizer.step()
        losses.append(float(ringattn.loss.sum_over(share.detach(), group)))
        if cp.rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")  # nccl on GPUs, and everything on them
    main()
    dist.destroy_process_group()
