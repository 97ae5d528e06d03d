"""Bindings: all that a context has settled for one setting of lengths, masks, layout, schedule and kernel.

Contexts with equal settings over one link share one binding, and the dispatcher's operators, which take tensors
and numbers only, find it by its handle: a digest as a tensor, so that a compiled graph is not tied to one batch.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ringattn.geometry.layouts import Layouts
from ringattn.geometry.masks import Expression
from ringattn.kernels import KERNELS, Call, Largest, Selection, rates_of
from ringattn.kernels import choose as choose_kernel
from ringattn.kernels.scores import Scores
from ringattn.planning.heads import Split
from ringattn.planning.launches import Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.program import Program
from ringattn.planning.schedules import Schedule, by_name, room_of
from ringattn.planning.turns import compile_program
from ringattn.planning.wanted import ALL_WANTED, NONE_WANTED, Wanted
from ringattn.runtime.graphs import Graphs
from ringattn.runtime.heads import seats
from ringattn.runtime.link import Link
from ringattn.runtime.nodes import Nodes
from ringattn.runtime.offload import Shelf, Where
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.settings import ContextSettings, Load
from ringattn.runtime.splits import split_offers
from ringattn.runtime.wire import Kind

KINDS = 64  # kinds of calls that a context keeps prepared
SUBSETS = 16  # of a group, whose plans and graphs are kept
RECENT = 32  # bindings kept alive for compiled graphs whose backward is still to come, and for masks that return


@dataclass(frozen=True)
class Shared:
    """What a context and its replacements have in common. ``device``, ``nodes``, ``among``: see
    :class:`ContextSettings`."""

    link: Link
    device: str = "cpu"
    nodes: Nodes | None = None
    among: tuple[int, ...] | None = None
    graphs: Graphs = field(init=False)
    shelves: dict[Where, Shelf] = field(default_factory=dict)
    token: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    recent: OrderedDict[bytes, Binding] = field(default_factory=OrderedDict)
    links: dict[tuple[int, ...], Link] = field(default_factory=dict)  # of subsets: they hold what these have compared
    subsets: OrderedDict[tuple[int, ...], Shared] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "graphs", Graphs(self.link))

    def on(self, members: tuple[int, ...]) -> Shared:
        """The same for contexts of some of these ranks, or of all. The last ones' plans and graphs are kept."""
        if len(members) == self.link.transport.world_size:
            return self
        if members not in self.links:
            self.links[members] = self.link.among(members)
        if members not in self.subsets:
            self.subsets[members] = Shared(self.links[members], self.device, self.nodes, members)
        self.subsets.move_to_end(members)
        if len(self.subsets) > SUBSETS:
            self.subsets.popitem(last=False)
        return self.subsets[members]

    def shelf(self, where: Where) -> Shelf | None:
        """Where calls with this `Options.offload` put away what they save, all on one, as backward asks for them."""
        return None if where is False else self.shelves.setdefault(where, Shelf(where))

    def bind(self, settings: ContextSettings) -> Binding:
        """The binding of these settings, a known one if there is one."""
        digest = hashlib.sha256(self.token + settings.digest).digest()
        known = _bindings.get(digest)
        binding = known if known is not None else Binding(settings, self, digest)
        self.recent[digest] = _bindings[digest] = binding
        self.recent.move_to_end(digest)
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        return binding


_bindings: WeakValueDictionary[bytes, Binding] = WeakValueDictionary()


def find(handle: Tensor) -> Binding:
    """The binding of a handle."""
    binding = _bindings.get(handle.numpy().tobytes())
    if binding is None:
        raise RuntimeError(
            "the context of this attention call is gone: keep a reference to it until its backward has run "
            f"(the last {RECENT} contexts of a group are kept in any case)"
        )
    return binding


def handle_of(digest: bytes) -> Tensor:
    """A digest of 32 bytes as a tensor."""
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(digest), dtype=torch.int64)


class Checked(NamedTuple):
    """A call whose arguments fit: prepared, how its logits are made, whether a gradient is wanted, and what finds the
    largest logits, if these are."""

    call: Prepared
    scores: Scores
    grad: bool
    largest: Prepared | None


class Binding:
    """Layouts, plans, the order of schedules, and this rank's programs. Planned when made, on integers alone."""

    def __init__(self, settings: ContextSettings, shared: Shared, digest: bytes) -> None:
        self.link, self.digest, self.graphs = shared.link, digest, shared.graphs
        self.shelf = shared.shelf(settings.options.offload)
        self.handle = handle_of(digest)
        self.rank, self.world_size = self.link.transport.rank, self.link.transport.world_size
        self.masks = {mask.digest: mask for mask in settings.masks}
        self.offers = split_offers(settings, self.world_size)
        self.settings, self.choice = self.offers[0].settings, self.offers[0].choice
        self.split = Split(self.world_size, self.settings.members, self.rank)
        # What the ranks of a ring compute, and what all ranks hold (shards, positions): the same where heads are whole.
        self.computed = Layouts(self.choice.taken.q_layout, self.choice.taken.k_layout)
        self.held = self.offers[0].held
        self.plans = dict(zip(settings.masks, self.choice.taken.plans, strict=True))
        self.schedules = self.choice.schedules
        self.expected = Load.of(self.settings.terms)
        self._programs: dict[Hashable, Program] = {}
        self._prepared: OrderedDict[Hashable, Prepared] = OrderedDict()
        self.checked: OrderedDict[Hashable, Checked] = OrderedDict()

    def program(self, mask: Expression, load: Load) -> Program:
        """This rank's program for a mask and the sizes of a call.

        Raises ``ValueError`` where no schedule fits ``Options.kv_bytes``.
        """
        plan = self.plans[mask]
        if load.stay and plan.travel:
            plan = replace(plan, travel=False)
        schedule, cut = self._fit(plan, load)
        key = mask, plan.travel, schedule.name, cut, load.stacking, load.wanted  # as calls of other sizes may well take
        if key not in self._programs:
            hides = self.settings.terms.rates.exposed < 1
            place = self.split.ring_rank
            made = compile_program(plan, schedule, cut, place, load.stacking, hides, load.wanted)
            self._programs[key] = made
        return self._programs[key]

    def prepared(
        self, mask: Expression, kind: Kind, scores: Scores, dlse: bool, wanted: Wanted = ALL_WANTED
    ) -> Prepared:
        """The program and the kernel of a call, made ready. ``dlse``: lse may have a gradient. ``wanted``: what of the
        inputs'.

        Raises ``NotImplementedError`` where no kernel, or not the chosen one, computes the call, and what
        :meth:`Graphs.refuse` does.
        """
        key = mask, kind, scores.scale, scores.softcap, scores.features, dlse, wanted
        known = self._prepared.get(key)
        if known is None:
            known = self._prepare(mask, kind, scores, dlse, wanted)
            self._prepared[key] = known
            if len(self._prepared) > KINDS:
                self._prepared.popitem(last=False)
        return known

    def largest(self, mask: Expression, kind: Kind, scores: Scores) -> Prepared:
        """What finds the largest logits of such a call: the forward program of its queries and keys without values."""
        return self.prepared(mask, kind._replace(v_head_dim=0), scores.of_logits, False, NONE_WANTED)

    def _prepare(self, mask: Expression, kind: Kind, scores: Scores, dlse: bool, wanted: Wanted) -> Prepared:
        """The first part of a call, which knows the others: one, unless heads go by chunks."""
        options = self.settings.options
        sizes = [[int(layout.sizes[rank]) for rank in self.split.team] for layout in self.held]
        row_bytes = kind.batch * (kind.head_dim + kind.v_head_dim) * kind.dtype.itemsize
        stacking = Stacking.of(kind.device.type, scores.positional or self._in_order(kind))
        parts = []
        for seat in seats(self.split, kind, options.head_chunks, sizes):
            load = Load(seat.kv_heads(kind), row_bytes, stacking, scores.bias is not None, wanted)
            kernels = self.kernels(mask, seat.computed(kind), scores.features, dlse)
            parts.append(Prepared(self.program(mask, load), kernels, kind, mask, scores, seat))
            parts[-1].eager = "" if kind.valueless else self.graphs.refuse(parts[-1], self.plans[mask], options)
        parts[0].parts = tuple(parts)
        return parts[0]

    def _in_order(self, kind: Kind) -> bool:
        """Whether a key's gradients must not be added up by several tiles of one call, in any order."""
        return self.settings.options.deterministic and kind.device.type == "cuda"

    def kernels(self, mask: Expression, kind: Kind, features: frozenset[str], dlse: bool) -> Selection:
        """The kernels of a call. Raises as :meth:`prepared` does."""
        options, capability, name = self.settings.options, (0, 0), "cpu"
        if kind.device.type == "cuda":
            capability, name = torch.cuda.get_device_capability(kind.device), torch.cuda.get_device_name(kind.device)
        call = Call(
            kind.device.type, kind.dtype, kind.head_dim, kind.v_head_dim, kind.num_heads, kind.num_kv_heads,
            self.plans[mask].windowed, features, dlse, capability, options.deterministic, options.sm_margin,
        )  # fmt: skip
        if kind.valueless:
            return choose_kernel("auto", call, (Largest(),))
        return choose_kernel(self.settings.kernel, call, KERNELS, rates_of(name, options.kernel_rates))

    def expected_kernels(self, mask: Expression) -> Selection | None:
        """The kernels of the calls a plan was made for; None where the device they are for is not here.

        Raises ``NotImplementedError`` as :meth:`prepared` does.
        """
        shape, name = self.settings.terms.shape, self.settings.device
        here = name == "cpu" or (torch.cuda.is_available() and torch.cuda.get_device_name() == name)
        if not here:
            return None
        device, dtype = torch.device("cpu" if name == "cpu" else "cuda"), getattr(torch, shape.dtype)
        sizes = shape.batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.values
        return self.kernels(mask, Kind(*sizes, dtype, device), frozenset(), False)

    def known(self, mask: Expression) -> list[Prepared]:
        """The calls under a mask that are prepared by now."""
        return [call for call in self._prepared.values() if call.mask == mask]

    def remember(self, key: Hashable, checked: Checked) -> None:
        """Keeps what a call's arguments stand for, once all rules have been asked about them."""
        self.checked[key] = checked
        if len(self.checked) > KINDS:
            self.checked.popitem(last=False)

    def mask_of(self, handle: Tensor) -> Expression:
        """The mask of a handle."""
        mask = self.masks.get(handle.numpy().tobytes().hex())
        if mask is None:
            listed = "; ".join(map(str, self.settings.masks))
            raise ValueError(f"the mask of this call is not one of the context's ({listed}); name one of cp.masks")
        return mask

    def _fit(self, plan: Plan, load: Load) -> tuple[Schedule, int]:
        """The first schedule, and its preferred cut, whose buffers fit."""
        limit, heads = self.settings.options.kv_bytes, load.kv_heads
        shards = self.settings.terms.shards
        room = room_of(plan, heads, shards) if limit is None else limit // max(load.row_bytes, 1)
        asked = [by_name(name) for name in self.schedules]
        for schedule in asked:
            cut = schedule.fit(plan, heads, room)
            if cut is not None:
                return schedule, cut
        least = [min((s.buffers(plan, cut, heads), cut) for cut in s.cuts(plan, heads)) for s in asked]
        if limit is None:
            return asked[0], least[0][1]
        needs = ", ".join(f"{s.name} {rows * load.row_bytes:,}" for s, (rows, _) in zip(asked, least, strict=True))
        raise ValueError(
            f"Options.kv_bytes={limit:,}: the smallest K/V buffers of this call take more ({needs} bytes); raise the "
            "limit, shard over more ranks, or allow another schedule"
        )
