"""The main job: trains a small decoder on bytes of text at long context, or on recall, each sequence sharded over
processes.

    torchrun --standalone --nproc-per-node 2 -m launch.pretrain --config cpu-128k
    mpiexec -n 2 python -m launch.pretrain --config cpu-128k

Exit codes of a process: 0 done; 2 bad input, refused with one line; 3 `--verify` found a difference; 4 the
loss, or a parameter, is no longer a number; 5 another rank died or froze; 128 + n stopped by signal n after saving
(130 for Ctrl-C). torchrun reports all but 0 as 1; mpiexec the code of the first that ends otherwise."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch.stopping import StopSignal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# how many ranks a launcher has started, in the words of torchrun, Open MPI, MPICH and Slurm
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
PATIENCE = 10.0  # seconds for processes that were started together to get as far as their arguments
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")  # and which one this process is


def show_help(context: typer.Context, asked: bool) -> None:
    """Says it once, however many ranks there are."""
    if not asked:
        return
    if next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0":
        typer.echo(context.get_help())
    raise typer.Exit


@app.command(
    context_settings={"help_option_names": []},
    help="Train a small decoder on text, its context sharded over all processes that are started together.",
)
def main(
    config: Annotated[str | None, typer.Option(help="a shipped config or a .toml file [cpu-128k]")] = None,
    data: Annotated[list[str] | None, typer.Option(help="text: a file or directory; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's directory [runs/NAME]")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the run in this directory")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="drop the run's checkpoint")] = False,
    steps: Annotated[int | None, typer.Option(help="how many steps in all")] = None,
    model: Annotated[str | None, typer.Option(help="hf:CONFIG.json: a Transformers model, its weights random")] = None,
    engine: Annotated[str | None, typer.Option(help="ddp, fsdp or deepspeed: how parameters lie on the ranks")] = None,
    data_parallel: Annotated[int | None, typer.Option(help="replicas; the other ranks share a sequence")] = None,
    accumulate: Annotated[int | None, typer.Option(help="sequences of a replica in a step")] = None,
    transport: Annotated[str | None, typer.Option(help="auto or mpi: what attention's messages go over")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write metrics for TensorBoard too")] = False,
    profile: Annotated[tuple[int, int] | None, typer.Option(help="trace these steps, FIRST LAST, from 1")] = None,
    check: Annotated[bool, typer.Option("--verify", help="do the first step on one rank too, and compare")] = False,
    _: Annotated[
        bool, typer.Option("--help", callback=show_help, is_eager=True, help="show this message and exit")
    ] = False,
) -> None:
    """See the module."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler, which counts the first step's memory, is to be quiet
    # before torch is loaded: a rank that is left says whom it has lost
    stop = StopSignal(threads=True) if any(os.environ.get(name, "1") != "1" for name in SIZES) else None
    from launch.job import Request, perform
    from ringattn.comm.started import translate

    try:
        translate()
    except ValueError as error:
        refuse(str(error))

    changes = {
        **{"steps": steps, "engine": engine, "transport": transport},
        **{"data_parallel": data_parallel, "accumulate": accumulate},
        **{"tensorboard": tensorboard or None, "profile": profile},
    }
    given = {name: value for name, value in changes.items() if value is not None}
    sys.exit(perform(Request(config, tuple(data or ()), out, resume, overwrite, model, given, check), stop))


def run() -> None:
    """The command. What its arguments are refused for is said once, however many ranks there are."""
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's, whatever module its classes live in
            from ringattn.comm.started import end_all

            end_all()
            raise
        refuse(f"{error.format_message()}; --help lists all options")


def refuse(text: str) -> NoReturn:
    """Ends this process for bad input, said once a machine. torchrun ends all processes with the first: those that say
    nothing wait for the one that speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    sys.exit(2)


if __name__ == "__main__":
    run()
