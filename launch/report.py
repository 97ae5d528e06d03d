"""What a run shows and leaves behind: a progress bar (plain lines where there is no terminal), metrics as
JSON lines, a plot, and a closing summary. Rank 0 has one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from launch.checkpoint import write_durably
from launch.config import Config
from launch.flop import peak
from launch.recall import Answers
from launch.rules import shown
from launch.scalars import Scalars
from launch.tables import dump
from launch.training import Counters

FINAL_STEPS = 4  # single steps scatter with the text


@dataclass(frozen=True, slots=True)
class Record:
    """One line of metrics.jsonl. `step` counts from 1, as on the console and in the names of checkpoints. `loss` is the
    mean over all ranks' targets in nats, `grad_norm` its gradient's before clipping, `position` the token of the stream
    at which the step began and `tokens` how many it took, each counted once; `seconds` is the whole step's wall time
    and `waiting_s` what rank 0's attention waited for others. `seqlen` and `documents` are of rank 0's first sequence;
    `accuracy` is the share of right answers in recall, `max_logit` the largest logit of any layer, head and token, in
    the steps that look for it. `start` counts from 1 how often the run was started, or gone on with, before the step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    waiting_s: float
    position: int
    seqlen: int
    documents: int
    accuracy: float | None
    max_logit: float | None = None
    start: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the step."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class RankSummary:
    """What one rank says at the end: its largest memory in bytes, its counters over the steps, and its device."""

    peak_memory: int
    counters: Counters
    device: str = "cpu"


class Report:
    """Writes into `run`: config.toml, metrics.jsonl, plot.png and, where asked for, tensorboard/. A resumed run has
    `done` steps behind it; metrics of later ones, written after the checkpoint by a run that died, are dropped."""

    def __init__(self, run: Path, config: Config, baseline: tuple[str, float], done: int) -> None:
        self.run = run
        self.config = config
        self.baseline = baseline
        self.done = done
        self.console = Console(soft_wrap=True)
        self.records = [record for record in _read(run / "metrics.jsonl") if record.step <= done] if done else []
        self.start = self.records[-1].start + 1 if self.records else 1
        run.mkdir(parents=True, exist_ok=True)
        write_durably(run / "config.toml", dump(config).encode())
        kept = "".join(json.dumps(asdict(record)) + "\n" for record in self.records)
        write_durably(run / "metrics.jsonl", kept.encode())
        self.metrics = open(run / "metrics.jsonl", "a", buffering=1)
        self.scalars = Scalars(run / "tensorboard", done + 1) if config.tensorboard else None
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(config.name, total=config.steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        self.metrics.close()
        if self.scalars is not None:
            self.scalars.close()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(text, markup=False, highlight=False)

    def add(self, record: Record) -> None:
        """Notes one step."""
        record = replace(record, start=self.start)
        self.records.append(record)
        self.metrics.write(json.dumps(asdict(record)) + "\n")
        if self.scalars is not None:
            self.scalars.add(record.step, {**asdict(record), "tokens_per_s": record.tokens_per_s})
        figures = f"loss {record.loss:.3f}  {record.tokens_per_s:,.0f} tokens/s"
        if record.accuracy is not None:
            figures = f"{100 * record.accuracy:.0f} % right  {figures}"
        if record.accuracy is not None or self.config.ramp:
            figures = f"{record.seqlen:,} tokens  {figures}"
        self.progress.update(self.task, completed=record.step, figures=figures)
        if not self.console.is_terminal:
            config = self.config
            left = record.seconds * config.tokens(record.step) / config.at(record.step - 1).tokens_a_step
            ahead = "" if record.step == config.steps else f"  about {left:.0f} s left"
            self.say(f"step {record.step}/{config.steps}  {figures}{ahead}")

    def summarize(self, ranks: Sequence[RankSummary], answers: Sequence[Answers]) -> None:
        """Draws the plot and prints the summary of the steps done since the start or the resume."""
        from launch.plot import draw  # slow to import, and only rank 0 draws

        self.progress.stop()
        lengths = sorted({record.seqlen for record in self.records} if self.config.ramp else {self.config.seqlen})
        span = " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))
        on = f"{len(ranks)} rank{'' if len(ranks) == 1 else 's'}"
        since = f" since step {self.done + 1}" if self.done else ""
        title = f"{self.config.name}: sequences of {span} tokens, on {on}{since}"
        write_durably(self.run / "plot.png", draw(self.records, self.baseline, title))
        table = Table(title=Text(title), show_header=False)
        for name, value in self._rows(ranks):
            table.add_row(name, Text(value))
        for answer in answers:
            table.add_row(answer.name, f"{100 * answer.right:.1f} % of {answer.count} questions answered right")
        self.console.print(table)

    def _rows(self, ranks: Sequence[RankSummary]) -> Iterator[tuple[str, str]]:
        done = [record for record in self.records if record.step > self.done]
        if not done:  # begun anew after its last step
            yield "written to", str(self.run)
            return
        seconds = sum(record.seconds for record in done)
        last = [record.loss for record in self.records[-FINAL_STEPS:]]
        received = sum(rank.counters.received for rank in ranks)
        required = sum(rank.counters.required for rank in ranks)
        waiting = sum(rank.counters.waited for rank in ranks) / (len(ranks) * seconds)
        on_host = " by the hosts; what the devices wait is not measured" if self.config.device == "cuda" else ""
        yield f"loss, mean of the last {len(last)} steps", f"{sum(last) / len(last):.3f} nats a target"
        yield self.baseline[0], f"{self.baseline[1]:.3f} nats a target"
        if self.records[-1].accuracy is not None:
            yield "length reached", f"{self.records[-1].seqlen:,} of {self.config.seqlen:,} tokens"
        steps = f"{len(done)} step{'s' if len(done) > 1 else ''}{f' after step {self.done}' if self.done else ''}"
        yield "time", f"{seconds:.0f} s for {steps}, {seconds / len(done):.2f} s a step"
        yield "throughput", f"{sum(record.tokens for record in done) / seconds:,.0f} tokens/s"
        yield from self._utilisation(ranks, seconds)
        largest = "most allocated by PyTorch" if self.config.device == "cuda" else "largest resident set"
        yield f"{largest}, per rank", ", ".join(f"{rank.peak_memory / 2**30:.2f} GiB" for rank in ranks)
        split = "" if self.config.ulysses == 1 else ", with what heads travel"
        yield "K/V and gradients received", f"{mebibytes(received)}{split}; the masks require {mebibytes(required)}"
        yield "attention waiting for other ranks", f"{100 * waiting:.1f} % of the time{on_host}"
        yield "written to", str(self.run)

    def _utilisation(self, ranks: Sequence[RankSummary], seconds: float) -> Iterator[tuple[str, str]]:
        """Where the model's FLOP and the peak of every device are known, and each rank has one to itself."""
        peaks, done = [peak(rank.device) for rank in ranks], sum(rank.counters.flop for rank in ranks)
        known = [found for found in peaks if found is not None]
        if not done or len(known) < len(ranks) or self.config.dtype != "bfloat16" or self.config.share_gpus:
            return
        rate = done / seconds
        of = f"{rate / len(ranks) / 1e12:,.0f} TFLOP/s of {sum(known) / len(ranks) / 1e12:,.0f} a device"
        yield "model FLOP utilisation", f"{100 * rate / sum(known):.1f} %, {of}"


def mebibytes(count: int) -> str:
    """A number of bytes, readable."""
    return f"{count / 2**20:,.1f} MiB"


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        found = [Record(**json.loads(line)) for line in path.read_text().splitlines() if line.endswith("}")]
        if found and found[0].step == 0:  # of an earlier version, which counted from 0 here
            found = [replace(record, step=record.step + 1) for record in found]
        for record in found:
            for name, value in asdict(record).items():
                if type(value) not in (int, float) and (name, value) not in (("accuracy", None), ("max_logit", None)):
                    raise ValueError(f"{name} is {shown(value)}")
        if any(after.step <= before.step for before, after in pairwise(found)):
            raise ValueError("its steps do not rise")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}); move it away to go on") from None
    return found
