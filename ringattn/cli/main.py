"""The command ``ringattn``: one function a command."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ringattn.check import CheckError, Settings, check
from ringattn.cli.machine import check_here
from ringattn.cli.pictures import picture
from ringattn.cli.plan import app as plan_app
from ringattn.cli.rates import write_rates
from ringattn.cli.table import show
from ringattn.version import VERSION

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plan_app, name="plan")
OF_MACHINES = ("json", "timeout", "model")  # options that a check without a model knows


def _version(asked: bool) -> None:
    if asked:
        print(f"ringattn {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Exact attention over sequences that do not fit one device."""


@app.command("check")
def check_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="module:function, your factory: called with a context, returns a model")
    ] = None,
    ranks: Annotated[int, typer.Option(help="processes that the sequence is sharded over")] = 2,
    seqlen: Annotated[int, typer.Option(help="tokens of a row")] = 96,
    documents: Annotated[int, typer.Option(help="documents packed into a row")] = 3,
    layout: Annotated[str, typer.Option(help="auto, balanced, contiguous, zigzag, striped, cyclic")] = "auto",
    ulysses: Annotated[int, typer.Option(help="ranks of the head axis; divides --ranks")] = 1,
    batch: Annotated[int, typer.Option(help="rows")] = 1,
    vocab: Annotated[int | None, typer.Option(help="token ids; default: what the model says")] = None,
    seed: Annotated[int, typer.Option(help="of weights and tokens")] = 0,
    dtype: Annotated[str, typer.Option(help="of the sharded run: float64, float32")] = "float64",
    timeout: Annotated[
        float, typer.Option(help="seconds for each of the two runs; for any wait of a machine's")
    ] = 120.0,
    json: Annotated[Path | None, typer.Option(help="a file for all that the ranks of a machine's check found")] = None,
) -> None:
    """Check the machine you are on or, with --model, your own sharded model and training step on the CPU.

    The machine: links, and exactness of every schedule, head split and kernel, on all ranks that are started:

    \b
        ringattn check
        torchrun --nproc-per-node 8 -m ringattn.cli check --json found.json
        mpiexec -n 8 ringattn check

    A model: compared on two processes with one.

    \b
        ringattn check --model training.models:make

    Exit code 0: all agrees; 1: a finding; 2: the check could not be made. (torchrun itself ends with 1 for either.)
    """
    console = Console()
    try:
        if model is None:
            others = [f"--{name}" for name in context.params if name not in OF_MACHINES and _given(context, name)]
            if others:
                raise ValueError(f"{', '.join(others)}: of a model's check; give --model module:function too")
            if not timeout > 0:
                raise ValueError(f"--timeout {timeout}: must be a positive number of seconds")
            raise typer.Exit(check_here(timeout, json, console))
        if json is not None:
            raise ValueError("--json: of a machine's check; leave out --model, or --json")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["ringattn.check"])  # one import for all
        settings = Settings(model, ranks, seqlen, documents, layout, batch, vocab, seed, dtype, timeout, ulysses)
        report = check(settings)
    except (ValueError, CheckError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(report, console)
    raise typer.Exit(0 if report.ok else 1)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@app.command("calibrate")
def calibrate_command(
    output: Annotated[
        Path | None, typer.Option(help="the file; default: where contexts look for this device's")
    ] = None,
) -> None:
    """Measure what each kernel does on this machine's GPU, for kernel="auto" to choose by.

    Contexts read the file where it is written by default, ~/.cache/ringattn/DEVICE.json (DEVICE: the GPU's name, as
    h200), or where Options(kernel_rates=...) says. 15 kinds of tiles are timed for each kernel, both ways, for a tenth
    of a second or five runs each, and some kernels compile first: reckon with minutes (it has never run on a GPU).
    Exit code 2: no GPU.
    """
    console = Console()
    try:
        console.print(f"wrote {write_rates(output, console)}", markup=False, highlight=False, soft_wrap=True)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@app.command("show")
def show_command(
    mask: Annotated[str, typer.Argument(help="as in Python: 'longformer(1023, 64) & documents([0, 4000, 16384])'")],
    seqlen: Annotated[str | None, typer.Option(help="tokens, always needed: 131072, 128K, 1M")] = None,
    view: Annotated[
        str | None,
        typer.Option(help="mask, layout, schedule, work, layouts; default: mask, or layout where ranks are told of"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a file: .svg, .html (zoom, hover), .png, .txt")] = None,
    ranks: Annotated[str | None, typer.Option(help="of the world that is planned for; default 8")] = None,
    layout: Annotated[str | None, typer.Option(help="auto, balanced, contiguous, zigzag, striped, cyclic")] = None,
    kv_layout: Annotated[str | None, typer.Option(help="of the keys, where they lie otherwise")] = None,
    schedule: Annotated[str | None, typer.Option(help="auto, ring, exchange, gather, double_ring")] = None,
    ulysses: Annotated[str | None, typer.Option(help="ranks of the head axis, or auto")] = None,
    heads: Annotated[str | None, typer.Option(help="of calls: query heads, KV heads, head size, as 32,8,128")] = None,
    kv_seqlen: Annotated[str | None, typer.Option(help="keys, where they are another sequence")] = None,
    q_offset: Annotated[str | None, typer.Option(help="position of the first query")] = None,
    device: Annotated[str | None, typer.Option(help="for seconds: A100, H100, H200, B200, cpu; default H100")] = None,
    ranks_per_node: Annotated[
        str | None, typer.Option(help="that share a node; default: as many as the device's")
    ] = None,
) -> None:
    """Draw a mask and what is planned for it, as text or, with --out, as a file.

    \b
        ringattn show 'longformer(1023, 64)' --seqlen 1M
        ringattn show 'causal()' --seqlen 128K --ranks 8 --layout zigzag --schedule ring --view schedule --out ring.html

    Views: mask (which blocks attend), layout (who holds what), schedule (who computes and sends what when), work
    (pairs, bytes and seconds of each rank), layouts (all of them side by side). Exit code 2: what is asked for cannot
    be drawn, and why.
    """
    given = dict(
        seqlen=seqlen, ranks=ranks, layout=layout, kv_layout=kv_layout, schedule=schedule, ulysses=ulysses,
        kv_seqlen=kv_seqlen, q_offset=q_offset, device=device, ranks_per_node=ranks_per_node,
    )  # fmt: skip
    try:
        made = picture(mask, out, view, given, heads)
        if out is None:
            print(made)
        else:
            made.save(out)
    except ValueError as error:
        if isinstance(error, UnicodeEncodeError):
            error = ValueError(
                f"this terminal writes {error.encoding} and the text has blocks of Unicode; name a file, --out"
            )
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
