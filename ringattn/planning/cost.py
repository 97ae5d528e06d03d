"""What a plan costs under a schedule, in seconds: one function, which serves every ``auto``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.planning.estimates import Estimate, estimates
from ringattn.planning.hardware import CPU
from ringattn.planning.launches import Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.program import Program
from ringattn.planning.rates import Rates
from ringattn.planning.schedules import Flow, Schedule, by_name, room_of
from ringattn.planning.shape import TYPICAL, Shape
from ringattn.planning.topology import Topology
from ringattn.planning.travel import worthwhile

Seconds = NDArray[Any]  # of each rank


@dataclass(frozen=True)
class Terms:
    """What seconds are reckoned with: links, a device's rates, the calls' shape, and which tiles are computed together.
    Equal on all ranks."""

    topology: Topology = field(default=CPU.topology)
    rates: Rates = field(default=CPU.rates)
    shape: Shape = field(default=TYPICAL)
    stacking: Stacking = Stacking.VIEWS

    @cached_property
    def pair(self) -> Seconds:
        """Seconds that a pair of a band without bounds takes in each pass."""
        return self.rates.pair_seconds(self.shape)

    @cached_property
    def token(self) -> NDArray[Any]:
        """Bytes that travel for a K/V token in each pass."""
        return np.array([self.shape.forward.token, self.shape.backward.token])

    @cached_property
    def shards(self) -> int:
        """How many shards of K/V buffers may take unless a limit is given: two; on a GPU, where each step's merge is a
        pass over memory, as many as the running result of a shard's queries takes."""
        shape = self.shape
        result, keys = shape.batch * shape.num_heads * shape.values * shape.wide, shape.num_kv_heads * shape.row_bytes
        return max(2, result // keys) if self.rates.queued else 2

    def work(self, by_kind: NDArray[Any]) -> Seconds:
        """Seconds of pairs, ``[3, n]`` by their kind, in each pass: ``[2, n]``."""
        return np.multiply.outer(self.pair, self.rates.weigh(by_kind))


@dataclass(frozen=True)
class Cost:
    """Figures of one plan under one schedule, each that of the rank where it is largest."""

    seconds: float  # of the slowest rank, forward and backward
    received: int  # foreign K/V tokens needed; a relay carries more
    calls: int  # kernel calls of a forward pass
    balance: float  # largest over mean work
    fits: bool  # whether `Terms.shards` are room enough for the schedule's buffers
    moved: tuple[int, int]  # bytes that travel to a rank inside of its node and from others, forward and backward


@dataclass(frozen=True, eq=False)
class Spent:
    """Seconds of each rank, forward and backward: what it computes; with what of its transfers it waits for; with
    steps, messages and calls, where these are not hidden."""

    compute: Seconds
    device: Seconds
    total: Seconds


def cheaper(plan: Plan, schedules: Sequence[str], terms: Terms) -> Plan:
    """The plan, or the one in which queries travel where that costs less under one of the schedules."""
    thin = terms.shape.thin
    if not worthwhile(plan.mask, plan.world_size, thin):
        return plan
    travelling = replace(plan, travel=thin)
    if len(travelling.guests):
        goes, stays = (min(one.seconds for one in costs(p, schedules, terms)) for p in (travelling, plan))
        return travelling if goes < stays else plan
    return plan


def cost(plan: Plan, name: str, terms: Terms) -> Cost:
    """What the plan costs under one schedule."""
    return costs(plan, [name], terms)[0]


def costs(plan: Plan, names: Sequence[str], terms: Terms) -> list[Cost]:
    """For each schedule the slowest rank's compute (FLOP, calls, merges), forward and backward, and what of its
    transfers does not hide behind it. Room is `Terms.shards` of K/V, or what the schedule's smallest cut takes. Rows
    that stacks gather are not counted."""
    schedules = [by_name(name) for name in names]
    cuts = [settled(plan, schedule, terms.shape.num_kv_heads, terms.shards) for schedule in schedules]
    made = estimates(plan, [(s, cut) for s, (cut, _) in zip(schedules, cuts, strict=True)], terms.stacking)
    work, most = plan.work, int(plan.received.max(initial=0))
    mean = float(work.mean())
    balance = int(work.max()) / mean if mean else 1.0
    found = []
    for schedule, (cut, fits), one in zip(schedules, cuts, made, strict=True):
        flow = schedule.flow(plan, cut)
        seconds = _spent(plan, flow, cut if schedule.by_heads else 1, one, terms).total
        tokens = terms.topology.received(flow.moved, plan.world_size)
        inside, between = (int(terms.token.sum()) * many for many in tokens)
        found.append(Cost(float(seconds.max()), most, int(one.calls.max()), balance, fits, (inside, between)))
    return found


def spent(plan: Plan, schedule: Schedule, cut: int, terms: Terms) -> Spent:
    """Where every rank's seconds go under one schedule with its cut."""
    made = estimates(plan, [(schedule, cut)], terms.stacking)[0]
    return _spent(plan, schedule.flow(plan, cut), cut if schedule.by_heads else 1, made, terms)


def _spent(plan: Plan, flow: Flow, parts: int, made: Estimate, terms: Terms) -> Spent:
    """``parts``: in which a token travels, by its heads."""
    shape, nothing = terms.shape, np.zeros(plan.world_size)
    summed = Spent(nothing, nothing, nothing)
    merged = np.maximum(made.rows - plan.q_layout.sizes, 0)
    all_work = terms.work(plan.work_by_kind)
    own_work = terms.work(plan.own_work) if flow.hider == "own" else all_work
    arrive, wait = terms.topology.seconds(flow.moved, plan.world_size)
    visit, pause = terms.topology.seconds(plan.visits_made, plan.world_size)
    late = parts * wait + 2 * pause
    calls, steps = terms.rates.call * made.calls, terms.rates.step * flow.steps + late
    for number, one in enumerate((shape.forward, shape.backward)[: shape.passes]):
        beside = terms.rates.merge * (one.row * merged + one.copied * flow.copied)
        compute = all_work[number] + beside + (0 if terms.rates.queued else calls)
        transfer = one.token * arrive + one.query * visit
        first = flow.exposed * transfer
        hider = compute if flow.hider == "all" else own_work[number]
        device = compute + first + unhidden(transfer - first, hider, terms.rates)
        total = np.maximum(device, calls + steps) if terms.rates.queued else device + steps
        summed = Spent(summed.compute + compute, summed.device + device, summed.total + total)
    return summed


def host_and_device(plan: Plan, rank: int, program: Program, terms: Terms) -> tuple[float, float]:
    """Seconds that one rank's host and its device take for a program, forward and backward, beside its messages."""
    host = terms.shape.passes * (terms.rates.call * program.calls + terms.rates.step * len(program.forward))
    return host, float(terms.work(plan.work_by_kind[:, rank]).sum())


def unhidden(transfer: Seconds, compute: Seconds, rates: Rates) -> Seconds:
    """Time that transfers add to compute which runs meanwhile."""
    return np.maximum(transfer - compute, 0) + rates.exposed * np.minimum(transfer, compute)


def settled(plan: Plan, schedule: Schedule, kv_heads: int, shards: int = 2) -> tuple[int, bool]:
    """The cut that fits so many shards of K/V, or else the smallest; and whether it does."""
    cut = schedule.fit(plan, kv_heads, room_of(plan, kv_heads, shards))
    if cut is not None:
        return cut, True
    return min(schedule.cuts(plan, kv_heads), key=lambda cut: (schedule.buffers(plan, cut, kv_heads), cut)), False
