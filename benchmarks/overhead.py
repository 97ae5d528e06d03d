"""What a call costs beyond its attention, where there is next to none: 16 tokens, 2 heads of 16, causal, fp32.

Time on one rank, beside `scaled_dot_product_attention` on the same tensors, the two taking turns; and the calls that
the interpreter makes, Python's and C's, which noise cannot touch: of a call on one rank, and of one further step of a
ring whose ranks are threads.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from benchmarks.common import interleaved, medians, ratio, write

TOKENS, HEADS, DIM = 16, 2, 16
ROUNDS, REPEATS = 60, 50
WORLDS = (5, 8)  # of the ring: as many rounds of messages end a call
RUNS = 8  # a thread that waits makes calls while it does; the fewest are the call's own


def main(json: str = "overhead-cpu") -> None:
    """Measure, print and write JSON."""
    torch.set_num_threads(1)
    result = {"one rank": one_rank(), "a further step of a ring, calls of both directions": step_calls()}
    for name, figures in result.items():
        print(name, figures)
    write(json, result)


def one_rank() -> dict[str, Any]:
    cp = ringattn.ContextParallel(None, TOKENS)
    leaves = [torch.randn(1, TOKENS, HEADS, DIM, requires_grad=True) for _ in range(3)]
    dout = torch.randn(1, TOKENS, HEADS, DIM)

    def ours() -> torch.Tensor:
        return ringattn.attention(*leaves, cp=cp)

    def theirs() -> torch.Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True).transpose(1, 2)

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            forward().backward(dout)

        return step

    assert torch.allclose(ours(), theirs(), atol=1e-5)
    cases: dict[str, Callable[[], object]] = {
        "forward": ours, "sdpa forward": theirs, "both": both(ours), "sdpa both": both(theirs),
    }  # fmt: skip
    seconds = interleaved({name: _repeated(case) for name, case in cases.items()}, ROUNDS)
    return {
        "microseconds": {name: round(1e6 * spent / REPEATS, 1) for name, spent in medians(seconds).items()},
        "forward over sdpa": round(ratio(seconds, "forward", "sdpa forward"), 2),
        "forward + backward over sdpa": round(ratio(seconds, "both", "sdpa both"), 2),
        "calls": {name: calls(case) for name, case in cases.items()},
    }


def _repeated(case: Callable[[], object]) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(REPEATS):
            case()

    return turn


def step_calls() -> float:
    """Calls of one rank's forward and backward that one more step of a ring adds."""
    few, many = (_ring_calls(world) for world in WORLDS)
    return (many - few) / (WORLDS[1] - WORLDS[0])


def _ring_calls(world: int) -> int:
    options = ringattn.Options(kv_bytes=2 * TOKENS * HEADS * 2 * DIM * 4)  # two shards: one hop a step

    def rank(transport: ringattn.comm.Transport) -> int:
        cp = ringattn.ContextParallel(
            transport, world * TOKENS, schedule="ring", layout="striped", mask=ringattn.full(), options=options
        )
        leaves = [torch.randn(1, TOKENS, HEADS, DIM, requires_grad=True) for _ in range(3)]
        dout = torch.randn(1, TOKENS, HEADS, DIM)
        return min(calls(lambda: ringattn.attention(*leaves, cp=cp).backward(dout)) for _ in range(RUNS))

    return min(ringattn.Loopback(world).run(rank))


def calls(case: Callable[[], object]) -> int:
    """Calls that the second run of ``case`` makes in this thread, but for those of :mod:`threading`: how often a thread
    wakes others, or is woken, is a matter of the machine."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename != threading.__file__

    case()
    sys.setprofile(profile)
    try:
        case()
    finally:
        sys.setprofile(None)
    return count - 2  # of case itself, and of sys.setprofile


if __name__ == "__main__":
    typer.run(main)
