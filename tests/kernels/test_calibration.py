"""Calibration: at tiny sizes on the CPU, and what it writes is what contexts read."""

import torch
from typer.testing import CliRunner

from ringattn.cli.main import app
from ringattn.cli.rates import write
from ringattn.kernels import KERNELS
from ringattn.kernels.calibration import Sizes, calibrate
from ringattn.kernels.rates import Kind, rates_of

TINY = Sizes((16, 32), (8,), (8,), 64, 4, 2, 1, 8, torch.float32, 0.0)


def test_what_is_measured_is_what_contexts_read(tmp_path):
    lines = []
    kernels = [kernel for kernel in KERNELS if "cpu" not in kernel.named_only]
    rates = calibrate(torch.device("cpu"), kernels, TINY, lines.append)
    assert set(rates) >= {"sdpa", "blockwise", "reference"} and "flash4" not in rates
    assert any("flash4" in line and "cannot compute" in line for line in lines), "what is left out is said"
    path = write(tmp_path / "here" / "rates.json", "NVIDIA H200", rates)
    known = rates_of("NVIDIA H200", str(path))
    assert "NVIDIA H200" in known.source
    for kind in (Kind("full", 16), Kind("causal", 32), Kind("window", 7), Kind("stack", 4)):
        for backward in (False, True):
            assert known.rate("sdpa", kind, backward) > 1e6
    assert set(rates["sdpa"]) == {"full", "causal", "band", "window", "stack"}
    assert not list(path.parent.glob("*.part"))


def test_without_a_gpu_there_is_nothing_to_calibrate():
    if not torch.cuda.is_available():
        done = CliRunner().invoke(app, ["calibrate"])
        assert done.exit_code == 2 and "no CUDA device here" in done.output
