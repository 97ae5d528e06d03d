"""How a world is split into rings and teams: what is asked for, or what costs least, with its layouts and schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ringattn.geometry.layouts import NAMED, Layout, Layouts, cyclic
from ringattn.geometry.masks import BoundMask
from ringattn.planning.heads import Swapped
from ringattn.planning.placement import SIMPLER, Choice, Problem, choose, given
from ringattn.planning.schedules import SCHEDULES
from ringattn.planning.shape import TYPICAL
from ringattn.runtime.settings import ContextSettings


@dataclass(frozen=True, eq=False)
class SplitOffer:
    """A number of ranks of the head axis, named in ``settings``, and the layouts and schedules of its rings."""

    settings: ContextSettings
    choice: Choice
    held: Layouts  # by all ranks
    world_size: int

    @cached_property
    def swapping(self) -> float:
        """Seconds of the all-to-alls of all masks, forward and backward."""
        known = self.settings.known
        one = self.swapped.seconds(known.topology, known.rates, self.settings.members)
        return len(self.settings.masks) * one

    @cached_property
    def swapped(self) -> Swapped:
        """What those of one mask move."""
        settings = self.settings
        tokens = -(-settings.seqlen // self.world_size), -(-settings.kv_seqlen // self.world_size)
        return Swapped.of(settings.shape or TYPICAL, settings.members, tokens)

    @cached_property
    def seconds(self) -> float:
        """Those of everything."""
        return self.choice.taken.seconds + self.swapping


def split_offers(settings: ContextSettings, world_size: int) -> list[SplitOffer]:
    """What was weighed, the one taken first: the least split that costs about as little as any."""
    bound = tuple(m.bind(settings.seqlen, settings.kv_seqlen, settings.q_offset) for m in settings.masks)
    offers = [_offer(settings.split(members), bound, world_size) for members in settings.splits(world_size)]
    if len(offers) == 1:
        return offers
    least = min(offer.seconds for offer in offers)
    taken = next(offer for offer in offers if offer.seconds <= SIMPLER * least)
    return [taken, *(offer for offer in offers if offer is not taken)]


def _offer(s: ContextSettings, bound: tuple[BoundMask, ...], world: int) -> SplitOffer:
    asked = s.kv_layout if s.kv_layout not in (None, "auto") else s.layout
    whole = _of_all_ranks(s.layout, s.seqlen, world, s.members), _of_all_ranks(asked, s.kv_seqlen, world, s.members)
    q = s.layout if whole[0] is None else whole[0].merged(s.members)
    k = s.kv_layout if whole[1] is None else whole[1].merged(s.members)
    choice = _choice(replace(s, layout=q, kv_layout=k), bound, world // s.members)
    rings = choice.taken.q_layout, choice.taken.k_layout
    held = [ring.pieces(s.members) if found is None else found for found, ring in zip(whole, rings, strict=True)]
    return SplitOffer(s, choice, Layouts(*held), world)


def _of_all_ranks(layout: Layout | str | None, length: int, world: int, members: int) -> Layout | None:
    """A layout that says of every rank what it holds, whatever team it is in: one that is given for all of them, or the
    one in which a token never changes its place."""
    if members == 1:
        return None
    if isinstance(layout, Layout):
        return layout if layout.world_size == world else None
    return cyclic(length, world) if layout == cyclic.__name__ else None


def _choice(s: ContextSettings, bound: tuple[BoundMask, ...], ring_size: int) -> Choice:
    flat = s.terms.topology.flat(ring_size)
    fitting = tuple(known.name for known in SCHEDULES if not (known.by_nodes and flat))
    schedules = fitting if s.schedule == "auto" else (s.schedule,)
    keys = s.kv_layout if isinstance(s.kv_layout, Layout) else None
    if isinstance(s.kv_layout, str) and s.kv_layout != "auto":
        keys = {known.__name__: known for known in NAMED}[s.kv_layout](s.kv_seqlen, ring_size)
    problem = Problem(bound, ring_size, s.terms, schedules, s.options.kv_bytes is None, keys)
    return given(problem, s.layout, keys or s.layout) if isinstance(s.layout, Layout) else choose(problem, s.layout)
