"""What a context is asked for: its options and arguments, and what of a call a program depends on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from ringattn.arguments.values import deadline, flag, integer, path, seed_of, shown
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import Expression
from ringattn.kernels.rates import KernelRates
from ringattn.planning.cost import Terms
from ringattn.planning.hardware import Hardware, hardware
from ringattn.planning.heads import divisors, ring_topology, shared_shape
from ringattn.planning.launches import Stacking
from ringattn.planning.rates import Rates
from ringattn.planning.schedules import SCHEDULES
from ringattn.planning.shape import TYPICAL, Shape
from ringattn.planning.topology import Topology
from ringattn.planning.wanted import ALL_WANTED, Wanted
from ringattn.runtime.nodes import Nodes
from ringattn.runtime.offload import Where, where_of

BYTES = 1 << 62  # no limit on bytes is larger
MULTIPROCESSORS = 128  # fewer than a GPU has
GRAPHS = ("auto", "on", "off")


@dataclass(frozen=True)
class Options:
    """Settings of a context.

    timeout: seconds, the deadline on every wait for a peer; None is 300, or a given transport's own.
    kv_bytes: what the buffers in which a rank holds foreign (gather: all) K/V may take, in bytes, on top of the shards;
        schedules cut their steps to fit. Gradient buffers have as many elements, in fp32, and messages that have to
        be packed are copied on their way out. None: two shards of K/V, on a GPU as many as an fp32 result takes, or
        what a schedule asked for by name takes.
    check_nan: raise ``FloatingPointError`` when q, k or v holds NaN or infinity (waits for the device).
    seed: where the seeds of dropout calls without one of their own come from.
    rates, topology: what a device does in a second, and the links between ranks, which every ``auto`` uses; equal on
        all ranks. None: what is known of the device, with the nodes that the launcher tells of. `measure_links` makes a
        topology.
    deterministic: sums come in the same order in every run, so that equal calls give equal bits; kernels that cannot
        do that are refused.
    sm_margin: multiprocessors of a GPU that kernels leave free for messages; those that cannot are refused.
    kernel_rates: a file of `ringattn calibrate` by which ``kernel="auto"`` chooses on a GPU. None: the one of this
        machine and device, if it has been written, else the table that comes with the library.
    compare_every: calls after which the ranks compare all calls so far, over transports whose messages do not say which
        call they belong to (NCCL).
    communicators: of our own that messages between GPUs travel on (NCCL), on streams of high priority. 0: none, but the
        group's; 1: one for all messages; 2: one for keys and queries, one for gradients and results, where
        ``NCCL_LAUNCH_ORDER_IMPLICIT=1`` must be set.
    head_chunks: a call goes by so many groups of heads, one after the other, which use the same memory between their
        all-to-all and back: with ``ulysses`` what a call needs beyond its inputs and results is that of one group
        (Untied Ulysses, arXiv 2602.21196). KV heads that several groups need travel for each of them.
    offload: where q, k, v, out and lse of a call are between its forward and its backward: False (where they were),
        True (pinned memory of a GPU's host), or a directory (files without a name); see `ringattn.offloaded`, which
        does the same for all that a block saves, and has the say where both are.
    graphs: whether calls on a CUDA device are captured in CUDA graphs at the second of a kind and replayed from then
        on: auto (where its host would be the slower of the two), on (refused where it cannot be), off.
    """

    timeout: float | None = None
    kv_bytes: int | None = None
    check_nan: bool = False
    seed: int = 0
    rates: Rates | None = None
    topology: Topology | None = None
    deterministic: bool = False
    sm_margin: int = 0
    kernel_rates: str | None = None
    compare_every: int = 64
    communicators: int = 0
    head_chunks: int = 1
    offload: Where = False
    graphs: str = "auto"

    def __post_init__(self) -> None:
        plain: dict[str, object] = {
            "check_nan": flag("Options.check_nan", self.check_nan),
            "deterministic": flag("Options.deterministic", self.deterministic),
            "sm_margin": integer("Options.sm_margin", self.sm_margin, 0, MULTIPROCESSORS),
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
        if self.kernel_rates is not None:
            plain["kernel_rates"] = path("Options.kernel_rates", self.kernel_rates)
            KernelRates.read(Path(str(plain["kernel_rates"])))
        plain["head_chunks"] = integer("Options.head_chunks", self.head_chunks, 1)
        plain["offload"] = where_of("Options.offload", self.offload)
        plain["communicators"] = integer("Options.communicators", self.communicators, 0, 2)
        if not isinstance(self.graphs, str) or self.graphs not in GRAPHS:
            raise ValueError(f"Options.graphs={shown(self.graphs)}: must be one of {', '.join(GRAPHS)}")
        for name, value in plain.items():
            object.__setattr__(self, name, value)  # as plain numbers: equal options have one digest on all ranks
        for kind in (Rates, Topology):
            name = kind.__name__.lower()
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                hint = "; None is what is known of the device"
                raise ValueError(f"Options.{name}={shown(given)}: must be a ringattn.{kind.__name__}{hint}")


@dataclass(frozen=True)
class ContextSettings:
    """The arguments of a context, the ``device`` whose rates are its defaults: "cpu", or a GPU's name; the
    ``nodes`` of its ranks, if their launcher has told; and ``among`` which of them it is, if not all."""

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
    kv_layout: str | Layout | None = None
    ulysses: int | str = 1
    nodes: Nodes | None = None
    among: tuple[int, ...] | None = None

    def split(self, members: int) -> ContextSettings:
        """The same with so many ranks of the head axis."""
        return replace(self, ulysses=members)

    def splits(self, world_size: int) -> list[int]:
        """The numbers of ranks of the head axis that are to be weighed: the one asked for, or all that fit the world,
        the heads and the layouts that are given."""
        if isinstance(self.ulysses, int):
            return [self.ulysses]
        heads, rings = (self.shape or TYPICAL).num_heads, [x.world_size for x in self.given_layouts]
        return [
            n
            for n in divisors(world_size)
            if heads // n >= self.options.head_chunks
            and all(ring in (world_size, world_size // n) for ring in rings)
            and not (self.by_nodes and self.flat(world_size, n))
        ]

    @property
    def given_layouts(self) -> list[Layout]:
        return [x for x in (self.layout, self.kv_layout) if isinstance(x, Layout)]

    @property
    def members(self) -> int:
        """Ranks of the head axis, once that is settled."""
        assert isinstance(self.ulysses, int), "'auto' is settled by the binding"
        return self.ulysses

    @property
    def known(self) -> Hardware:
        """The device, with what the options say of it in place of what is known."""
        known, options = hardware(self.device), self.options
        links = options.topology or (self.nodes.of(known.topology) if self.nodes else known.topology)
        links = links if self.among is None else links.among(self.among)
        return replace(known, topology=links, rates=options.rates or known.rates)

    @property
    def by_nodes(self) -> bool:
        """Whether the schedule asked for is for several nodes."""
        return any(known.by_nodes for known in SCHEDULES if known.name == self.schedule)

    def flat(self, world_size: int, members: int) -> str:
        """Why the rings of a split are not of several whole nodes; empty where they are."""
        return ring_topology(self.known.topology, members).flat(world_size // members)

    @property
    def terms(self) -> Terms:
        """What the costs of a ring are reckoned with."""
        known, stacking = self.known, Stacking.of("cpu" if self.device == "cpu" else "cuda", alone=False)
        shape = shared_shape(self.shape or TYPICAL, self.members)
        return Terms(ring_topology(known.topology, self.members), known.rates, shape, stacking)

    @property
    def digest(self) -> bytes:
        """Equal for equal settings, over one link."""
        layouts = (x.digest if isinstance(x, Layout) else str(x) for x in (self.layout, self.kv_layout))
        words = [repr(replace(self, masks=(), layout="", kv_layout=None)), *layouts, *(m.digest for m in self.masks)]
        return hashlib.sha256("|".join(words).encode()).digest()


@dataclass(frozen=True)
class Load:
    """What a program depends on in a call: KV heads, the bytes of a token's K and V of one head, which tiles are
    computed together, whether queries must ``stay``, because a bias tensor holds something for each of them, and which
    gradients are wanted."""

    kv_heads: int
    row_bytes: int
    stacking: Stacking = Stacking.VIEWS
    stay: bool = False
    wanted: Wanted = ALL_WANTED

    @staticmethod
    def of(terms: Terms) -> Load:
        """That of the calls a plan was made for."""
        shape = terms.shape
        return Load(shape.num_kv_heads, shape.row_bytes, terms.stacking, wanted=Wanted.of(shape.gradients))
