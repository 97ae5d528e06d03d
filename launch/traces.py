"""Where the time of given steps goes, as Chrome traces (chrome://tracing, Perfetto): one of all that PyTorch does, and
beside it one of the turns of attention's calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import ringattn


@contextmanager
def traced(run: Path, step: int, cp: ringattn.ContextParallel, rank: int, device: torch.device) -> Iterator[None]:
    """Writes `profile/step-N.rankR.json` and `profile/step-N-attention.rankR.json` into `run`. A trace that cannot be
    written is said, and ends nothing."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with cp.profile() as attention, profile(activities=kinds, acc_events=True) as everything:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    folder = run / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attention.save(folder / f"step-{step}-attention.json")
        everything.export_chrome_trace(str(folder / f"step-{step}.rank{rank}.json"))
    except (OSError, RuntimeError) as error:
        print(f"rank {rank}: no trace of step {step}: {error}", flush=True)
