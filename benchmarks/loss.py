"""Memory and time of the loss with a large vocabulary: all logits at once, or in chunks.

Three ways: ``whole`` is ``token_mean(head(hidden))``, ``chunked`` is ``linear_token_mean``, which computes each chunk's
logits twice, and ``in forward`` is the alternative to it, which computes gradients during forward, keeps them, and so
computes logits once. A step is forward and backward of a small decoder; parameters, gradients and Adam's two moments
are there too.

Memory at full size is counted, not measured: fake tensors run the step, and each storage's bytes are added when it is
made and subtracted when it is freed. For the loss alone, at a size that fits, the same count stands beside what the
operating system saw. Time too is that of the loss alone, one thread, cases taking turns.

    python -m benchmarks.loss
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import interleaved, medians, on_processes, ratio, write
from benchmarks.memory import status
from ringattn.loss import IGNORED, linear_token_mean, token_mean

WIDTH, HEADS, LAYERS, VOCABULARY = 1024, 16, 2, 128_000
Mean = Callable[[Tensor, nn.Linear, Tensor], Tensor]


class InForward(torch.autograd.Function):
    """The mean loss, and in the same pass over chunks its gradients, which backward only scales."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int) -> Tensor:
        total, of_weight, of_hidden = hidden.new_zeros(()), torch.zeros_like(weight), []
        leaf = weight.detach().requires_grad_()
        for rows, targets in zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                part = F.cross_entropy(F.linear(rows, leaf).float(), targets, ignore_index=IGNORED, reduction="sum")
                grads = torch.autograd.grad(part, (rows, leaf))
            total += part.detach()
            of_hidden.append(grads[0])
            of_weight += grads[1]
        count = (labels != IGNORED).sum()
        ctx.save_for_backward(torch.cat(of_hidden).div_(count), of_weight.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden.mul_(grad), of_weight.mul_(grad), None, None


def whole(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return token_mean(logits, labels)


def chunked(hidden: Tensor, head: nn.Linear, labels: Tensor, chunks: int = 8) -> Tensor:
    return linear_token_mean(hidden, head, labels, chunks=chunks)


def in_forward(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return InForward.apply(hidden.flatten(0, 1), head.weight, labels.flatten(), 8)


WAYS: dict[str, Mean] = {"whole": whole, "chunked": chunked, "in forward": in_forward}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, mean: Mean) -> Tensor:
        return mean(self.norm(self.layers(self.embed(tokens))), self.head, labels)


def step(mean: Mean, tokens: int, low: bool) -> None:
    """A model, its gradients and Adam's moments are made; then forward and backward."""
    model = Decoder(VOCABULARY)
    held = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randint(VOCABULARY, (1, tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = model(x, x, mean)
    loss.backward()
    del held


class Live(TorchDispatchMode):
    """Bytes of the storages alive now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def loss_alone(mean: Mean, tokens: int, width: int, vocabulary: int) -> Callable[[], None]:
    hidden, head = torch.randn(1, tokens, width, requires_grad=True), nn.Linear(width, vocabulary, bias=False)
    labels = torch.randint(vocabulary, (1, tokens))
    return lambda: mean(hidden, head, labels).backward()


def counted(work: Callable[[], object]) -> int:
    """Peak bytes of what ``work`` makes of fake tensors."""
    with FakeTensorMode(), Live() as live:
        work()
    return live.peak


def measured(rank: int, way: str, *size: int) -> int:
    """Peak resident bytes of this process for the loss and its inputs."""
    before = status("VmRSS")
    work = loss_alone(WAYS[way], *size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    work()
    return status("VmHWM") - before


def timed(rank: int, rounds: int, *size: int) -> dict[str, Any]:
    """Seconds of the loss, forward and backward."""
    seconds = interleaved({name: loss_alone(mean, *size) for name, mean in WAYS.items()}, rounds)
    over = {name: ratio(seconds, name, "whole") for name in WAYS}
    return {"tokens": size[0], "width": size[1], "vocabulary": size[2], "seconds": medians(seconds), "over_whole": over}


def of_whole_step(tokens: int, low: bool) -> dict[str, Any]:
    ways = WAYS | {"chunks=32": lambda hidden, head, labels: chunked(hidden, head, labels, 32)}
    peaks = {name: counted(lambda mean=mean: step(mean, tokens, low)) for name, mean in ways.items()}
    dtype = "bf16 autocast" if low else "fp32"
    print(f"a step of {tokens} tokens, {dtype}, counted:")
    for name, peak in peaks.items():
        print(f"  {name:<12} {peak / 1e9:6.2f} GB, whole takes {peaks['whole'] / peak:.2f} times that")
    over = {name: peaks["whole"] / peak for name, peak in peaks.items()}
    return {"tokens": tokens, "dtype": dtype, "counted_bytes": peaks, "whole_over": over}


def of_loss_alone(tokens: int, width: int) -> dict[str, Any]:
    size = tokens, width, VOCABULARY
    counts = {name: counted(lambda mean=mean: loss_alone(mean, *size)()) for name, mean in WAYS.items()}
    peaks = {name: on_processes(measured, 1, name, *size) for name in WAYS}
    print(f"the loss alone, {tokens} tokens, width {width}, measured:")
    for name, peak in peaks.items():
        print(
            f"  {name:<12} {peak / 1e9:6.2f} GB resident, {peak / counts[name]:.3f} of the count; "
            f"whole takes {peaks['whole'] / peak:.2f} times that"
        )
    over = {name: peaks["whole"] / peak for name, peak in peaks.items()}
    return {"tokens": tokens, "width": width, "counted_bytes": counts, "measured_bytes": peaks, "whole_over": over}


def main(json: str = "loss-cpu", tokens: int = 32768, measured_tokens: int = 3072, rounds: int = 5) -> None:
    """Count, measure, time, print and write JSON."""
    steps = [of_whole_step(tokens, low) for low in (False, True)]
    alone = of_loss_alone(measured_tokens, 256)
    times = on_processes(timed, 1, rounds, 2048, WIDTH, 32_000)
    print("the loss alone, 2048 tokens, vocabulary 32,000:")
    for name, seconds in times["seconds"].items():
        print(f"  {name:<12} {seconds:6.2f} s, {times['over_whole'][name]:.3f} of whole")
    model = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY}
    write(json, {"model": model, "step": steps, "loss_alone": alone, "time": times})


if __name__ == "__main__":
    typer.run(main)
