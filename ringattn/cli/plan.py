"""`ringattn plan`: what a run takes of its devices' memory, and how it is best split."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ringattn.arguments.values import integer, tokens_of
from ringattn.budget.job import differing
from ringattn.budget.plans import Plan, gigabytes, plan
from ringattn.budget.setup import Setup
from ringattn.budget.splits import Split, splits

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Plan memory and splits of a training run.")

Model = Annotated[str, typer.Option(help="a shape's name, such as llama3-8b, or the path of a config.json")]
Seqlen = Annotated[str, typer.Option(help="tokens of a sequence: 131072, 128K, 1M")]
Nodes = Annotated[int, typer.Option(help="nodes")]
Gpus = Annotated[int, typer.Option(help="GPUs of a node")]
Memory = Annotated[
    str | None,
    typer.Option(help="of a GPU: 80GB (1e9 bytes), 80GiB; by default its own, by its datasheet", show_default=False),
]
Reserve = Annotated[
    str | None,
    typer.Option(help="of it beside tensors: CUDA's context, NCCL; 2 GiB and a 25th are assumed", show_default=False),
]
Device = Annotated[str, typer.Option(help="the GPU's name: A100, H100, H200, B200, or as its driver gives it")]
Batch = Annotated[int, typer.Option(help="sequences of a replica at a time")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32")]
Optimizer = Annotated[str, typer.Option(help="adamw (fused), adamw_foreach (PyTorch's default), adamw8bit, muon, sgd")]
Shard = Annotated[str, typer.Option(help="fsdp, zero1, zero2, zero3, none")]
Recompute = Annotated[str, typer.Option(help="none; attention: keeps its result; full")]
Offload = Annotated[bool, typer.Option("--offload", help="what layers keep is on the host")]
OffloadStates = Annotated[str, typer.Option(help="on the host: none, optimizer, or all that lies in parts")]
LossChunks = Annotated[str, typer.Option(help="pieces of the logits")]
FusedLoss = Annotated[bool, typer.Option("--fused-loss", help="their gradients in their place, as Liger's")]
TokenChunks = Annotated[str, typer.Option(help="pieces of all but attention")]
HeadChunks = Annotated[int, typer.Option(help="groups of heads, one after the other")]
Mask = Annotated[str, typer.Option(help='as text: "sliding_window(4095) & causal()"')]
Layout = Annotated[str, typer.Option(help="auto, contiguous, zigzag, striped, balanced")]
Schedule = Annotated[str, typer.Option(help="auto, ring, gather, exchange, double_ring")]
Ulysses = Annotated[int, typer.Option(help="ranks of the head axis")]
Data = Annotated[int, typer.Option(help="replicas; the other ranks share a sequence")]
Autocast = Annotated[bool, typer.Option("--autocast", help="bfloat16 over fp32 weights, as launch.pretrain")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
COLUMNS = (
    "ring x heads\nx data", "micro-\nbatch", "recompute", "offload", "memory,\nGB", "received,\nGB", "s a\nstep",
    "us a\ntoken",
)  # fmt: skip
WIDEST = 1000  # characters of a table


@app.command("memory")
def memory_command(
    model: Model, seqlen: Seqlen, nodes: Nodes = 1, gpus: Gpus = 8, memory: Memory = None, reserve: Reserve = None,
    device: Device = Setup.device,
    batch: Batch = 1, dtype: Dtype = "bfloat16", optimizer: Optimizer = "adamw", shard: Shard = "fsdp",
    recompute: Recompute = "full", offload: Offload = False, offload_states: OffloadStates = "none",
    loss_chunks: LossChunks = str(Setup.loss_chunks), fused_loss: FusedLoss = False,
    token_chunks: TokenChunks = str(Setup.token_chunks), head_chunks: HeadChunks = 1, autocast: Autocast = False,
    mask: Mask = "causal()", layout: Layout = "auto", schedule: Schedule = "auto", ulysses: Ulysses = 1, data: Data = 1,
    code: Annotated[str, typer.Option(help="whose layers: transformers, decoder")] = "transformers",
    explain: Annotated[bool, typer.Option("--explain", help="every number as a formula with the values")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What a training step takes of a GPU's memory, on the rank that takes most.

    \b
        ringattn plan memory --model llama3-8b --seqlen 1M --gpus 8 --memory 80GB

    Exit code 0: it fits; 1: it does not; 2: bad input.
    """
    given = dict(locals())
    settings = {name: value for name, value in given.items() if name not in ("explain", "as_json", "model", "seqlen")}
    with refusals():
        for name in ("loss_chunks", "token_chunks"):
            settings[name] = tokens_of(f"--{name.replace('_', '-')}", settings[name])
        found = plan(model, seqlen, **settings)
        longest = found.longest
    if as_json:
        changes = [{"settings": change.settings, "peak": change.peak} for change in found.changes]
        print(json.dumps(found.as_dict() | {"longest": longest, "changes": changes}))
    elif explain:
        print(found.explain())
    else:
        _show(found, longest, Console())
    raise typer.Exit(0 if found.fits else 1)


def _show(found: Plan, longest: int, console: Console) -> None:
    s = found.setup
    table = Table("kind", "bytes")
    for kind, size in found.kinds.items():
        table.add_row(kind, gigabytes(size))
    table.add_section()
    for name, size in (("peak", found.peak), (found.reserve_name, found.reserve), ("headroom", found.headroom)):
        table.add_row(name, gigabytes(size))

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{s.model.name}, {s.seqlen:,} tokens on {_gpus(s)}: one of them, estimated, never measured on a GPU")
    _print_whole(table, console)
    say(f"the peak is at: {found.moment}")
    about = "" if found.exact else "about "
    how = f"layout {found.placed.layout}, schedule {found.placed.schedule}"
    say(f"{how}; the longest sequence that fits: {about}{longest:,}")
    if found.warning:
        say(f"warning: {found.warning}")
    if not found.fits:
        say("it does not fit; what would make it fit, the cheapest first:")
        for change in found.changes:
            say(f"    {_flags(change.settings)}: {gigabytes(change.peak)}")
        if not found.changes:
            say("    nothing that is known here: a smaller model, or shorter sequences")


@app.command("split")
def split_command(
    model: Model, seqlen: Seqlen, nodes: Nodes = 1, gpus: Gpus = 8, memory: Memory = None, reserve: Reserve = None,
    device: Device = Setup.device,
    dtype: Dtype = "bfloat16", optimizer: Optimizer = "adamw", shard: Shard = "fsdp",
    loss_chunks: LossChunks = str(Setup.loss_chunks), token_chunks: TokenChunks = str(Setup.token_chunks),
    mask: Mask = "causal()",
    own_loop: Annotated[bool, typer.Option("--own-loop", help="of your own, not launch.pretrain: see above")] = False,
    show: Annotated[int, typer.Option(help="how many")] = 10, as_json: Json = False,
) -> None:  # fmt: skip
    """The splits of the GPUs (ring x head split x data), ways of recomputing and offload that fit, by estimated seconds
    a token, with the command and config that start the first; --json has those of each.

    They are of launch.pretrain, which computes under autocast, one sequence of a replica at a time. With --own-loop
    they are of a training loop of your own, with micro-batches, layers computed again as a whole, and weights gathered
    in bfloat16, and calls in Python take the place of the command.

    Exit code 0: some fit; 1: none; 2: bad input.
    """
    given = dict(locals())
    settings = {name: value for name, value in given.items() if name not in ("show", "as_json", "model", "seqlen")}
    with refusals():
        for name in ("loss_chunks", "token_chunks"):
            settings[name] = tokens_of(f"--{name.replace('_', '-')}", settings[name])
        integer("--show", show, 1)
        found = splits(model, seqlen, **settings)
    if as_json:
        print(json.dumps([split.as_dict() for split in found]))
    else:
        _show_splits(found, show, own_loop, Console())
    raise typer.Exit(0 if found else 1)


def _show_splits(found: list[Split], show: int, own_loop: bool, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not found:
        say("none fits: more GPUs, shorter sequences, or more --loss-chunks")
        return
    say(_heading(found[0].setup, own_loop))
    table = Table(*COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[4:]:
        column.justify = "right"
    for split in found[:show]:
        table.add_row(*split.row())
    _print_whole(table, console)
    first = found[0]
    if own_loop:
        say(f"the first, not with launch.pretrain; in Python:\n{first.call}")
    else:
        say(f"the first, on each node:\n{first.command}\n\nand CONFIG.toml, its steps and rate for you to set:")
        say(f"{first.settings}\n\nplanned as {_command(first.setup)}")


def _heading(s: Setup, own_loop: bool) -> str:
    half = s.dtype == "bfloat16"
    loop = "a loop of your own" if own_loop else f"launch.pretrain{' (autocast over fp32 weights)' * half}"
    what = f"{s.model.name}, {s.seqlen:,} tokens on {_gpus(s)}, {s.shard}, {s.dtype}, for {loop}"
    unknown = "; ZeRO 3's own copies in bfloat16 are not counted" if s.shard == "zero3" and half else ""
    return f"{what}: memory and seconds are estimates for this device, never measured on one{unknown}"


def _gpus(s: Setup) -> str:
    return f"{s.world} x {s.device} of {gigabytes(s.memory)}"


def _command(s: Setup) -> str:
    """That plans the same."""
    asked = ("ringattn plan memory --model", shlex.quote(s.model.name), "--seqlen", str(s.seqlen), _flags(differing(s)))
    return " ".join(asked).strip()


def _flags(settings: Mapping[str, object]) -> str:
    """Settings as this command takes them."""
    said = []
    for name, value in settings.items():
        text = shlex.quote(f"{value}B" if name in ("memory", "reserve") else str(value))
        said.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(said)


def _print_whole(table: Table, console: Console) -> None:
    """As wide as it must be, whatever the terminal is: no value is cut."""
    for column in table.columns:
        column.no_wrap = True
    needed = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    (console if needed <= console.width else Console(width=needed)).print(table)


@contextmanager
def refusals() -> Iterator[None]:
    """Bad input is one line and exit status 2."""
    try:
        yield
    except ValueError as error:
        Console().print(f"error: {' '.join(str(error).split())}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
