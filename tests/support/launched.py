"""Jobs under torchrun: started, watched through their board, and hit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.support.clock import patience

TIMEOUT = 5.0  # of the jobs


@dataclass
class Launched:
    """A job under torchrun, and what it has said."""

    ranks: int
    run: Path
    arguments: list[str]
    restarts: int = 0
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        launcher += ["--max-restarts", str(self.restarts), "-m", "launch.pretrain", "--out", str(self.run)]
        self.said = self.run.with_suffix(".said")
        with open(self.said, "w") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [*launcher, *self.arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)

    def lines(self) -> list[str]:
        return self.said.read_text(errors="replace").splitlines()

    def members(self, attempt: int) -> dict[int, int]:
        """Process ids by rank, once all ranks of an attempt are there and listen."""
        while True:
            found = {}
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    status = (path / "status").read_text()
                    if f"PPid:\t{self.process.pid}\n" not in status:
                        continue
                    variables = dict(
                        entry.split("=", 1) for entry in (path / "environ").read_text().split("\0") if "=" in entry
                    )
                except OSError:
                    continue  # it has just ended
                caught = int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16)
                if variables.get("TORCHELASTIC_RESTART_COUNT") == str(attempt) and caught >> (signal.SIGTERM - 1) & 1:
                    found[int(variables["RANK"])] = int(path.name)
                    self.port = int(variables["MASTER_PORT"])
            if len(found) == self.ranks:
                return found
            assert self.process.poll() is None, "\n".join(self.lines())
            time.sleep(0.01)

    def phases(self, attempt: int, rank: int) -> Iterator[str]:
        """What a rank says it is doing, again and again."""
        store = dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=10))
        board = dist.PrefixStore("board", dist.PrefixStore(f"attempt {attempt}", store))
        key = f"phase/{rank}"
        while self.process.poll() is None:
            yield board.get(key).decode() if board.check([key]) else "before"

    def finish(self, seconds: float = 180) -> list[str]:
        """Waits for the end, which must be a good one."""
        try:
            self.process.wait(patience(seconds))
        finally:
            self.process.kill()
        assert self.process.returncode == 0, "\n".join(self.lines())
        return self.lines()


def hit(job: Launched, attempt: int, phase: str, number: int, draw: random.Random) -> tuple[int, str]:
    """Kills or freezes a rank of an attempt, and asserts that all others name it. Returns it, and what it was at."""
    members = job.members(attempt)
    victim, after = draw.randrange(job.ranks), draw.choice((0, 0, draw.random() * 0.2))
    at = "any moment"
    if phase == "any moment":
        time.sleep(draw.random() * 5)
    else:
        step = draw.randrange(4)
        seen = set()
        begin = time.monotonic()
        for at in job.phases(attempt, victim):
            seen.add(at)
            if re.search(phase, at) and (
                len({s for s in seen if re.search(phase, s)}) > step or " step " not in f" {at}"
            ):
                break
            if time.monotonic() - begin > patience(60):
                raise AssertionError(f"rank {victim} never came to {phase!r}\n" + "\n".join(job.lines()[-40:]))
    time.sleep(after if number == signal.SIGKILL else 0)
    before = len(job.lines())
    os.kill(members[victim], number)
    survivors = set(members) - {victim}
    named = rf"error: rank (\d+): .*\brank {victim} is dead or frozen"
    deadline = time.monotonic() + 2 * TIMEOUT + patience(20)
    said: set[int] = set()
    while said != survivors:
        said = {int(found[1]) for line in job.lines()[before:] if (found := re.search(named, line))}
        assert time.monotonic() < deadline, f"{victim} at {at!r}: named by {said}\n" + "\n".join(job.lines()[before:])
        time.sleep(0.05)
    if number == signal.SIGSTOP:
        os.kill(members[victim], signal.SIGKILL)  # torchrun would do it in half a minute
    return victim, at
