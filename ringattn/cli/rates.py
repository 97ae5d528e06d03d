"""`ringattn calibrate`: the rates of this machine's GPU, in the file where contexts look for them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console

from ringattn.kernels import KERNELS
from ringattn.kernels.calibration import UNIT, Sizes, calibrate
from ringattn.kernels.rates import own_table
from ringattn.version import VERSION


def write_rates(output: Path | None, console: Console) -> Path:
    """Measures and writes.

    Raises ``ValueError`` where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device here, and rates are of one: on a CPU kernel='auto' takes the first kernel that fits"
        )
    device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    kernels = [known for known in KERNELS if known.name != "reference" and "cuda" not in known.named_only]

    def told(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    told(f"{name}: {UNIT}")
    return write(output or own_table(name), name, calibrate(device, kernels, Sizes(), told))


def write(path: Path, name: str, rates: dict[str, dict[str, dict[str, list[float]]]]) -> Path:
    """A table as a file, whole or not at all."""
    source = f"measured on this {name} on {time.strftime('%Y-%m-%d')} by `ringattn calibrate`"
    content = {"source": source, "unit": UNIT, "torch": torch.__version__, "ringattn": VERSION, "rates": rates}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return path
