"""A context in words: what lies where, what was chosen and why, what every step computes and moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch.distributed as dist

from ringattn.comm.transport import Solo, name_ranks
from ringattn.geometry.masks import Expression
from ringattn.geometry.spans import Ints
from ringattn.kernels import Selection
from ringattn.planning.estimates import estimate
from ringattn.planning.hardware import hardware
from ringattn.planning.heads import head_shares
from ringattn.planning.launches import Launch
from ringattn.planning.placement import Choice, Line
from ringattn.planning.program import Parcel, Program, Row
from ringattn.planning.schedules import SCHEDULES, by_name
from ringattn.planning.shape import TYPICAL
from ringattn.planning.stages import Heads
from ringattn.planning.wanted import Wanted
from ringattn.runtime.binding import Binding
from ringattn.runtime.settings import ContextSettings

MAX_STEPS = 8
GRADIENTS = [row for row in Row if row.gradient]
GRAPHS = {
    "auto": ": calls on a CUDA device are captured at the second of a kind and replayed, unless that gains nothing",
    "on": ": calls are captured at the second of a kind and replayed, or refused",
    "off": "",
}


def describe(binding: Binding) -> str:
    """Printable text, the same on every rank but for the rank's own steps."""
    settings, choice = binding.settings, binding.choice
    programs = {mask: _program(binding, mask) for mask in settings.masks}
    keys = f", {_count(settings.kv_seqlen, 'key')}" if settings.kv_seqlen != settings.seqlen else ""
    offset = f", first query at {settings.q_offset:,}" if settings.q_offset else ""
    sizes = binding.held.q.sizes
    lines = [
        f"ringattn: {_count(settings.seqlen, 'token')}{keys}{offset} over {_count(binding.world_size, 'rank')} "
        f"({_between(sizes)} a rank), this is rank {binding.rank}{_among(settings, binding.rank)}",
        *_alone(binding),
        f"layout {binding.held.q.name} ({choice.asked}){_keys(binding)}, schedule {' or else '.join(choice.schedules)}",
        f"planned for {_shape(binding)} on {hardware(settings.device).name}{_given(settings)}",
        *_table(choice, {made.schedule for made in programs.values() if isinstance(made, Program)}),
        *_left_out(binding),
        "    (estimates: the time of one forward and backward of all masks, beside the line taken; balance, tokens "
        "and calls of the mask with the most, bytes that travel to a rank for all masks; auto takes a simpler layout "
        "within 2 %)",
        *_teams(binding),
        *_kernels(binding),
        f"graphs {settings.options.graphs}{GRAPHS[settings.options.graphs]}",
    ]
    for mask in settings.masks:
        lines += _describe_mask(binding, mask, programs[mask])
    return "\n".join(lines)


def _among(settings: ContextSettings, rank: int) -> str:
    """Of which ranks of the group, where it is not all of them."""
    if settings.among is None:
        return ""
    return f": rank {settings.among[rank]} of the group, with {name_ranks(settings.among)}"


def _alone(binding: Binding) -> list[str]:
    """That no group was given where there is one: right for replicas, and else a sequence that is not sharded."""
    if not isinstance(binding.link.transport, Solo) or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    return [
        f"NOT SHARDED: no group was given (None), so this process, rank {dist.get_rank()} of {dist.get_world_size()}, "
        "attends alone, as replicas of data parallelism do; for one sequence over several ranks pass "
        "torch.distributed.group.WORLD or an axis of a mesh"
    ]


def _program(binding: Binding, mask: Expression) -> Program | str:
    """That of the calls expected, or why there is none."""
    try:
        return binding.program(mask, binding.expected)
    except ValueError as none_fits:
        return str(none_fits)


def _shape(binding: Binding) -> str:
    """The shape of calls that costs are of."""
    shape, told = binding.settings.shape or TYPICAL, binding.settings.shape is not None
    wanted = "" if shape.gradients == "qkv" else f", gradients wanted: {Wanted.of(shape.gradients)}"
    sizes = f"{shape.head_dim}" if shape.values == shape.head_dim else f"{shape.head_dim} and {shape.values}"
    return (
        f"calls of {shape.num_heads} heads over {shape.num_kv_heads} of {sizes}, batch {shape.batch}, {shape.dtype}"
        f"{wanted}{'' if told else ' (a guess: tell with shape=ringattn.Shape(...))'}"
    )


def _teams(binding: Binding) -> list[str]:
    """How heads are split, and in how many chunks they go."""
    split, shape = binding.split, binding.settings.shape or TYPICAL
    chunks = binding.settings.options.head_chunks
    lines = [f"heads go by {chunks} chunks, one after the other"] if chunks > 1 else []
    lines += _splits(binding)
    if split.ulysses == 1:
        return lines
    shares = head_shares(shape.num_heads, shape.num_kv_heads, min(split.ulysses, shape.num_heads))
    counts = _between(np.array([share.queries.stop - share.queries.start for share in shares]))
    return [
        *lines,
        f"{split.ulysses} ranks compute the heads of one shard: rings of {split.ring_size}, "
        f"{counts} query head{'' if counts == '1' else 's'} a rank (this is rank {split.ring_rank} of ring "
        f"{split.member}; plans, tiles and tokens below are a ring's)",
        f"all-to-alls of a call, forward and backward: {binding.offers[0].swapped.received:,} bytes received by the "
        f"rank with most heads, {_time(binding.offers[0].swapping / len(binding.settings.masks))} by these figures",
    ]


def _splits(binding: Binding) -> list[str]:
    """What each number of ranks of the head axis costs, where several were weighed."""
    taken, *others = binding.offers
    if not others:
        return []
    return [
        f"ulysses {offer.settings.members}: {offer.seconds / taken.seconds:.2f} x the time ({_time(offer.seconds)}, of "
        f"which {_time(offer.swapping)} all-to-all), layout {offer.choice.taken.q_layout.name}, schedule "
        f"{offer.choice.schedules[0]}{': taken' if offer is taken else ''}"
        for offer in (taken, *others)
    ]


def _kernels(binding: Binding) -> list[str]:
    """Which kernels compute calls of the shape planned for, and why, as far as that can be told here."""
    asked, first = binding.settings.kernel, _selection(binding, binding.settings.masks[0])
    if not isinstance(first, Selection):
        return [f"kernel {asked}: {first}"]
    lines = [f"kernel {asked}" + (f": {first.name}" if asked == "auto" else "")]
    if first.rates is not None:
        lines[0] += f", the fastest for each tile by rates ({first.rates.source})"
    reasons: dict[str, list[str]] = {}
    for text in first.refused if binding.settings.device != "cpu" else ():  # most are of no use on a CPU
        name, reason = text.split(": ", 1)
        reasons.setdefault(reason, []).append(name)
    return [*lines, *(f"    not {', '.join(names)}: {reason}" for reason, names in reasons.items())]


def _selection(binding: Binding, mask: Expression) -> Selection | str:
    try:
        return binding.expected_kernels(mask) or "chosen at the call, on the device"
    except NotImplementedError as refused:
        return str(refused)


def _shares(binding: Binding, mask: Expression, program: Program) -> list[str]:
    """How many calls each kernel computes, where there are several."""
    kernels = _selection(binding, mask)
    if isinstance(kernels, str) or len(kernels.kernels) == 1:
        return []
    lines = []
    for name, turns, backward in (("forward", program.forward, False), ("backward", program.backward, True)):
        works = [work for turn in turns for work in turn.work]
        count = Counter(kernel.name for work in works for kernel in kernels.taken(work.launches, backward))
        counts = [f"{kernel} {_count(n, 'call')}" for kernel, n in count.most_common()]
        lines.append(f"{name} {', '.join(counts)}")
    return [f"    kernels: {'; '.join(lines)}"]


def _given(settings: ContextSettings) -> str:
    options = settings.options
    names = [name for name in ("rates", "topology") if getattr(options, name) is not None]
    nodes = f", {settings.nodes}" if settings.nodes and options.topology is None else ""
    return (f", with the {' and '.join(names)} of Options" if names else "") + nodes


def _left_out(binding: Binding) -> list[str]:
    """Schedules that auto has no use for, and why."""
    flat = binding.settings.terms.topology.flat(binding.split.ring_size)
    names = [known.name for known in SCHEDULES if known.by_nodes] if binding.settings.schedule == "auto" else []
    return [f"    {name} left out: it is for a ring of several nodes, and {flat}" for name in names if flat]


def _keys(binding: Binding) -> str:
    return f", keys {binding.held.k.name}" if binding.held.k.name != binding.held.q.name else ""


def _table(choice: Choice, schedules: set[str]) -> list[str]:
    """A line for every layout and schedule: what it costs beside the one taken, or why it was left out. ``schedules``:
    those of the programs of the calls expected."""
    best = choice.lines[0].offers[0].seconds or 1.0  # a mask may allow nothing
    taken, *others = choice.lines
    return [*_rows(taken, best, schedules), *(row for line in others for row in _rows(line, best))]


def _rows(line: Line, best: float, schedules: Collection[str] = ()) -> list[str]:
    if not line.offers:
        least = f"not planned: at least {line.bound / best:.2f} x the time"
        return [f"    {line.layout:11} {line.out or least}"]
    rows = []
    open_ = bool(schedules)  # until one is taken, better ones were not, though nothing speaks against them
    for offer in line.offers:
        taken = offer.schedule in schedules
        note = ": taken" if taken else f": {offer.out}" if offer.out else ": over Options.kv_bytes" if open_ else ""
        open_ &= not taken
        rows.append(
            f"    {line.layout:11} {offer.schedule:11} {offer.seconds / best:.2f} x the time ({_time(offer.seconds)}), "
            f"balance {offer.balance:.2f}, needs {_count(offer.received, 'token')}, {_moved(offer.moved)}, "
            f"{_count(offer.calls, 'call')}{note}"
        )
    return rows


def _moved(moved: tuple[int, int]) -> str:
    """Bytes by the links that they take."""
    inside, between = (f"{number / 1e6:,.1f} MB" for number in moved)
    return f"{inside} inside a node and {between} between nodes" if moved[1] else inside


def _describe_mask(binding: Binding, mask: Expression, program: Program | str) -> list[str]:
    plan = binding.plans[mask]
    work, mean = plan.work, float(plan.work.mean())
    full = binding.settings.seqlen * binding.settings.kv_seqlen
    balance = f"{work.max() / mean:.2f}" if mean else "no work"
    lines = [
        f"mask {mask}",
        f"    {int(work.sum()):,} pairs ({100 * work.sum() / full:.2f} % of dense), largest over mean rank {balance}",
        f"    the most a rank must receive: {_count(int(plan.received.max(initial=0)), 'token')} of K/V",
    ]
    lines += [f"    {program}"] if isinstance(program, str) else _describe_program(binding, mask, program)
    reports = [(call.kind, line) for call in binding.known(mask) for line in binding.graphs.report(call)]
    return lines + [f"    calls of {kind.dtype} on {kind.device.type}, {line}" for kind, line in dict.fromkeys(reports)]


def _describe_program(binding: Binding, mask: Expression, program: Program) -> list[str]:
    plan = binding.plans[mask]
    guess = estimate(plan, by_name(program.schedule), program.cut, binding.expected.stacking).calls
    others = np.delete(guess, program.rank)
    beside = f" (about {_between(others)} on the others)" if len(others) else ""
    lines = [
        f"    rank {binding.rank}: {_count(int(plan.work[program.rank]), 'pair')} in "
        f"{_count(program.calls, 'kernel call')}{beside}, "
        f"receives {program.tokens(Row.KV):,} and sends {_count(program.tokens(Row.KV, sent=True), 'token')} of K/V, "
        f"sends {sum(program.tokens(row, sent=True) for row in GRADIENTS):,} of gradients",
    ]
    if plan.travel:
        hosted = next((work for turn in program.forward for work in turn.work if work.queries is not None), None)
        guests, calls = (0, 0) if hosted is None else (hosted.q_frame.size, len(hosted.launches))
        hosts = len({parcel.peer for turn in program.forward for parcel in turn.sends if parcel.buffer.row is Row.Q})
        lines.append(
            f"    queries that need many keys travel: {program.tokens(Row.Q, sent=True):,} go from here to {hosts} "
            f"{'rank' if hosts == 1 else 'ranks'}, {guests:,} come here, for {_count(calls, 'call')}"
        )
    return lines + _shares(binding, mask, program) + _steps(program, binding.split.ring)


def _steps(program: Program, ring: Sequence[int]) -> list[str]:
    """What each step computes, and what comes for it in the turn before."""
    lines = []
    for t, turn in enumerate(program.forward[:MAX_STEPS]):
        work, hosted = turn.own, sum(len(w.launches) for w in turn.work if w.queries is not None)
        launches = work.launches if work else ()
        shapes = ", ".join(_call(launch) for launch in launches[:4]) + (" ..." if len(launches) > 4 else "")
        heads = _heads(work.heads) if work else ""
        guests = f", {_count(hosted, 'call')} for queries that came" if hosted else ""
        coming = program.forward[t - 1].recvs if t else ()
        peers = _arrivals(coming, ring)
        source = "own shard" if t == 0 else f"receives {peers or 'nothing'}"
        calls = _count(len(launches), "call")
        lines.append(f"    step {t}: {source}; {calls} of {shapes or 'no'} pairs{heads}{guests}")
    if len(program.forward) > MAX_STEPS:
        lines.append(f"    ... and {_count(len(program.forward) - MAX_STEPS, 'step')} more")
    results = program.forward[-1].recvs if program.forward else ()
    return [*lines, f"    at the end: receives {_arrivals(results, ring)}"] if results else lines


def _arrivals(parcels: Sequence[Parcel], ring: Sequence[int]) -> str:
    what = {Row.KV: "", Row.Q: "queries ", Row.PARTIAL: "results "}
    return ", ".join(f"{int(p.tokens):,} {what[p.buffer.row]}from rank {ring[p.peer]}" for p in parcels)


def _heads(heads: Heads) -> str:
    return "" if heads.parts == 1 else f" of part {heads.part + 1} of {heads.parts} of the heads"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    """In four figures, which tell apart what hardly differs."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1000 * seconds:.4g} ms"


def _between(numbers: Ints) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _call(launch: Launch) -> str:
    return f"{launch.area:,}" + (f" (in {launch.count} tiles)" if launch.count > 1 else "")
