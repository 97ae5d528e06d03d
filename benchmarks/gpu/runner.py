"""Runs cases one after the other, and hands on all rows so far after each."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Figure, Row

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """``measure`` yields one figure at a time, to be measured. ``seconds``: what they may take, as a part of what all
    cases may take; the case ends after the figure in which they have passed."""

    name: str
    seconds: float
    measure: Callable[[Bench], Iterator[Figure]]


def run(cases: Sequence[Case], bench: Bench, seconds: float, keep: Keep) -> bool:
    """All cases, as far as the seconds last; whether a figure has failed. What is left out is in the result too."""
    torch.manual_seed(0)
    share = min(1.0, seconds / sum(case.seconds for case in cases))
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"unit": "TFLOP/s by exact area", "done": False, "cases": {}}
    failed = False
    for case in cases:
        entry: dict[str, Any] = {"rows": []}
        result["cases"][case.name] = entry
        if time.monotonic() > end:
            entry["left_out"] = "no time was left"
            print(f"== {case.name}: left out, no time was left", flush=True)
            continue
        print(f"== {case.name}", flush=True)
        begun = time.monotonic()
        for what, measure in case.measure(bench):
            row = what | _attempt(measure)
            entry["rows"].append(row)
            entry["seconds"] = round(time.monotonic() - begun, 1)
            failed |= "error" in row
            print(json.dumps(row), flush=True)
            keep(result)
            if bench.on_gpu:
                torch.cuda.empty_cache()
            if time.monotonic() > min(end, begun + share * case.seconds):
                entry["cut_off"] = "its seconds have passed; figures that would have come are left out"
                print(f"{case.name}: {entry['cut_off']}", flush=True)
                break
        print(f"{case.name}: {entry.get('seconds')} s", flush=True)
    result["done"] = True
    keep(result)
    return failed


def _attempt(measure: Callable[[], Row]) -> Row:
    """A figure, or the error in its place: the next one may be had."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
