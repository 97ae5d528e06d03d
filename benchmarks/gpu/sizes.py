"""What is measured: sizes for a GPU, and tiny ones with which the same code runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Tokens, unless said otherwise. ``seconds`` and ``rounds``: what a comparison may take, and how often its sides
    take turns at least and at most."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    kernel: str = "auto"
    left_out: frozenset[str] = frozenset({"reference"})  # kernels that would hold every score of a long sequence
    calls: tuple[int, ...] = (8192, 32768, 4096, 16384)  # of one call
    shards: tuple[int, ...] = (8192, 4096, 1024)  # of one rank
    world: int = 8  # ranks
    long: int = 131072
    window: int = 1024
    documents: int = 201  # documents in ``long``
    block: int = 64  # of bigbird; chunks have four of them
    dense: int = 8192  # of the dense tiles that kernels are compared on
    host: int = 256  # of calls whose time is the host's
    exact: int = 4096  # where gradients are compared with fp64
    exact_heads: tuple[int, int] = (8, 2)  # query and KV heads there
    matmul: int = 8192  # rows and columns
    copied: int = 1 << 30  # bytes
    link: float = 50e9  # bytes a second that arrive while a rank computes
    seconds: float = 0.8
    rounds: tuple[int, int] = (5, 50)

    @property
    def forward_flop(self) -> int:
        """FLOP of one attending pair: two matrix products."""
        return 4 * self.heads * self.dim

    @property
    def backward_flop(self) -> int:
        """The same backward: five matrix products."""
        return 10 * self.heads * self.dim


FULL = Sizes()
DRY = Sizes(
    device="cpu", dtype=torch.float32, heads=4, kv_heads=2, dim=8, kernel="reference", left_out=frozenset({"triton"}),
    calls=(64, 128), shards=(64, 32), world=4, long=128, window=16, documents=5, block=8, dense=64, host=16, exact=64,
    exact_heads=(4, 2), matmul=64, copied=1 << 12, seconds=0.0, rounds=(1, 1),
)  # fmt: skip
