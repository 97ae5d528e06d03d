"""ContextParallel: binds a group, lengths, masks, a layout, a schedule and a kernel; shards and unshards.

A context is immutable. ``replace()`` makes the context of the next batch, which shares the transport,
the buffers and the counters of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import Tensor

from ringattn.arguments.values import shown
from ringattn.comm import told
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import Expression
from ringattn.masks import Mask, causal
from ringattn.planning.plan import Plan
from ringattn.planning.program import Program
from ringattn.planning.shape import Shape
from ringattn.runtime.binding import Shared
from ringattn.runtime.describe import describe
from ringattn.runtime.joining import Group, join, split_of
from ringattn.runtime.link import Link
from ringattn.runtime.profile import Profile
from ringattn.runtime.settings import ContextSettings, Load, Options
from ringattn.runtime.sharding import position_ids, shard, unshard
from ringattn.runtime.timeline import profiled
from ringattn.validation import check_link, checked_context, checked_ranks


class ContextParallel:
    """How one sequence lies over the ranks of a group, and what each rank computes on it.

    ``position_ids``: int64 ``[local_seqlen]`` on the CPU, the global position of each local token, ``q_offset``
    included; ``kv_position_ids`` of the local keys. ``q_layout``, ``k_layout``: the :class:`Layout` of either side.

    Args:
        group_or_mesh: a ``ProcessGroup``, a 1-D ``DeviceMesh``, a 2-D one with dims ``ring`` and ``ulysses`` in this
            order, a ringattn transport, or None for one rank alone, also where there is a group.
        seqlen: tokens of the whole sequence. Any length; shards differ by at most one token, except where a layout says
            otherwise (balanced: a chunk; cyclic: a block of 64; a :class:`Layout`: as it says).
        mask: one mask, or several (those of a whole stack of layers); the first is ``attention()``'s default.
        kv_seqlen: tokens of the keys where they are another sequence (cross-attention, a cache).
        q_offset: position of the first query, for prefill in chunks and decoding.
        layout: auto, balanced, contiguous, zigzag, striped, cyclic, or a :class:`Layout` of ``seqlen`` positions.
        kv_layout: of the keys, where they are to lie otherwise than as ``layout`` says: contiguous, zigzag, striped,
            cyclic (a cache that grows is appended to and never moved), or a :class:`Layout` of ``kv_seqlen`` positions;
            None or auto is as the queries'.
        shape: the :class:`Shape` of the calls to come, with which ``auto`` and ``describe()`` then count; None is a
            guess. A call of another shape is legal: layout and order of schedules are those chosen for this one.
        schedule: auto, ring, exchange, gather, or double_ring (a ring of nodes around rings inside of them, where the
            topology has several nodes).
        ulysses: ranks of the head axis (DeepSpeed Ulysses), or "auto", by cost, for which ``shape`` must be told; so
            many neighbours of the group hold a shard of the ring in pieces, in storage order, and each computes some of
            the heads for all of it. world / ulysses ranks are the ring; plans, and a ``layout`` or ``kv_layout`` given
            as a :class:`Layout`, are of these. A 2-D mesh (ring, ulysses) says it by itself.
        kernel: auto, or one by name, which is then never replaced by another.
        options: see :class:`Options`.

    Raises:
        ValueError: a length, mask, name or layout that does not fit, before anything is sent.
    """

    def __init__(
        self,
        group_or_mesh: Group,
        seqlen: int,
        *,
        mask: Expression | Sequence[Expression] = causal(),  # noqa: B008 - a mask is immutable
        kv_seqlen: int | None = None,
        q_offset: int = 0,
        layout: str | Layout = "auto",
        kv_layout: str | Layout | None = None,
        shape: Shape | None = None,
        schedule: str = "auto",
        ulysses: int | str = 1,
        kernel: str = "auto",
        options: Options = Options(),  # noqa: B008 - frozen
        _shared: Shared | None = None,
        _whole: Shared | None = None,
    ) -> None:
        given = dict(
            seqlen=seqlen, mask=mask, kv_seqlen=kv_seqlen, q_offset=q_offset, layout=layout, schedule=schedule,
            kernel=kernel, options=options, ulysses=ulysses, shape=shape, kv_layout=kv_layout,
        )  # fmt: skip

        def checked() -> dict[str, Any]:
            return checked_context({**given, "ulysses": split_of(group_or_mesh, ulysses)})

        self._shared = join(group_or_mesh, lambda: checked()["options"]) if _shared is None else _shared
        self._whole = _whole or self._shared  # of all ranks
        with told(self.link.transport, "a new context"):  # what one rank refuses, all of them refuse
            self._settings = checked()
            self._settle(**self._settings)

    def _settle(
        self, seqlen: int, mask: tuple[Mask, ...], kv_seqlen: int | None, q_offset: int, layout: str | Layout,
        schedule: str, kernel: str, options: Options, ulysses: int | str, shape: Shape | None,
        kv_layout: str | Layout | None,
    ) -> None:  # fmt: skip
        """Takes the arguments, which are checked, and plans."""
        self.seqlen, self.kv_seqlen, self.q_offset = seqlen, seqlen if kv_seqlen is None else kv_seqlen, q_offset
        self.masks, self.options, self.kernel = mask, options, kernel
        self.rank, self.world_size = self.link.transport.rank, self.link.transport.world_size
        settings = ContextSettings(
            seqlen, mask, self.kv_seqlen, q_offset, layout, schedule, kernel, options, shape, self._shared.device,
            kv_layout, ulysses, self._shared.nodes, self._shared.among,
        )  # fmt: skip
        check_link(settings, self.link, self_attention=kv_seqlen is None and q_offset == 0)
        self.binding = self._shared.bind(settings)
        self.ulysses = self.binding.split.ulysses
        self.q_layout, self.k_layout = self.binding.held
        self.schedules = self.binding.schedules  # best first; a call takes the first whose buffers fit
        self.schedule = self.schedules[0]
        self.local_seqlen = int(self.q_layout.sizes[self.rank])
        self.local_kv_seqlen = int(self.k_layout.sizes[self.rank])
        self.handle = self.binding.handle
        self.mask_handles = tuple(torch.from_numpy(m.handle) for m in mask)
        self.position_ids = position_ids(self.q_layout.frame(self.rank), q_offset)

    def replace(self, **changes: Any) -> ContextParallel:
        """The context of the next batch: any argument of the constructor but the group, replaced.

        Shares transport, buffers and counters with this one; both stay usable.
        """
        return self._with(changes, self._shared, "replace()")

    def _with(self, changes: dict[str, Any], shared: Shared, asked: str) -> ContextParallel:
        with told(shared.link.transport, asked):
            unknown = sorted(set(changes) - set(self._settings))
            if unknown:
                raise ValueError(f"{asked} cannot change {', '.join(unknown)}; it can: {', '.join(self._settings)}")
        return ContextParallel(None, **{**self._settings, **changes}, _shared=shared, _whole=self._whole)

    def on(self, ranks: Iterable[int], **changes: Any) -> ContextParallel:
        """The context of some of the ranks, which attend together in calls of their own, over the connections that are
        there: for micro-batches of which each takes other ranks, of any number. No group, connection or buffer is made,
        and nothing is sent.

        Each of the ``ranks`` calls it, with the same ones; the others make calls of other subsets, or none. They count
        as in the first context's group, from whichever context it is called, and as error texts count them; ``rank`` of
        the new context counts among them. Contexts of the same ranks count their calls together. What fails on a rank
        fails on all of the group: those in other subsets are told at once.

        Args:
            ranks: numbers of the group, this rank's among them, in any order.
            changes: any argument of the constructor but the group, replaced, as in :meth:`replace`.

        Raises:
            ValueError: a rank that the group does not have, or named twice; this rank is not among them; and what the
                constructor refuses, such as more ranks than tokens.
        """
        with told(self.link.transport, "on()"):
            whole = self._whole.link.transport
            members = checked_ranks(ranks, whole.rank, whole.world_size)
        return self._with(changes, self._whole.on(members), "on()")

    # -- what a rank holds ----------------------------------------------------------------------

    @cached_property
    def kv_position_ids(self) -> Tensor:
        """int64 ``[local_kv_seqlen]`` on the CPU: the global position of each local key."""
        return position_ids(self.k_layout.frame(self.rank), 0)

    def shard(self, x: Tensor, dim: int = 1, *, grad: str = "whole") -> Tensor:
        """This rank's tokens of a tensor that every rank holds whole; ``x.size(dim) == seqlen``.

        Differentiable. With ``grad="whole"`` backward gathers, so that ``x.grad`` is on every rank what it is on one
        process, and must not be summed over the ranks again. With ``grad="share"`` it is what this rank's tokens give,
        zero elsewhere and without a message: a share, to be summed like the gradient of every other parameter.
        """
        return shard(self._shared.link, self.q_layout, x, dim, "seqlen", grad)

    def unshard(self, local: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor in global order from every rank's shard; backward takes this rank's slice."""
        return unshard(self._shared.link, self.q_layout, local, dim, "local_seqlen")

    def shard_kv(self, x: Tensor, dim: int = 1, *, grad: str = "whole") -> Tensor:
        """:meth:`shard` for the key side."""
        return shard(self._shared.link, self.k_layout, x, dim, "kv_seqlen", grad)

    def unshard_kv(self, local: Tensor, dim: int = 1) -> Tensor:
        """:meth:`unshard` for the key side."""
        return unshard(self._shared.link, self.k_layout, local, dim, "local_kv_seqlen")

    # -- what a rank does -----------------------------------------------------------------------

    @property
    def plans(self) -> Mapping[Expression, Plan]:
        """The plan of each mask."""
        return self.binding.plans

    @property
    def plan(self) -> Plan:
        """The plan of the first mask, over the ranks of a ring; ``plans[mask]`` has the others."""
        return self.plans[self.masks[0]]

    def program(self, mask: Mask, load: Load | None = None) -> Program:
        """This rank's compiled schedule for one of the masks and a call of these sizes: without any, of the ``shape``
        told or guessed. Raises ``ValueError`` for a mask that is not one of the context's, or sizes that do not fit
        ``Options.kv_bytes``."""
        if mask not in self.plans:
            raise ValueError(f"mask={shown(mask)}: must be one of the context's ({'; '.join(map(str, self.masks))})")
        return self.binding.program(mask, load or self.binding.expected)

    @property
    def link(self) -> Link:
        return self._shared.link

    def describe(self) -> str:
        """Printable text: lengths, layout and schedule with the reasons, and each mask's work, bytes and steps."""
        return describe(self.binding)

    def traffic(self) -> dict[str, Any]:
        """Bytes ``sent`` and ``received`` by this rank so far, by kind, and ``wait_seconds``.

        Kinds: ``forward kv``, ``backward kv``, ``backward grad``, ``unshard``, ``roll``, of heads that are split
        ``forward heads`` and ``backward heads``, and of queries that travel ``forward q``, ``forward partial``,
        ``backward q``, ``backward dq``. Replacements count together.
        """
        traffic = self._shared.link.traffic
        return {
            "sent": dict(traffic.sent),
            "received": dict(traffic.received),
            "wait_seconds": traffic.wait_seconds,
        }

    def profile(self) -> AbstractContextManager[Profile]:
        """``with cp.profile() as p:`` writes down where this rank's seconds go in the calls made inside, forward and
        backward, of this context and its replacements: by turn of the program what copies, posts, kernels, the exposed
        wait and sums take, and the bytes; by call, too, its all-to-alls, its begin and its end, and shards gathered.

        Read behind the ``with``: ``print(p.table())``, ``p.exposed``, ``p.save("trace.json")`` (a Chrome trace),
        ``p.calls``. When a message has arrived is not seen before it is waited for, so what a transfer took is an upper
        bound. On a CUDA device the times are those of the stream; calls then run eagerly, and no CUDA graph is captured
        or replayed. A call that fails is not kept. Calls of subsets of the ranks
        (:meth:`on`) are written down too, whichever context was asked. Each rank saves its own, ``trace.rank0.json``.

        Raises:
            ValueError: a profile of this context, or of one with which it shares its link, is open already.
        """
        return profiled(self.link, self._whole.link.transport.rank)

    def _repr_html_(self) -> str:
        """What a notebook shows: the first mask over the layout, each rank's work and needs, and :meth:`describe`."""
        words = f"<details><summary>describe()</summary><pre>{escape(self.describe())}</pre></details>"
        return self.plan._repr_html_() + words

    def __repr__(self) -> str:
        among = self.binding.settings.among
        of = f"ranks {list(among)}" if among else str(self.world_size)
        return (
            f"ContextParallel(rank {self.rank} of {of}, seqlen={self.seqlen}, "
            f"layout={self.q_layout.name}, schedule={self.schedule}, masks={list(self.masks)})"
        )
