"""What `launch.pretrain` does, from its arguments to an exit code; and how a process that cannot go on ends, with the
same line on every rank."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.board import FAILED, GRACE, LOST, REFUSED, end_lost
from launch.config import Config, find_config, load
from launch.processes import REFUSALS, World, join, meet
from launch.rules import shown
from launch.run import Job, prepare, start, train
from launch.stopping import StopSignal
from launch.verify import NOTHING, verify
from ringattn.comm.started import by_mpi

BAD_INPUT, DIFFERENT, NOT_FINITE = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of the command; `changes` are put over the config."""

    config: str | None
    data: tuple[str, ...]
    out: Path | None
    resume: Path | None
    overwrite: bool
    model: str | None
    changes: dict[str, Any]
    check: bool


def perform(request: Request, stop: StopSignal | None) -> int:
    """Does the job; returns the exit code."""
    world = World()
    try:
        meet(world, stop)
        code = _perform(request, world, stop)
    except Exception as error:
        return fail(error, world)
    world.close()
    return code


def _perform(request: Request, world: World, stop: StopSignal | None) -> int:
    world.at("reading the config, the text and the model")
    prepared: list[Job] = []
    world.together(lambda: prepared.append(_prepare(request, world)))
    (job,) = prepared
    join(world, job.config.device, job.config.timeout, job.config.share_gpus)
    return run_job(job, world, request.check, stop)


def _prepare(request: Request, world: World) -> Job:
    """All that a process can check alone."""
    if request.resume is not None and (request.out is not None or request.overwrite):
        raise ValueError("--resume goes on in its own directory; leave out --out and --overwrite")
    settings = choose(request)
    if world.board is not None:
        world.board.timeout = settings.timeout
    run = request.resume or request.out or Path("runs") / settings.name
    return prepare(settings, run, request.resume is not None, request.overwrite, world.attempt)


def choose(request: Request) -> Config:
    """The settings asked for: a resumed run's own unless others are named, with the options put over them."""
    resume, config = request.resume, request.config
    path = find_config(config or "cpu-128k") if resume is None or config else resume / "config.toml"
    if not path.is_file():
        raise ValueError(f"{resume} is no run's directory: it has no config.toml; give the directory of a run")
    given = dict(request.changes)
    if "" in request.data:
        raise ValueError("--data '' names nothing; give a file or directory, . for this one")
    if request.data:
        given["data"] = request.data
    if request.model is not None:
        prefix, _, file = request.model.partition(":")
        if prefix != "hf" or not Path(file).is_file():
            raise ValueError(
                f"--model {shown(request.model)[1:-1]}: give hf: and the path of a Transformers config.json that exists"
            )
        given.update(hf=file, model=None, masks=())
        given.setdefault("layout", "auto")  # the config's suits its own masks
    settings = replace(load(path), **given)
    # a run may go on from elsewhere
    where: dict[str, Any] = {"data": tuple(os.path.abspath(path) for path in settings.data)}
    if settings.hf:
        where["hf"] = os.path.abspath(settings.hf)
    return replace(settings, **where)


def run_job(job: Job, world: World, check: bool, stop: StopSignal | None = None) -> int:
    """Runs the job; returns the exit code."""
    trainer = start(job, world)
    stop = stop or StopSignal()
    if check and world.size == 1:
        print(NOTHING, flush=True)
    elif check:
        world.at("comparing with one rank")
        comparison = verify(job, trainer)
        if world.rank == 0:
            print(comparison, flush=True)
        if not comparison.passed:
            return DIFFERENT
    done = train(job, trainer, stop)
    return 0 if done else 128 + (stop.number or signal.SIGINT)


def fail(error: Exception, world: World) -> int:
    """Ends this process for `error`, its own or another rank's: one line on stderr, printed once per machine for what
    is refused, and by every rank that has lost another. A fault in the program keeps its traceback."""
    board, kind, text = world.board, REFUSED, str(error)
    code = NOT_FINITE if isinstance(error, FloatingPointError) else BAD_INPUT
    if not isinstance(error, (*REFUSALS, FloatingPointError)):
        word = board.explain(error) if board is not None else None
        if word is None:
            if board is not None:
                board.end(FAILED, 1, f"{type(error).__name__}: {error}")
            raise error
        kind, code, text = word.kind, word.code, word.text
    line = " ".join(text.split())
    if board is not None and kind == LOST:
        end_lost(board, line)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {line}", file=sys.stderr, flush=True)
    if board is None:
        return code
    board.end(kind, code, line)
    # mpiexec kills the others when this process ends, also the one that says the line
    if by_mpi(os.environ) and not board.await_words(GRACE) and os.environ.get("LOCAL_RANK", "0") != "0":
        print(f"error: rank {board.rank}: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # others may wait for what this process will not send: a group cannot be left in order then
