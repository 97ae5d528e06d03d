"""Peak memory of one of two ranks, forward + backward, local+global, above the inputs.

Measured by the operating system (peak resident set of the process) against what must be held:
outputs, gradients, accumulators and the schedule's buffers.

    python -m benchmarks.memory
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import on_processes, write

HEADS, DIM = 4, 64


def status(field: str) -> int:
    """Bytes of a field of the process status (VmRSS now, VmHWM at most)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]


def step(rank: int, seqlen: int) -> dict[str, Any]:
    cp = ringattn.ContextParallel(dist.group.WORLD, seqlen, mask=ringattn.longformer(1023, 64))
    small = cp.replace(seqlen=4096)
    attend(small)  # code, pools and threads that any call brings up
    q, k, v, dout = (torch.randn(1, cp.local_seqlen, HEADS, DIM) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = status("VmRSS")
    out = ringattn.attention(*inputs, cp=cp)
    out.backward(dout)
    peak = status("VmHWM") - before
    outputs = out.nbytes + HEADS * cp.local_seqlen * 4
    gradients = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    # fp32 inputs: the accumulators of out, dq, dk and dv become the results; delta and lse remain.
    accumulators = 2 * HEADS * cp.local_seqlen * 4
    buffers = sum(t.nbytes for t in cp.link.workspace.buffers())
    held = outputs + gradients + accumulators + buffers
    both = torch.tensor([peak / held])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return {"seqlen": seqlen, "peak_bytes": peak, "held_bytes": held, "buffers": buffers, "ratio": float(both)}


def attend(cp: ringattn.ContextParallel) -> None:
    q, k, v = (torch.randn(1, cp.local_seqlen, HEADS, DIM, requires_grad=True) for _ in range(3))
    ringattn.attention(q, k, v, cp=cp).backward(torch.ones_like(q))  # a gradient that is given brings up more code


def main(json: str = "memory-cpu") -> None:
    """Measure, print and write JSON."""
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "0")
    rows = []
    for seqlen in (32768, 65536, 131072, 262144):
        row = on_processes(step, 2, seqlen)
        rows.append(row)
        print(
            f"{seqlen:>7} tokens: peak {row['peak_bytes'] / 2**20:7.1f} MiB over the inputs, "
            f"must hold {row['held_bytes'] / 2**20:7.1f} MiB: {row['ratio']:.3f} (larger of both ranks), "
            f"{row['peak_bytes'] / seqlen * 2:,.0f} bytes a local token"
        )
    write(json, {"heads": HEADS, "head_dim": DIM, "mask": "longformer(1023, 64)", "rows": rows})


if __name__ == "__main__":
    typer.run(main)
