"""Bare kernel calls, the ideal: FlashAttention-4 where it is installed and runs, else PyTorch's fused operators, and
on a CPU plain attention, which is there for dry runs."""

from __future__ import annotations

import warnings
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.figures import Passes
from ringattn.geometry.tiles import Window
from ringattn.kernels import Rows, sdpa_cuda
from ringattn.kernels.pieces import TileBand
from ringattn.testing import dense_attention

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "triton")


class Bare:
    """One tile a call: q ``[batch, nq, heads, dim]``, k and v ``[batch, nk, kv_heads, dim]``."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        raise NotImplementedError

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, window: Window
    ) -> object:
        """The gradients, as the kernel gives them."""
        raise NotImplementedError

    def documents(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bounds: list[int]) -> Passes:
        """Causal documents packed into one row: a call each, where there is no call for all of them."""
        parts = [[x[:, a:b] for x in (q, k, v, dout)] for a, b in pairwise(bounds)]

        def forward() -> list[tuple[Tensor, Tensor]]:
            return [self.forward(*part[:3], (None, 0)) for part in parts]

        def both() -> None:
            for part, (out, lse) in zip(parts, forward(), strict=True):
                self.backward(*part[:3], out, part[3], lse, (None, 0))

        return Passes(forward, both)


class Flash4(Bare):
    """FlashAttention-4."""

    name = "FlashAttention-4"

    def __init__(self) -> None:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        self._forward, self._backward = _flash_attn_fwd, _flash_attn_bwd

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        left, right = window
        out, lse, *_ = self._forward(q, k, v, window_size_left=left, window_size_right=right, return_lse=True)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, window: Window
    ) -> object:
        left, right = window
        return self._backward(q, k, v, out, dout, lse, window_size_left=left, window_size_right=right)

    def documents(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bounds: list[int]) -> Passes:
        """One call of variable lengths."""
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        longest = max(b - a for a, b in pairwise(bounds))
        cu = torch.tensor(bounds, dtype=torch.int32, device=q.device)
        packed: dict[str, Any] = {
            "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True,
        }  # fmt: skip

        def forward() -> tuple[Tensor, ...]:
            return self._forward(q, k, v, return_lse=True, **packed)

        def both() -> None:
            out, lse, *_ = forward()
            self._backward(q, k, v, out, dout, lse, **packed)

        return Passes(forward, both)


class Torch(Bare):
    """cuDNN's and flash attention of PyTorch, tile by tile as the kernel `sdpa` calls them, without what surrounds
    them."""

    name = "PyTorch's fused operators"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return sdpa_cuda.forward(q, k, v, window, q.size(-1) ** -0.5)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, window: Window
    ) -> object:
        rows = Rows(q, dout, out, lse, None, None)
        return list(sdpa_cuda.backward(rows, k, v, window, q.size(-1) ** -0.5))


class Plain(Bare):
    """Matrix products on a CPU."""

    name = "plain attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        band = TileBand.of(q.size(1), k.size(1), window)
        i, j = torch.arange(band.nq)[:, None], torch.arange(band.nk)
        mask = torch.ones(band.nq, band.nk, dtype=torch.bool)
        if band.lo is not None:
            mask &= j - i >= band.lo
        if band.hi is not None:
            mask &= j - i <= band.hi
        return dense_attention(q, k, v, mask)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, window: Window
    ) -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(self.forward(*leaves, window)[0], leaves, dout)


def find_bare(device: str) -> Bare:
    """The best that runs here, which a small call shows: versions of its packages may be there and not fit."""
    if device == "cpu":
        return Plain()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Flash4()
            q, k, v, dout = (torch.randn(1, 256, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(4))
            out, lse = found.forward(q, k, v, (None, 0))
            found.backward(q, k, v, out, dout, lse, (None, 0))
            torch.cuda.synchronize()
            return found
    except Exception as error:  # whatever a compiler that does not fit raises
        print(f"no FlashAttention-4 here ({type(error).__name__}: {error}): bare calls are {Torch.name}")
        return Torch()


def versions() -> dict[str, str]:
    """Those of the packages that kernels come from, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
