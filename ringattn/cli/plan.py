"""`ringattn plan`: what a run takes of its devices' memory, and how it is best split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ringattn.arguments.values import integer, tokens_of
from ringattn.budget.plans import Plan, gigabytes, plan
from ringattn.budget.splits import Split, splits

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Plan memory and splits of a training run.")

Model = Annotated[str, typer.Option(help="a shape's name, such as llama3-8b, or the path of a config.json")]
Seqlen = Annotated[str, typer.Option(help="tokens of a sequence: 131072, 128K, 1M")]
Nodes = Annotated[int, typer.Option(help="nodes")]
Gpus = Annotated[int, typer.Option(help="GPUs of a node")]
Memory = Annotated[str, typer.Option(help="of a GPU: 80GB (1e9 bytes), 80GiB")]
Reserve = Annotated[
    str | None,
    typer.Option(help="of it beside tensors: CUDA's context, NCCL; 2 GiB and a 25th are assumed", show_default=False),
]
Device = Annotated[str, typer.Option(help="the GPU's name")]
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
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command("memory")
def memory_command(
    model: Model, seqlen: Seqlen, nodes: Nodes = 1, gpus: Gpus = 8, memory: Memory = "80GB", reserve: Reserve = None,
    device: Device = "H100",
    batch: Batch = 1, dtype: Dtype = "bfloat16", optimizer: Optimizer = "adamw", shard: Shard = "fsdp",
    recompute: Recompute = "full", offload: Offload = False, offload_states: OffloadStates = "none",
    loss_chunks: LossChunks = "8", fused_loss: FusedLoss = False, token_chunks: TokenChunks = "1",
    head_chunks: HeadChunks = 1,
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
    title = f"{s.model.name}, {s.seqlen:,} tokens on {s.world} GPUs of {gigabytes(s.memory)}: one of them"
    table = Table("kind", "bytes", title=title, title_justify="left")
    for kind, size in found.kinds.items():
        table.add_row(kind, gigabytes(size))
    table.add_section()
    for name, size in (("peak", found.peak), (found.reserve_name, found.reserve), ("headroom", found.headroom)):
        table.add_row(name, gigabytes(size))
    console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"the peak is at: {found.moment}")
    about = "" if found.exact else "about "
    how = f"layout {found.placed.layout}, schedule {found.placed.schedule}"
    say(f"{how}; the longest sequence that fits: {about}{longest:,}")
    if found.warning:
        say(f"warning: {found.warning}")
    if not found.fits:
        say("it does not fit; what would make it fit, the cheapest first:")
        for change in found.changes:
            say(f"    {change}")
        if not found.changes:
            say("    nothing that is known here: a smaller model, or shorter sequences")


@app.command("split")
def split_command(
    model: Model, seqlen: Seqlen, nodes: Nodes = 1, gpus: Gpus = 8, memory: Memory = "80GB", reserve: Reserve = None,
    device: Device = "H100",
    dtype: Dtype = "bfloat16", optimizer: Optimizer = "adamw", shard: Shard = "fsdp", loss_chunks: LossChunks = "64",
    token_chunks: TokenChunks = "16", mask: Mask = "causal()",
    show: Annotated[int, typer.Option(help="how many")] = 10, as_json: Json = False,
) -> None:  # fmt: skip
    """The splits of the GPUs (ring x head split x data), ways of recomputing, offload and micro-batches that fit, by
    seconds a token, with what starts the first; --json has that of each.

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
        _show_splits(found[:show], Console())
    raise typer.Exit(0 if found else 1)


def _show_splits(found: list[Split], console: Console) -> None:
    columns = (
        "ring x heads x data",
        "micro-batch",
        "recompute",
        "offload",
        "memory",
        "received",
        "s a step",
        "us a token",
    )
    table = Table(*columns)
    for split in found:
        table.add_row(*split.row())
    console.print(table)
    for split in found[:1]:
        text = f"the first, of the pretraining job:\n{split.command}\n\nand in CONFIG.toml:\n{split.settings}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not found:
        console.print("none fits: more GPUs, or shorter sequences", markup=False)


@contextmanager
def refusals() -> Iterator[None]:
    """Bad input is one line and exit status 2."""
    try:
        yield
    except ValueError as error:
        Console().print(f"error: {' '.join(str(error).split())}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
