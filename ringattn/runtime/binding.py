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
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ringattn.arguments.values import deadline, flag, integer, seed_of, shown
from ringattn.geometry.layouts import Layout, named
from ringattn.geometry.masks import BoundMask, Expression
from ringattn.kernels import KERNELS, Call
from ringattn.kernels import choose as choose_kernel
from ringattn.kernels.scores import Scores
from ringattn.planning.cost import Terms
from ringattn.planning.hardware import hardware
from ringattn.planning.launches import Stacking
from ringattn.planning.placement import PLACEMENTS, Choice, Problem, choose, given
from ringattn.planning.plan import Plan
from ringattn.planning.program import Program, compile_program
from ringattn.planning.rates import Rates
from ringattn.planning.schedules import SCHEDULES, Schedule, by_name, two_shards
from ringattn.planning.shape import TYPICAL, Shape
from ringattn.planning.topology import Topology
from ringattn.runtime.link import Link
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.wire import Kind

if TYPE_CHECKING:
    from ringattn.runtime.execution import Execution

BYTES = 1 << 62  # no limit on bytes is larger
KINDS = 64  # kinds of calls that a context keeps prepared
RECENT = 32  # bindings kept alive for compiled graphs whose backward is still to come, and for masks that return


@dataclass(frozen=True)
class Options:
    """Settings of a context.

    timeout: seconds, the deadline on every wait for a peer; None is 300, or a given transport's own.
    kv_bytes: what the buffers in which a rank holds foreign (gather: all) K/V may take, in bytes, on top of the shards;
        schedules cut their steps to fit. Gradient buffers have as many elements, in fp32, and messages that have to
        be packed are copied on their way out. None: two shards of K/V, or what
        a schedule asked for by name takes.
    check_nan: raise ``FloatingPointError`` when q, k or v holds NaN or infinity (waits for the device).
    seed: where the seeds of dropout calls without one of their own come from.
    rates, topology: what a device does in a second, and the links between ranks, which every ``auto`` uses; equal on
        all ranks. None: what is known of the device.
    compare_every: calls after which the ranks compare all calls so far, over transports whose messages do not say which
        call they belong to (NCCL).
    """

    timeout: float | None = None
    kv_bytes: int | None = None
    check_nan: bool = False
    seed: int = 0
    rates: Rates | None = None
    topology: Topology | None = None
    compare_every: int = 64

    def __post_init__(self) -> None:
        plain: dict[str, object] = {
            "check_nan": flag("Options.check_nan", self.check_nan),
            "seed": seed_of("Options.seed", self.seed),
        }
        if self.timeout is not None:
            plain["timeout"] = deadline("Options.timeout", self.timeout)
        if self.kv_bytes is not None:
            plain["kv_bytes"] = integer(
                "Options.kv_bytes",
                self.kv_bytes,
                1,
                BYTES,
                "; None is two shards of K/V",
                "a positive number of bytes, ",
            )
        plain["compare_every"] = integer("Options.compare_every", self.compare_every, 1, hint=", a number of calls")
        for name, value in plain.items():
            object.__setattr__(self, name, value)  # as plain numbers: equal options have one digest on all ranks
        for kind in (Rates, Topology):
            name = kind.__name__.lower()
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                hint = "; None is what is known of the device"
                raise ValueError(f"Options.{name}={shown(given)}: must be a ringattn.{kind.__name__}{hint}")


@dataclass(frozen=True)
class Settings:
    """The arguments of a context, and the ``device`` whose rates are its defaults: "cpu", or a GPU's name."""

    seqlen: int
    masks: tuple[Expression, ...]
    kv_seqlen: int
    q_offset: int
    layout: str | Layout
    schedule: str
    kernel: str
    options: Options
    shape: Shape | None = None
    device: str = "cpu"

    @property
    def terms(self) -> Terms:
        """What costs are reckoned with."""
        known, stacking = (
            hardware(self.device),
            Stacking.of("cpu" if self.device == "cpu" else "cuda", positional=False),
        )
        options, shape = self.options, self.shape or TYPICAL
        return Terms(options.topology or known.topology, options.rates or known.rates, shape, stacking)

    @property
    def digest(self) -> bytes:
        """Equal for equal settings, over one link."""
        layout = self.layout.digest if isinstance(self.layout, Layout) else self.layout
        words = [repr(replace(self, masks=(), layout="")), str(layout), *(mask.digest for mask in self.masks)]
        return hashlib.sha256("|".join(words).encode()).digest()


@dataclass(frozen=True)
class Load:
    """What a program depends on in a call: KV heads, the bytes of a token's K and V of one head, which tiles are
    computed together, and whether queries must ``stay``, because a bias tensor holds something for each of them."""

    kv_heads: int
    row_bytes: int
    stacking: Stacking = Stacking.VIEWS
    stay: bool = False

    @staticmethod
    def of(terms: Terms) -> Load:
        """That of the calls a plan was made for."""
        return Load(terms.shape.num_kv_heads, terms.shape.row_bytes, terms.stacking)


@dataclass(frozen=True)
class Shared:
    """What a context and its replacements have in common. ``device``: see :class:`Settings`."""

    link: Link
    device: str = "cpu"
    token: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    recent: OrderedDict[bytes, Binding] = field(default_factory=OrderedDict)

    def bind(self, settings: Settings) -> Binding:
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


class Binding:
    """Layouts, plans, the order of schedules, and this rank's programs. Planned when made, on integers alone."""

    def __init__(self, settings: Settings, shared: Shared, digest: bytes) -> None:
        self.settings, self.link, self.digest = settings, shared.link, digest
        self.handle = handle_of(digest)
        self.rank, self.world_size = self.link.transport.rank, self.link.transport.world_size
        bound = tuple(m.bind(settings.seqlen, settings.kv_seqlen, settings.q_offset) for m in settings.masks)
        self.masks = {mask.digest: mask for mask in settings.masks}
        self.choice = self._choose(bound)
        self.q_layout, self.k_layout = self.choice.taken.q_layout, self.choice.taken.k_layout
        self.plans = dict(zip(settings.masks, self.choice.taken.plans, strict=True))
        self.schedules = self.choice.schedules
        self.last = Load.of(settings.terms)  # the load of the last call; before any, of the one expected
        self._programs: dict[Hashable, Program] = {}
        self._prepared: OrderedDict[Hashable, Prepared] = OrderedDict()
        self.checked: OrderedDict[Hashable, Execution] = OrderedDict()

    def _choose(self, bound: tuple[BoundMask, ...]) -> Choice:
        s, layout = self.settings, self.settings.layout
        schedules = tuple(known.name for known in SCHEDULES) if s.schedule == "auto" else (s.schedule,)
        problem = Problem(bound, self.world_size, s.terms, schedules, s.options.kv_bytes is None)
        if not isinstance(layout, Layout):
            return choose(problem, layout)
        if (layout.seqlen, layout.world_size) != (s.seqlen, self.world_size):
            raise ValueError(
                f"{layout!r} does not fit seqlen={s.seqlen} over {self.world_size} ranks; build it for these"
            )
        if s.kv_seqlen != s.seqlen:
            raise ValueError(
                f"a given layout of {layout.seqlen} positions cannot place kv_seqlen={s.kv_seqlen} keys; "
                "name a layout instead"
            )
        return given(problem, layout, layout)

    def program(self, mask: Expression, load: Load) -> Program:
        """This rank's program for a mask and the sizes of a call.

        Raises ``ValueError`` where no schedule fits ``Options.kv_bytes``.
        """
        key = mask, load
        if key not in self._programs:
            plan = self.plans[mask]
            if load.stay and plan.travel:
                plan = replace(plan, travel=False)
            schedule, cut = self._fit(plan, load)
            same = mask, plan.travel, schedule.name, cut, load.stacking  # calls of other sizes may well take the same
            if same not in self._programs:
                self._programs[same] = compile_program(plan, schedule, cut, self.rank, load.stacking)
            self._programs[key] = self._programs[same]
        return self._programs[key]

    def prepared(self, mask: Expression, kind: Kind, scores: Scores, dlse: bool) -> Prepared:
        """The program and the kernel of a call, made ready. ``dlse``: lse may have a gradient.

        Raises ``NotImplementedError`` where no kernel, or not the chosen one, computes the call.
        """
        key = mask, kind, scores.scale, scores.softcap, scores.features, dlse
        known = self._prepared.get(key)
        if known is None:
            call = Call(
                kind.device.type, kind.dtype, kind.head_dim, kind.v_head_dim, kind.num_heads, kind.num_kv_heads,
                self.plans[mask].windowed, scores.features, dlse,
            )  # fmt: skip
            kernel = choose_kernel(self.settings.kernel, call, KERNELS)
            row_bytes = kind.batch * (kind.head_dim + kind.v_head_dim) * kind.dtype.itemsize
            stacking = Stacking.of(kind.device.type, scores.positional)
            self.last = Load(kind.num_kv_heads, row_bytes, stacking, stay=scores.bias is not None)
            known = Prepared(self.program(mask, self.last), kernel, kind, mask, scores)
            self._prepared[key] = known
            if len(self._prepared) > KINDS:
                self._prepared.popitem(last=False)
        return known

    def remember(self, key: Hashable, made: Execution) -> None:
        """Keeps what a call's arguments stand for, once all rules have been asked about them."""
        self.checked[key] = made
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
        room = two_shards(plan, heads) if limit is None else limit // max(load.row_bytes, 1)
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


def check_names(layout: str | Layout, schedule: str, kernel: str) -> None:
    """Raises ``ValueError`` for a name that does not exist, with those that do."""
    named("kernel", kernel, ["auto", *(known.name for known in KERNELS)])
    named("schedule", schedule, ["auto", *(known.name for known in SCHEDULES)])
    if isinstance(layout, Layout):
        layout.check()
    else:
        named("layout", layout, PLACEMENTS)
