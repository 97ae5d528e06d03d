"""What it costs that every message belongs to a call: this tree against an earlier commit, by default the last one
whose messages did not, two ranks over shared memory, causal, fp32, forward + backward. The two trees take turns.

    python -m benchmarks.calls
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from benchmarks.common import write

RANKS = 2
SIZES = ((256, 100, 30), (4096, 2, 40))  # tokens, calls in a turn, turns

# Each rank of a tree: told to start, it says how long its turn took.
WORKER = """
import sys, time
import torch, torch.distributed as dist
import ringattn

rank, world, tokens, calls, store = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
cp = ringattn.ContextParallel(dist.group.WORLD, int(tokens))
q, k, v, dout = (torch.randn(1, cp.local_seqlen, 4, 64) for _ in range(4))
leaves = [x.requires_grad_() for x in (q, k, v)]

def turn():
    for _ in range(int(calls)):
        for x in leaves:
            x.grad = None
        ringattn.attention(*leaves, cp=cp).backward(dout)

turn()
print("ready", flush=True)
for _ in sys.stdin:
    dist.barrier()
    start = time.perf_counter()
    turn()
    print((time.perf_counter() - start) / int(calls), flush=True)
dist.destroy_process_group()
"""


@contextmanager
def ranks_of(tree: Path, tokens: int, calls: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one tree, ready for a turn."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *map(str, (rank, RANKS, tokens, calls, f"{folder}/store"))],
                env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        try:
            for process in started:
                assert answer(process) == "ready", f"{tree} does not start"
            yield started
        finally:
            for process in started:
                process.communicate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def turn(processes: list[subprocess.Popen[str]]) -> float:
    """Seconds of a call, of the slowest rank."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(answer(process)) for process in processes)


def compare(trees: dict[str, Path], tokens: int, calls: int, turns: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    with ExitStack() as stack:
        started = {name: stack.enter_context(ranks_of(tree, tokens, calls)) for name, tree in trees.items()}
        for number in range(turns):
            # who goes first changes: the one after the other's turn finds the caches and the clock as that left them
            for name in sorted(started, reverse=bool(number % 2)):
                seconds[name].append(turn(started[name]))
    ratios = [now / before for now, before in zip(seconds["now"], seconds["before"], strict=True)]
    return {
        "ranks": RANKS, "seqlen": tokens, "calls": calls, "turns": turns,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "now_over_before": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }  # fmt: skip


def main(commit: str = "1010016", json: str = "calls-cpu") -> None:
    """Measure, print and write JSON."""
    here, result = Path(__file__).parents[1], []
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run(["git", "-C", str(here), "worktree", "add", "-q", "--detach", str(before), commit], check=True)
        try:
            for tokens, calls, turns in SIZES:
                case = compare({"now": here, "before": before}, tokens, calls, turns)
                result.append(case)
                now, then = (1000 * case["seconds"][name] for name in ("now", "before"))
                low, high = case["quartiles"]
                print(
                    f"{tokens} tokens: {now:.2f} ms, at {commit} {then:.2f} ms; median of the turns' ratios "
                    f"{case['now_over_before']:.3f} (half of them within {low:.3f} to {high:.3f})"
                )
        finally:
            subprocess.run(["git", "-C", str(here), "worktree", "remove", "--force", str(before)], check=True)
    write(json, {"against": commit, "cases": result})


if __name__ == "__main__":
    typer.run(main)
