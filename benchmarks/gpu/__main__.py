"""The command: see the package."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks.common import head, store
from benchmarks.gpu.bare import find_bare, versions
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.runner import run
from benchmarks.gpu.sizes import DRY, FULL
from ringattn.kernels.rates import slug


def main() -> int:
    """The exit code: 1 where a case has failed."""
    arguments = parse()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    if arguments.dry:
        bench = Bench(DRY, find_bare(DRY.device))
        failed = run(chosen, bench, arguments.seconds, keep=lambda result: None)
        print("a dry run: none of these figures says anything")
        return int(failed)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure; --dry shows whether the benchmark runs")
        return 0
    chip = slug(torch.cuda.get_device_name())
    name = arguments.json or f"gpu-{chip}{'-part' if arguments.only else ''}"
    bench = Bench(FULL, find_bare(FULL.device))
    about = {**head(), "versions": versions(), "bare": bench.bare.name}

    def keep(result: dict[str, Any]) -> None:
        path = store(name, about | result)
        if result["done"]:
            print(f"wrote {path}")

    return int(run(chosen, bench, arguments.seconds, keep))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; writes nothing")
    parser.add_argument("--only", action="append", default=[], choices=names, help="this case; may be repeated")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all cases together [240]")
    parser.add_argument("--json", default="", help="results/NAME.json [gpu-CHIP, or gpu-CHIP-part with --only]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
