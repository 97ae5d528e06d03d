"""The main job: trains a small decoder on bytes of text at long context, or on recall, each sequence sharded over
processes.

    torchrun --standalone --nproc-per-node 2 -m launch.pretrain --config cpu-128k

Exit codes of a process: 0 done; 2 bad input, refused with one line; 3 `--verify` found a difference; 4 the
loss is no longer a number; 128 + n stopped by signal n after saving (130 for Ctrl-C). torchrun reports all
but 0 as 1."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launch.config import Config, find_config, load
from launch.processes import World, join
from launch.run import Job, StopSignal, prepare, start, train
from launch.verify import verify

BAD_INPUT, DIFFERENT, NOT_FINITE = 2, 3, 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Train a small decoder on text, its context sharded over all processes that torchrun starts.")
def main(
    config: Annotated[str | None, typer.Option(help="a shipped config or a .toml file [cpu-128k]")] = None,
    data: Annotated[list[str] | None, typer.Option(help="text: a file or directory; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's directory [runs/NAME]")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the run in this directory")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="drop the run's checkpoint")] = False,
    steps: Annotated[int | None, typer.Option(help="how many steps in all")] = None,
    model: Annotated[str | None, typer.Option(help="hf:CONFIG.json: a Transformers model, its weights random")] = None,
    engine: Annotated[str | None, typer.Option(help="ddp or fsdp: how parameters lie on the ranks")] = None,
    data_parallel: Annotated[int | None, typer.Option(help="replicas; the other ranks share a sequence")] = None,
    accumulate: Annotated[int | None, typer.Option(help="sequences of a replica in a step")] = None,
    check: Annotated[bool, typer.Option("--verify", help="do the first step on one rank too, and compare")] = False,
) -> None:
    """See the module."""
    try:
        if resume is not None and (out is not None or overwrite):
            raise ValueError("--resume goes on in its own directory; leave out --out and --overwrite")
        changes = {"steps": steps, "engine": engine, "data_parallel": data_parallel, "accumulate": accumulate}
        settings = choose(config, data, resume, model, changes)
        run = resume or out or Path("runs") / settings.name
        job = prepare(settings, run, resume is not None, overwrite)
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        refuse(BAD_INPUT, error)
    world = join(settings.device)
    try:
        code = run_job(job, world, check)
    finally:
        world.close()
    sys.exit(code)


def choose(
    config: str | None, data: list[str] | None, resume: Path | None, model: str | None, changes: dict[str, Any]
) -> Config:
    """The settings asked for: a resumed run's own unless others are named, with the options put over them."""
    path = find_config(config or "cpu-128k") if resume is None or config else resume / "config.toml"
    if not path.is_file():
        raise ValueError(f"{resume} is no run's directory: it has no config.toml; give the directory of a run")
    given = {name: value for name, value in changes.items() if value is not None}
    if data:
        given["data"] = tuple(data)
    if model is not None:
        prefix, _, file = model.partition(":")
        if prefix != "hf" or not Path(file).is_file():
            raise ValueError(f"--model {model}: give hf: and the path of a Transformers config.json that exists")
        given.update(hf=file, model=None, masks=())
        given.setdefault("layout", "auto")  # the config's suits its own masks
    settings = replace(load(path), **given)
    # a run may go on from elsewhere
    where: dict[str, Any] = {"data": tuple(str(Path(path).resolve()) for path in settings.data)}
    if settings.hf:
        where["hf"] = str(Path(settings.hf).resolve())
    return replace(settings, **where)


def run_job(job: Job, world: World, check: bool) -> int:
    """Runs the job; returns the exit code."""
    try:
        trainer = start(job, world)
    except (ValueError, NotImplementedError) as error:
        refuse(BAD_INPUT, error)
    stop = StopSignal()
    try:
        if check:
            comparison = verify(job, trainer)
            if world.rank == 0:
                print(comparison, flush=True)
            if not comparison.passed:
                return DIFFERENT
        done = train(job, trainer, stop)
    except FloatingPointError as error:
        refuse(NOT_FINITE, error)
    except (ValueError, NotImplementedError, OSError) as error:
        refuse(BAD_INPUT, error)
    return 0 if done else 128 + (stop.number or signal.SIGINT)


def refuse(code: int, error: Exception) -> NoReturn:
    """Ends this process with one line on stderr, printed once per machine. The other ranks wait a little:
    torchrun ends all of them as soon as one is gone, which must not be before the line is out."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.exit(code)


if __name__ == "__main__":
    app()
