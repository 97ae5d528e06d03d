"""What every benchmark shares: ranks as processes, interleaved timing, the machine line, the JSON."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, accelerator, versions and commit: what a figure belongs to."""
    names = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    flags = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": f"{len(names)} x {names[0] if names else platform.processor()}",
        "simd": next((s for s in ("amx_tile", "avx512f", "avx2") if s in flags), "unknown"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def write(name: str, result: dict[str, Any]) -> Path:
    """``results/NAME.json`` with the machine, the command and the date."""
    path = store(name, head() | result)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def head() -> dict[str, Any]:
    """What a result begins with: the command, the date and the machine."""
    command = f"python -m {_module()} {' '.join(sys.argv[1:])}".strip()
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine()}


def store(name: str, result: dict[str, Any]) -> Path:
    """``results/NAME.json``, whole at any moment, whoever ends this process."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    return path


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def on_processes(fn: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """``fn(rank, *args)`` on each of ``world_size`` gloo processes of one thread; rank 0's result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_child, (fn, world_size, folder, args), nprocs=world_size)  # type: ignore[attr-defined]
        return torch.load(f"{folder}/result", weights_only=False)


def _child(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    result = fn(rank, *args)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.destroy_process_group()
    gc.collect()  # the last reference to the group ends its threads, which must not see the interpreter go


Seconds = dict[str, list[float]]


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> Seconds:
    """Seconds of each case by round, the cases taking turns; with ranks, the slowest rank of each round."""
    seconds: Seconds = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            case()
            spent = torch.tensor(time.perf_counter() - start)
            if dist.is_initialized():
                dist.all_reduce(spent, dist.ReduceOp.MAX)
            if number:  # the first round warms up
                seconds[name].append(float(spent))
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """Median over the rounds of one case's seconds over another's: a machine that changes speed between rounds, as
    shared ones do, changes both."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
