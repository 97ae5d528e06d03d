"""The command ``ringattn``: one function a command."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ringattn.check import CheckError, Settings, check
from ringattn.cli.rates import write_rates
from ringattn.cli.table import show

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Exact attention over sequences that do not fit one device."""


@app.command("check")
def check_command(
    model: Annotated[str, typer.Option(help="module:function, your factory: called with a context, returns a model")],
    ranks: Annotated[int, typer.Option(help="processes that the sequence is sharded over")] = 2,
    seqlen: Annotated[int, typer.Option(help="tokens of a row")] = 96,
    documents: Annotated[int, typer.Option(help="documents packed into a row")] = 3,
    layout: Annotated[str, typer.Option(help="auto, balanced, contiguous, zigzag, striped, cyclic")] = "auto",
    batch: Annotated[int, typer.Option(help="rows")] = 1,
    vocab: Annotated[int | None, typer.Option(help="token ids; default: what the model says")] = None,
    seed: Annotated[int, typer.Option(help="of weights and tokens")] = 0,
    dtype: Annotated[str, typer.Option(help="of the sharded run: float64, float32")] = "float64",
    timeout: Annotated[float, typer.Option(help="seconds for each of the two runs")] = 120.0,
) -> None:
    """Compare your own sharded model and training step with one process, on the CPU.

    Exit code 0: all agrees; 1: a finding; 2: the check could not be made.
    """
    console = Console()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ringattn.check"])  # one import for all ranks
    try:
        settings = Settings(model, ranks, seqlen, documents, layout, batch, vocab, seed, dtype, timeout)
        report = check(settings)
    except (ValueError, CheckError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(report, console)
    raise typer.Exit(0 if report.ok else 1)


@app.command("calibrate")
def calibrate_command(
    output: Annotated[
        Path | None, typer.Option(help="the file; default: where contexts look for this device's")
    ] = None,
) -> None:
    """Measure what each kernel does on this machine's GPU, for kernel="auto" to choose by.

    Contexts read the file where it is written by default, or where Options(kernel_rates=...) says. Exit code 2: no GPU.
    """
    console = Console()
    try:
        console.print(f"wrote {write_rates(output, console)}", markup=False, highlight=False, soft_wrap=True)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
