"""Benchmarks: the one for GPUs runs where there is none, and every result says what it was made on."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def results() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry() -> None:
    """The same code at tiny sizes, with every schedule and every kind of row, and no result of it."""
    before = results()
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("matmul", "causal", "schedule ring", "schedule exchange", "schedule gather", "peak_bytes", "a dry run"):
        assert row in done.stdout, row
    assert "nan" not in done.stdout
    assert results() == before


def test_results_are_named_for_what_they_were_made_on() -> None:
    odd = [name for name in results() if not (name.endswith("-cpu.json") or name.startswith("gpu-"))]
    assert not odd, f"{odd}: NAME-cpu.json or gpu-CHIP.json"
