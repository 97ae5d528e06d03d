"""What attention takes beside its inputs and results: the program's buffers, the head all-to-all's, and what a kernel
allocates while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch

from ringattn.budget.amounts import Amount, named
from ringattn.budget.layers import SCRATCH, Scratch
from ringattn.budget.tape import Moment, Tensor, largest
from ringattn.context import ContextParallel
from ringattn.kernels import sdpa, windows
from ringattn.kernels.scores import Scores
from ringattn.masks import Mask
from ringattn.planning.launches import Launch
from ringattn.planning.program import Buffer, Parcel, Program
from ringattn.planning.shape import TYPICAL
from ringattn.planning.wanted import ALL_WANTED
from ringattn.runtime import heads
from ringattn.runtime.link import Messages
from ringattn.runtime.wire import Kind
from ringattn.runtime.workspace import Workspace

NAMES = "rows of the batch", "heads", "KV heads"
BUFFERS, MASKS = "attention buffers", "kernel's masks"
SPLIT = named("query x key rows of the operator", 64 * 512)  # what PyTorch's CPU operator works through at a time


@dataclass(frozen=True, slots=True)
class Attention:
    """Of a rank: what its calls keep all the time, what they take while they run, and what the first backward leaves
    behind for good."""

    buffers: tuple[Tensor, ...]
    scratch: Scratch
    grown: tuple[Tensor, ...] = ()


def scratch_of(cp: ContextParallel, device: str, threads: int = 1, rows: int = 1) -> Attention:
    """Of the calls of a context whose shape was told, ``rows`` at a time: its programs' buffers, the head all-to-all's
    and the kernel's."""
    kind = kind_of(cp, device)
    kind = kind._replace(batch=kind.batch * rows)
    programs = [cp.program(mask) for mask in cp.masks]
    computed = _seats(cp, kind)[0].computed(kind)
    there = (*buffers(programs, computed), *swaps(cp, kind))
    if device != "cpu":
        return Attention(there, flash_scratch(cp, kind))
    scratch, masks = cpu_scratch(programs, computed, threads)
    return Attention((*there, *masks[:1]), scratch, masks[1:])


def kind_of(cp: ContextParallel, device: str = "cpu") -> Kind:
    """The calls of a context with a shape."""
    shape = cp.binding.settings.shape or TYPICAL
    sizes = shape.batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.values
    return Kind(*sizes, getattr(torch, shape.dtype), torch.device(device))


def buffers(programs: Iterable[Program], kind: Kind) -> tuple[Tensor, ...]:
    """Of the programs of a stack's masks, each slot as large as the largest of its buffers."""
    slots: dict[str, tuple[int, Tensor]] = {}
    for buffer in chain.from_iterable(program.buffers for program in programs):
        tensor = _buffer(buffer, kind)
        if tensor.size.value > slots.get(buffer.slot, (0, None))[0]:
            slots[buffer.slot] = (tensor.size.value, tensor)
    return tuple(tensor for _, tensor in slots.values())


def _buffer(buffer: Buffer, kind: Kind) -> Tensor:
    rows, batch, count, width = kind.shape(buffer)
    size = kind.dtype_of(buffer.row).itemsize
    names = f"rows of {buffer.slot}", "rows of the batch", "heads of it", "numbers of a head", "bytes"
    made = named(names[0], rows)
    for name, value in zip(names[1:], (batch, count, width, size), strict=True):
        made = made * named(name, value)
    return Tensor(BUFFERS, f"{buffer.slot} ({buffer.row.value})", made)


class Recorder:
    """A link that moves nothing, on whose workspace nothing lies: the head all-to-all of tensors without memory leaves
    there what buffers it asks for, and in ``received`` the bytes of its messages."""

    def __init__(self) -> None:
        self.workspace = Workspace(lambda size, dtype, _: torch.empty(size, dtype=dtype, device="meta"))
        self.received: Counter[str] = Counter()

    def post(self, batch: heads.Batch) -> None:
        """There is nothing to wait for."""
        self.received.update({what: received for what, _, received in batch.moved})

    def wait(self, pending: object) -> None:
        """See `post`."""


def swaps(cp: ContextParallel, kind: Kind) -> tuple[Tensor, ...]:
    """Buffers of the head all-to-all, forward and backward, as it asks for them."""
    flat = _swapped(cp, kind).workspace.flat()
    return tuple(_flat(slot, x) for (slot, *_), x in flat.items())


def _swapped(cp: ContextParallel, kind: Kind) -> Recorder:
    split, recorder = cp.binding.split, Recorder()
    on, link = kind._replace(device=torch.device("meta")), cast(Messages, recorder)
    for seat in _seats(cp, on):
        if seat.swap is not None:
            _swap(seat.swap, on, [sizes[split.member] for sizes in seat.swap.sizes], link)
    return recorder


def received(cp: ContextParallel, mask: Mask, kind: Kind) -> tuple[int, int]:
    """Bytes that this rank receives in a call forward and in its backward: its program's messages and those of the head
    all-to-all, as `ContextParallel.traffic` counts them."""
    program, swapped = cp.program(mask), _swapped(cp, kind).received
    kinds = [seat.computed(kind) for seat in _seats(cp, kind)]
    ahead, back = (
        sum(_message(parcel, of) for of in kinds for turn in turns for parcel in turn.recvs)
        for turns in (program.forward, program.backward)
    )
    return ahead + swapped["forward heads"], back + swapped["backward heads"]


def _message(parcel: Parcel, kind: Kind) -> int:
    _, batch, count, width = kind.shape(parcel.buffer)
    rows = parcel.rows.stop - parcel.rows.start
    return rows * batch * count * width * kind.dtype_of(parcel.buffer.row).itemsize


def _seats(cp: ContextParallel, kind: Kind) -> tuple[heads.Seat, ...]:
    binding = cp.binding
    team = [[int(layout.sizes[rank]) for rank in binding.split.team] for layout in binding.held]
    return heads.seats(binding.split, kind, binding.settings.options.head_chunks, team)


def _flat(slot: str, x: torch.Tensor) -> Tensor:
    dtype = str(x.dtype).removeprefix("torch.")
    return Tensor(BUFFERS, f"{slot} ({dtype})", named(f"numbers of {slot}", x.numel()) * named("bytes", x.itemsize))


def _swap(swap: heads.HeadSwap, kind: Kind, own: Sequence[int], link: Messages) -> None:
    sizes = (own[0], kind.num_heads), (own[1], kind.num_kv_heads), (own[1], kind.num_kv_heads)
    widths = kind.head_dim, kind.head_dim, kind.v_head_dim
    q, k, v = (
        torch.empty(kind.batch, *size, width, dtype=kind.dtype, device="meta")
        for size, width in zip(sizes, widths, strict=True)
    )

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows = q.shape[:3]
        return q.new_empty(*rows, v.shape[3]), q.new_empty(rows[0], rows[2], rows[1], dtype=kind.wide)

    def differentiate(saved: heads.Saved, _: Scores, dtypes: Sequence[torch.dtype]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip(saved[:3], dtypes, strict=True))

    scores = Scores(1.0)
    homes = heads.homes_of_results(q, v, kind.wide)
    swap.forward(link, (q, k, v, None, scores), attend, homes)
    grads = heads.homes_of_gradients(swap, (q, k, v), kind.wide, ALL_WANTED)
    swap.backward(link, (q, k, v, homes[0], heads.row(homes[1]), homes[0], None), scores, differentiate, grads)


# -- fused kernels on a GPU ----------------------------------------------------------------------


def flash_scratch(cp: ContextParallel, kind: Kind) -> Scratch:
    """What FlashAttention's kernels take: a call's own out and lse forward, where results are merged; backward dq in
    fp32, two numbers a row, and dq, dk and dv of a call in the dtype of the inputs (its `flash_bwd` allocates them);
    where query heads share KV heads, dk and dv in fp32 too (FlashAttention-3 and 4)."""
    rows = named("local tokens of the team", max(int(x) for x in cp.binding.computed.q.sizes))
    split = named("ranks of the head axis x chunks of heads", cp.ulysses * cp.binding.settings.options.head_chunks)
    batch, heads_, kv = (named(n, x) for n, x in zip(NAMES, kind[:3], strict=True))
    dim, size, wide = named("head size", kind.head_dim), named("bytes", kind.dtype.itemsize), named("bytes in fp32", 4)
    query = batch * rows * heads_.over(split) * dim
    key = batch * rows * kv.over(split) * dim
    number = batch * rows * heads_.over(split) * wide
    ahead = Tensor(SCRATCH, "a call's out", query * size), Tensor(SCRATCH, "a call's lse", number)
    back = (
        Tensor(SCRATCH, "dq in fp32", query * wide),
        Tensor(SCRATCH, "softmax's sums", 2 * number),
        Tensor(SCRATCH, "a call's dq", query * size),
        Tensor(SCRATCH, "a call's dk and dv", 2 * key * size),
    )
    computed = _seats(cp, kind)[0].computed(kind)
    if computed.num_heads == computed.num_kv_heads:
        return Scratch(ahead, back)
    return Scratch(ahead, (*back, Tensor(SCRATCH, "dk and dv in fp32", 2 * key * wide)))


# -- PyTorch's operators on a CPU -----------------------------------------------------------------


def cpu_scratch(programs: Sequence[Program], kind: Kind, threads: int = 1) -> tuple[Scratch, tuple[Tensor, ...]]:
    """What `sdpa` takes on a CPU in a call at a time: copies of a piece's rows whose dtype or order is another, and the
    operator's results; and the additive masks that it keeps for narrow windows."""
    forward, backward = [Moment("", ())], [Moment("", ())]
    masks: dict[str, Amount] = {}
    for program in programs:
        for launch in _launches(program.forward):
            for part in _parts(launch):
                forward.append(_forward_part(part, launch.count, kind))
                masks |= _masks(part, kind, backward=False)
        for launch in _launches(program.backward):
            for part in _parts(launch):
                backward.append(_backward_part(part, launch.count, kind, threads))
                masks |= _masks(part, kind, backward=True)
    ahead, back = (tuple(x for x, _ in largest(moments).alive) for moments in (forward, backward))
    return Scratch(ahead, back), tuple(Tensor(MASKS, name, size) for name, size in masks.items())


def _launches(turns: Iterable[object]) -> list[Launch]:
    return list({(x.count, _size(x.q), _size(x.k), x.window): x for turn in turns for x in turn.launches}.values())  # type: ignore[attr-defined]


def _size(rows: object) -> int:
    return len(range(rows.start, rows.stop, rows.step or 1)) if isinstance(rows, slice) else len(rows)  # type: ignore[arg-type]


def _parts(launch: Launch) -> tuple[sdpa.Part, ...]:
    nq, nk = _size(launch.q) // launch.count, _size(launch.k) // launch.count
    return sdpa.cut(nq, nk, launch.window, False, sdpa.SIZES)


def _rows(name: str, rows: int, count: int, of: int, width: int, size: int) -> Tensor:
    made = named(f"rows of {name}", rows) * named("tiles", count) * named("heads", of)
    return Tensor(SCRATCH, name, made * named("head size", width) * named("bytes", size))


def _forward_part(part: sdpa.Part, count: int, kind: Kind) -> Moment:
    rows, cols, wide = _size(part.rows), _size(part.cols), kind.wide.itemsize
    if part.band is not None:
        rows, cols = _blocks(part, kind, windows.SIZES["cpu"].rows * windows.SIZES["cpu"].most)
    found = [_rows("a piece's out", rows, count * kind.batch, kind.num_heads, kind.v_head_dim, wide)]
    found += _copies(part, kind, rows, cols, count, ("q",), ("k", "v"))
    return Moment("", tuple((x, 1) for x in found))


def _backward_part(part: sdpa.Part, count: int, kind: Kind, threads: int) -> Moment:
    rows, cols, wide = _size(part.rows), _size(part.cols), kind.wide.itemsize
    if part.band is not None:
        cols, rows = _blocks(part, kind, windows.SIZES["cpu"].keys)
    batch = count * kind.batch
    found = [_rows("a piece's dq", rows, batch, kind.num_heads, kind.head_dim, wide)]
    found += [_rows(f"a piece's {x}", cols, batch, kind.num_kv_heads, kind.head_dim, wide) for x in ("dk", "dv")]
    found += _copies(part, kind, rows, cols, count, ("q", "dout", "out"), ("k", "v"))
    found.append(Tensor(SCRATCH, "the operator's blocks", 2 * SPLIT * named("threads", threads) * named("bytes", wide)))
    return Moment("", tuple((x, 1) for x in found))


def _blocks(part: sdpa.Part, kind: Kind, step: int) -> tuple[int, int]:
    """Rows of one side of a band that are computed at a time, and of the other side that they reach."""
    assert part.band is not None
    one, other = (part.band.nq, part.band.nk)
    width = part.band.width or max(one, other)
    return min(step, one), min(other, width + step - 1)


def _copies(
    part: sdpa.Part, kind: Kind, rows: int, cols: int, count: int, of_rows: Sequence[str], of_cols: Sequence[str]
) -> list[Tensor]:  # fmt: skip
    """Rows that are copied before the operator reads them."""
    other, packing = kind.dtype != kind.wide, sdpa.SIZES.packing
    if not other and (part.band is not None or _size(part.rows) < packing > _size(part.cols)):
        return []
    batch, wide = count * kind.batch, kind.wide.itemsize
    names = [x for x in of_rows if other or (x != "out" and cols >= packing)]
    found = [_rows(f"{x}, copied", rows, batch, kind.num_heads, kind.head_dim, wide) for x in names]
    keys = of_cols if other or rows >= packing else ()
    return found + [_rows(f"{x}, copied", cols, batch, kind.num_kv_heads, kind.head_dim, wide) for x in keys]


def _masks(part: sdpa.Part, kind: Kind, backward: bool) -> dict[str, Amount]:
    """Additive masks of narrow windows, kept from call to call; backward's is made of one of its own."""
    if part.band is None:
        return {}
    width, sizes = windows._bounds(part.band)[2], windows.SIZES["cpu"]
    size = named("bytes", kind.wide.itemsize)
    if backward:
        made = 2 * named("keys of a block", sizes.keys) * named("columns", width + sizes.keys - 1) * size
        return {f"backward, windows of {width}": made}
    slack = -(width + sizes.rows - 1) % windows.ALIGNMENT
    made = named("rows of a block", sizes.rows) * named("columns", slack + width + sizes.rows - 1) * size
    return {f"forward, windows of {width}": made}


__all__ = ["BUFFERS", "Attention", "buffers", "kind_of", "received", "scratch_of"]
