"""`ringattn check` without a model: one line a finding, and all that every rank said as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ringattn.check import CheckError
from ringattn.check.machine import MachineReport, check_machine
from ringattn.check.place import HeardByAll, Place, enter
from ringattn.check.tally import RankLost
from ringattn.comm.started import end_all


def check_here(timeout: float, output: Path | None, console: Console) -> int:
    """Checks the machine as one of its launcher's ranks. Returns the exit status, the same on all of them."""

    def told(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        return _checked(timeout, output, told)
    except HeardByAll as error:
        if os.environ["RANK"] == "0":
            told(f"error: {error}")
        return 2
    except (CheckError, RankLost) as error:
        told(f"error: {error}")
        end_all()
        return 2
    except BaseException:
        end_all()
        raise


def _checked(timeout: float, output: Path | None, told: Callable[[str], None]) -> int:
    place = enter(timeout)
    report = check_machine(place, lambda finding: None if place.rank else told(str(finding)))
    return place.leave(0 if place.rank else _ended(report, place, output, told))


def _ended(report: MachineReport, place: Place, output: Path | None, told: Callable[[str], None]) -> int:
    """What rank 0 says and writes at the end; the exit status."""
    status = 0 if report.ok else 1
    if report.stopped:
        told(f"stopped: {report.stopped}")
    ranks = f"{place.size} rank{'s' if place.size > 1 else ''}"
    told(f"{'all is well' if report.ok else 'see what fails'}: {ranks}, {report.seconds:.1f} s")
    if output is not None:
        try:
            output.write_text(json.dumps({"exit_status": status, **asdict(report)}, indent=1) + "\n")
        except OSError as error:
            told(f"error: --json {output} cannot be written: {error.strerror}; give another path")
            return 2
    return status
