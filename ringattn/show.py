"""Pictures of a mask, of a context and of what it plans: `show`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ringattn.arguments.values import integer, shown
from ringattn.comm import PlanningRank
from ringattn.context import ContextParallel
from ringattn.geometry.layouts import named
from ringattn.geometry.masks import Expression
from ringattn.pictures import mask as masks
from ringattn.pictures import numbers
from ringattn.pictures.picture import Picture
from ringattn.pictures.scene import Scene
from ringattn.planning.cost import spent
from ringattn.planning.hardware import checked_device, hardware
from ringattn.planning.placement import Candidate, choose
from ringattn.planning.plan import Plan
from ringattn.planning.scenes import layouts, plan, schedule, work
from ringattn.planning.schedules import by_name
from ringattn.planning.survey import PROGRAMS, Pass, meetings, passes
from ringattn.planning.turns import compile_program
from ringattn.runtime.settings import Load, Options

VIEWS = ("mask", "layout", "schedule", "work", "layouts")
LENGTHS = ("kv_seqlen", "q_offset")
SETTINGS = (*LENGTHS, "layout", "kv_layout", "shape", "schedule", "ulysses", "options")
RANKS, DEVICE = 8, "NVIDIA H100"  # of a world that nobody has told of


def show(
    what: Expression | ContextParallel | Plan,
    seqlen: int | None = None,
    *,
    view: str | None = None,
    ranks: int | None = None,
    device: str | None = None,
    ranks_per_node: int | None = None,
    **settings: Any,
) -> Picture:
    """A picture of a mask, a context or a plan: a notebook shows it by itself, ``print`` gives text, and
    ``.save("x.svg")`` writes it (``.html`` with zoom, ``.png``, ``.txt``). Nothing is computed or sent; numbers are
    exact whatever the length, seconds are the estimates of every ``auto``.

    Args:
        what: a mask; a :class:`ContextParallel`, of whose first mask, layout and schedule the picture then is; or a
            plan, of which the views are ``mask`` and ``layout``.
        seqlen: tokens of the sequence, where ``what`` is a mask.
        view: ``mask`` (the share of each block of pairs that attends), ``layout`` (who holds which queries and keys),
            ``schedule`` (who computes which tile in which turn, who sends what to whom), ``work`` (pairs, bytes and
            seconds of each rank, and the slowest) or ``layouts`` (all of them, with balance, bytes and seconds). None:
            of a mask ``mask``, or ``layout`` where ranks or settings are told; of a context or plan its layout with
            each rank's pairs and needs.
        ranks: of the world that is planned for, where ``what`` is a mask; None is 8.
        device: whose rates and links a layout and schedule are chosen by and seconds are reckoned with, where ``what``
            is a mask: a GPU's name, or "cpu"; None is an H100.
        ranks_per_node: neighbours that share a node, where ``what`` is a mask; None: as many as the device's have. With
            several nodes the view ``schedule`` tells messages between them from those inside.
        settings: where ``what`` is a mask, other arguments of :class:`ContextParallel`: ``kv_seqlen``, ``q_offset``,
            ``layout``, ``kv_layout``, ``shape``, ``schedule``, ``ulysses``, ``options``.

    Raises:
        ValueError: a view or setting that does not exist, a mask without a length, a length or settings beside what
            has its own, and whatever the context refuses.
    """
    if view is not None:
        named("view", view, VIEWS)
    for name in settings:
        named("setting", name, SETTINGS)
    world = {"ranks": ranks, "device": device, "ranks_per_node": ranks_per_node}
    if isinstance(what, Expression):
        return Picture(_of_mask(what, seqlen, view, world, settings))
    if not isinstance(what, (ContextParallel, Plan)):
        raise ValueError(f"{shown(what)}: must be a mask, a ContextParallel or a plan")
    given = {"seqlen": seqlen, **world, **settings}
    told = [name for name, value in given.items() if value is not None]
    if told:
        raise ValueError(f"{', '.join(told)}: a {type(what).__name__} has its own; leave out what is of a mask alone")
    return Picture(of_context(what, view) if isinstance(what, ContextParallel) else _of_plan(what, view))


def _of_mask(
    mask: Expression,
    seqlen: int | None,
    view: str | None,
    world: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Scene:
    if seqlen is None:
        raise ValueError("seqlen=None: a mask alone has no length; say how many tokens, as show(mask, 4096)")
    planned = [f"{name}={shown(value)}" for name, value in settings.items() if name not in LENGTHS]
    planned += [f"{name}={shown(value)}" for name, value in world.items() if value is not None]
    if view == "mask" and planned:
        raise ValueError(f"view='mask' with {', '.join(planned)}: shows no ranks; leave it out, or take view='layout'")
    if view == "layouts" and "layout" in settings:
        raise ValueError(f"view='layouts' with layout={shown(settings['layout'])}: shows all of them; leave one out")
    if view == "mask" or (view is None and not planned):
        seqlen = integer("seqlen", seqlen, 1)
        kv_seqlen = settings.get("kv_seqlen")
        bound = mask.bind(seqlen, seqlen if kv_seqlen is None else kv_seqlen, settings.get("q_offset", 0))
        return masks.picture(bound)
    device = checked_device(DEVICE if world["device"] is None else world["device"])
    ranks = integer("ranks", RANKS if world["ranks"] is None else world["ranks"], 1)
    if world["ranks_per_node"] is not None:
        settings = {
            **settings,
            "options": _with_nodes(settings.get("options", Options()), ranks, world["ranks_per_node"], device),
        }
    rank = PlanningRank(0, ranks, device=device)
    return of_context(ContextParallel(rank, seqlen, mask=mask, **settings), view or "layout")


def _with_nodes(options: Options, ranks: int, ranks_per_node: int, device: str) -> Options:
    """The options, with the links that the device has, between nodes of so many ranks."""
    size = integer("ranks_per_node", ranks_per_node, 1)
    if size < ranks and ranks % size:
        raise ValueError(
            f"ranks_per_node={size}: {ranks} ranks are not whole nodes of {size}; give one that divides them"
        )
    if options.topology is not None:
        raise ValueError(f"ranks_per_node={size} beside Options.topology, which says it too: leave one out")
    return replace(options, topology=replace(hardware(device).topology, ranks_per_node=size))


def _of_plan(made: Plan, view: str | None) -> Scene:
    if view == "mask":
        return masks.picture(made.mask)
    if view == "layout":
        return masks.over_layout(made.mask, made.q_layout, made.k_layout)
    if view is None:
        return plan.picture(made)
    raise ValueError(f"view={view!r} of a plan, which knows no schedule: show its context, or take mask or layout")


def of_context(cp: ContextParallel, view: str | None = None) -> Scene:
    """A view of a context's first mask; None is its plan."""
    made, terms = cp.plan, cp.binding.settings.terms
    if view == "layout":
        return masks.over_layout(made.mask, *cp.binding.held)
    if view in (None, "mask"):
        return _of_plan(made, view)
    if view == "layouts":
        auto = _auto(cp)
        return layouts.picture(auto.problem, layouts.candidates(auto.problem), auto, _notes(cp))
    program = cp.program(cp.masks[0])
    notes = (*_notes(cp), f"layout {made.q_layout.name}, schedule {program.schedule}, its cut {program.cut}")
    loops = _loops(cp) if made.world_size <= PROGRAMS else ()
    if view == "schedule":
        found = meetings(made, program.schedule, program.cut)
        return schedule.picture(made, program.schedule, terms, found, loops, notes)
    times = spent(made, by_name(program.schedule), program.cut, terms)
    return work.picture(made, times, terms.shape, loops, notes)


def _auto(cp: ContextParallel) -> Candidate:
    """What a context with its first mask alone, and without a layout, would take."""
    settings, taken = cp.binding.settings, cp.binding.choice.taken
    if settings.layout == "auto" and len(settings.masks) == 1:
        return taken
    return choose(replace(taken.problem, masks=(cp.plan.mask,)), "auto").taken


def _loops(cp: ContextParallel) -> tuple[Pass, ...]:
    """Both passes of all ranks of a ring."""
    program, terms = cp.program(cp.masks[0]), cp.binding.settings.terms
    how = program.stacking, terms.rates.exposed < 1, Load.of(terms).wanted
    known = by_name(program.schedule)
    every = [compile_program(cp.plan, known, program.cut, rank, *how) for rank in range(cp.plan.world_size)]
    return tuple(loop for loop in passes(every, terms.shape) if loop.turns)


def _notes(cp: ContextParallel) -> tuple[str, ...]:
    """Lengths, and what seconds and bytes are reckoned with."""
    settings = cp.binding.settings
    shape = settings.terms.shape
    notes = [
        *masks.sizes(cp.plan.mask),
        f"calls of {shape.num_heads} heads over {shape.num_kv_heads} of {shape.head_dim}, batch {shape.batch}, "
        f"{shape.dtype}, on {hardware(settings.device).name}"
        + ("" if settings.shape is not None else " (a guess: tell with shape=ringattn.Shape(...))"),
    ]
    if cp.ulysses > 1:
        swapped = numbers.amount(cp.binding.offers[0].swapped.received, "B")
        notes.append(
            f"{cp.world_size:,} ranks, {cp.ulysses} of which compute the heads of one shard: drawn is one of "
            f"{cp.ulysses} rings of {cp.plan.world_size:,}; the all-to-alls around it bring a rank {swapped} more"
        )
    return tuple(notes)
