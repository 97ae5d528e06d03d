"""CPU tiles of the sdpa kernel beside PyTorch's bare operator: GFLOP/s by exact area, forward and backward.

One thread, fp32, 4 heads of 64, random data, cases taking turns, medians. Kernel tiles include what the operator
alone does not do: folding into the running result and adding to fp32 gradients. GPU tiles: ``benchmarks.gpu``.

    python -m benchmarks.kernels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.common import interleaved, medians, write
from ringattn.kernels import Grads, Kernel, Rows
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Place, Scores, TileScores, Window
from ringattn.kernels.sdpa import Sdpa

HEADS, DIM = 4, 64
SCALE = DIM**-0.5
Pair = tuple[Callable[[], object], Callable[[], object]]

# (tile, rows and keys, window, attending pairs)
TILES = {
    "causal 2048": (2048, (None, 0), 2048 * 2049 // 2),
    "causal 8192": (8192, (None, 0), 8192 * 8193 // 2),
    "full 2048": (2048, (None, None), 2048**2),
    "full 8192": (8192, (None, None), 8192**2),
    "window 256 of 16384": (16384, (255, 0), 256 * 16384 - 255 * 256 // 2),
    "window 1024 of 65536": (65536, (1023, 0), 1024 * 65536 - 1023 * 1024 // 2),
    "window 4096 of 16384": (16384, (4095, 0), 4096 * 16384 - 4095 * 4096 // 2),
}


def tensors(length: int, count: int) -> list[Tensor]:
    return [torch.randn(1, length, HEADS, DIM) for _ in range(count)]


def operator(length: int, causal: bool) -> Pair:
    """One bare call, forward and backward."""
    aten = torch.ops.aten
    q, k, v, dout = (x.transpose(1, 2) for x in tensors(length, 4))

    def forward() -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=SCALE)

    out, lse = forward()
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return forward, lambda: backward(dout, q, k, v, out, lse, 0.0, causal, scale=SCALE)


def tile(length: int, window: Window, kernel: Kernel | None = None, call: Scores | None = None) -> Pair:
    """One tile of a kernel, sdpa unless named, folded into a result that is there and added to gradients that are."""
    q, k, v, dout = tensors(length, 4)
    kernel, acc = kernel or Sdpa(), Partial.empty(1, length, HEADS, DIM, torch.float32, "cpu")
    scores = TileScores(window, SCALE)
    if call is not None:
        at = torch.arange(length)
        scores = TileScores(window, SCALE, call.softcap, call, Place(slice(0, length), at, at, slice(0, HEADS)))
    kernel.forward_tile(q, k, v, scores, acc, fresh=True)
    lse = acc.lse.float()
    rows = Rows(q, dout, acc.out.clone(), lse, (dout * acc.out).sum(-1).transpose(1, 2), None)
    grads = Grads(*(torch.zeros_like(x) for x in (q, k, v)))
    return (
        lambda: kernel.forward_tile(q, k, v, scores, acc, fresh=False),
        lambda: kernel.backward_tile(rows, k, v, scores, grads),
    )


def rates(pairs: dict[str, int], cases: dict[str, Pair], rounds: int) -> list[dict[str, Any]]:
    """GFLOP/s of the cases, all in one run."""
    calls = {f"{name} {way}": call for name, pair in cases.items() for way, call in zip("fb", pair, strict=True)}
    seconds = medians(interleaved(calls, rounds))
    rows = []
    for name in cases:
        flop, forward, backward = 4 * pairs[name] * HEADS * DIM / 1e9, seconds[f"{name} f"], seconds[f"{name} b"]
        both = 3.5 * flop / (forward + backward)
        rows.append({"case": name, "forward": flop / forward, "backward": 2.5 * flop / backward, "both": both})
    return rows


def main(rounds: int = 3, json: str = "kernels-cpu") -> None:
    """Measure, print and write JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        area = {name: pairs for name, (_, _, pairs) in TILES.items()}
        bare = "operator, causal 8192"
        base = operator(8192, True)
        table: list[dict[str, Any]] = []
        for name, (length, window, _) in TILES.items():
            reference, row = rates(area | {bare: area["causal 8192"]}, {bare: base, name: tile(length, window)}, rounds)
            row["both_of_operator"] = row["both"] / reference["both"]
            table += [row] if table else [reference, row]
            print(f"{name:22}" + "".join(f" {key} {value:6.2f}" for key, value in row.items() if key != "case"))
    write(json, {"unit": "GFLOP/s by exact area", "heads": HEADS, "head_dim": DIM, "rows": table})


if __name__ == "__main__":
    typer.run(main)
