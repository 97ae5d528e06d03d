"""How long a context fits one process: the longest whose step (forward, backward, AdamW) stays within 8 GiB.

The model is a Llama's shape: 4 layers of width 1,024, 16 heads over 4 KV heads, an inner width of 2,816, a vocabulary
of 32,000, fp32, AdamW, whose state is there when the measured step begins. Each way is tried in processes of their own.
What counts is the largest resident set of the whole process (VmHWM), interpreter, PyTorch and all: what is resident is
what a machine must have, while limits on address space (RLIMIT_AS, RLIMIT_DATA) also count what nobody has touched.
RLIMIT_DATA ends trials that go far beyond. What is offloaded is written through and dropped from the page cache.

The mask is a window of 256 tokens, whose attention needs as much memory as a causal one's, and minutes less. For the
same reason matrix products are not multiplied but only written, unless --products is given: a product's operands and
results lie in memory all the same. The longest context is searched by the straight line through what was measured.

    python -m benchmarks.reach [--folder /scratch] [--products]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringattn
from benchmarks.common import write
from benchmarks.memory import status
from launch.config import ModelConfig
from launch.model import Decoder, Layer, Norm
from ringattn.integrations.checkpointing import keep_attention
from ringattn.loss import linear_token_mean, shift_labels, token_mean

LIMIT = 8 << 30
BEYOND = 10 << 30  # where a trial ends, whatever is resident of it
STEP = 2048  # tokens that lengths are multiples of
VOCABULARY, WINDOW = 32_000, 256
MODEL = ModelConfig(1024, 4, 16, 4, 64, 2816)
# glibc keeps freed memory below a threshold that grows, up to 32 MiB: with a fixed one all is given back
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Way:
    """How a step saves memory. ``guess``: bytes a token, to begin the search with."""

    guess: int
    loss_chunks: int = 1
    recompute: bool = False
    tiles: int = 0
    offload: bool = False


WAYS = {
    "plain": Way(650_000),
    "+ loss in chunks": Way(300_000, 64),
    "+ recompute": Way(140_000, 64, recompute=True),
    "+ tiled": Way(70_000, 64, recompute=True, tiles=64),
    "+ offload": Way(32_000, 64, tiles=64, offload=True),
    "offload alone": Way(100_000, 64, recompute=True, offload=True),
}
WITHOUT, WITH = "+ recompute", "+ offload"


class Written(torch.autograd.Function):
    """A linear map whose products are memory that was written to, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.size(0)).fill_(0.01)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x).fill_(0.01), torch.empty_like(weight).fill_(0.01)


class WrittenLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Written.apply(x, self.weight)


class Llama(nn.Module):
    """The job's layers with a vocabulary of their own."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.config = way, MODEL
        self.embedding = nn.Embedding(VOCABULARY, MODEL.d_model)
        self.layers = nn.ModuleList(Layer(MODEL, i, way.tiles) for i in range(MODEL.num_layers))
        self.norm = Norm(MODEL.d_model, eps=1e-6)
        self.head = nn.Linear(MODEL.d_model, VOCABULARY, bias=False)

    rotation = Decoder.rotation

    def forward(self, tokens: Tensor, labels: Tensor, cp: ringattn.ContextParallel) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ringattn.attention(q, k, v, cp=cp)

        rotation, x = self.rotation(cp.position_ids), self.embedding(tokens)  # type: ignore[arg-type]
        for layer in self.layers:
            if self.way.recompute:
                x = checkpoint(layer, x, rotation, attend, use_reentrant=False, context_fn=keep_attention())
            else:
                x = layer(x, rotation, attend)
        x = self.norm(x)
        if self.way.loss_chunks == 1:
            return token_mean(self.head(x), labels)
        return linear_token_mean(x, self.head, labels, chunks=self.way.loss_chunks)


def trial(name: str, seqlen: int, folder: str, products: bool) -> None:
    """One step of so many tokens; prints its peak in bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (BEYOND, BEYOND))
    way = WAYS[name]
    model = Llama(way)
    if not products:
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                module.__class__ = WrittenLinear
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cp = ringattn.ContextParallel(None, STEP // 8, mask=ringattn.sliding_window(WINDOW - 1))
    for length in (STEP // 8, seqlen):
        cp = cp.replace(seqlen=length)
        tokens = torch.randint(VOCABULARY, (1, length))
        start = time.perf_counter()
        with ringattn.offloaded(folder if way.offload else False):
            loss = model(tokens, shift_labels(tokens), cp)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"peak": status("VmHWM"), "seconds": time.perf_counter() - start, "loss": float(loss.detach())}))


def peak_of(name: str, seqlen: int, folder: str, products: bool) -> dict[str, Any]:
    """The same in a process of its own; a peak beyond all bounds where it fails for want of memory."""
    command = [sys.executable, "-m", "benchmarks.reach", "--one", name, "--seqlen", str(seqlen), "--folder", folder]
    done = subprocess.run(
        [*command, *(["--products"] if products else [])],
        env=os.environ | MALLOC, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and "memory" not in done.stderr:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout) if not done.returncode else {"peak": None}
    peak = found["peak"]
    print(f"  {name:<18} {seqlen:>7} tokens: {'too much' if peak is None else f'{peak / 2**30:.2f} GiB'}", flush=True)
    return {"seqlen": seqlen, **found}


def longest(name: str, folder: str, products: bool) -> dict[str, Any]:
    """The longest context of a way, with a step more measured to be too long."""
    fits: dict[str, Any] = {"seqlen": 0, "peak": 5 << 29}  # parameters, gradients, moments and the interpreter
    over: dict[str, Any] | None = None
    slope, trials = float(WAYS[name].guess), []
    while over is None or over["seqlen"] - fits["seqlen"] > STEP:
        guess = fits["seqlen"] + int((LIMIT - fits["peak"]) / slope) // STEP * STEP
        least, most = fits["seqlen"] + STEP, over["seqlen"] - STEP if over else 1 << 22
        found = peak_of(name, max(least, min(guess, most)), folder, products)
        trials.append(found)
        if found["peak"] is not None and len(trials) > 1 and (found["peak"] - fits["peak"]):
            slope = (found["peak"] - fits["peak"]) / (found["seqlen"] - fits["seqlen"])
        if found["peak"] is not None and found["peak"] <= LIMIT:
            fits = found
        else:
            over = found
    return {"longest": fits["seqlen"], "trials": trials}


def main(
    one: str = "", seqlen: int = 0, folder: str = "", products: bool = False, json: str = "reach-cpu", only: str = ""
) -> None:
    """Search, print and write JSON. ``one``, ``seqlen``: a single trial."""
    with tempfile.TemporaryDirectory() as own:
        folder = folder or own
        if one:
            return trial(one, seqlen, folder, products)
        found: dict[str, Any] = {}
        for name in [x for x in dict.fromkeys((WITHOUT, WITH, *WAYS)) if not only or x in only.split(",")]:
            found[name] = longest(name, folder, products)
            print(f"{name:<18} {found[name]['longest']:>8,} tokens", flush=True)
            result = {"limit_bytes": LIMIT, "step": STEP, "window": WINDOW, "products": products, "ways": found}
            if WITHOUT in found and WITH in found:
                result["ratio"] = found[WITH]["longest"] / found[WITHOUT]["longest"]
            write(json, result)


if __name__ == "__main__":
    typer.run(main)
