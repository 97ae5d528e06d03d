"""Error against ring size: 1 to 64 ranks simulated in one process, fp32 and bf16 inputs, against fp64.

The figure is the largest error over the whole tensor, relative to the largest value of the fp64 result.

    python -m benchmarks.accuracy
"""

from __future__ import annotations

from typing import Any

import torch
import typer
from torch import Tensor

import ringattn
from benchmarks.common import write

SEQLEN, HEADS, KV_HEADS, DIM = 2048, 4, 2, 64
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(world: int, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype, kernel: str) -> list[Tensor]:
    def one_rank(transport: Any) -> list[Tensor]:
        cp = ringattn.ContextParallel(transport, SEQLEN, kernel=kernel, schedule="ring")
        local = [cp.shard(t.to(dtype)).requires_grad_() for t in inputs]
        out, lse = ringattn.attention(*local, cp=cp, return_lse=True)  # type: ignore[misc]
        out.backward(cp.shard(dout.to(dtype)))
        grads = [cp.unshard(t.grad) for t in local if t.grad is not None]
        return [cp.unshard(out.detach()), cp.unshard(lse.detach(), dim=2), *grads]

    return ringattn.Loopback(world, timeout=300).run(one_rank)[0]


def main(json: str = "accuracy-cpu") -> None:
    """Measure, print and write JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = ((SEQLEN, HEADS, DIM), (SEQLEN, KV_HEADS, DIM), (SEQLEN, KV_HEADS, DIM), (SEQLEN, HEADS, DIM))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        # The truth starts from the rounded inputs, so that only the computation's own error is seen.
        *inputs, dout = (torch.randn(1, *s, dtype=torch.float64).to(dtype).double() for s in shapes)
        truth = run(1, inputs, dout, torch.float64, "reference")
        for kernel in ("sdpa", "reference"):
            print(f"{dtype}, kernel {kernel}: largest error / largest value")
            print("  ranks " + "".join(f"{name:>11}" for name in NAMES))
            for world in (1, 2, 4, 8, 16, 32, 64):
                found = run(world, inputs, dout, dtype, kernel)
                errors = {
                    name: float((a.double() - b).abs().max() / b.abs().max())
                    for name, a, b in zip(NAMES, found, truth, strict=True)
                }
                rows.append({"dtype": str(dtype), "kernel": kernel, "ranks": world, **errors})
                print(f"  {world:>5} " + "".join(f"{errors[name]:>11.2e}" for name in NAMES))
    write(json, {"seqlen": SEQLEN, "mask": "causal", "rows": rows})


if __name__ == "__main__":
    typer.run(main)
