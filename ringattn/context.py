"""ContextParallel: binds a group, lengths, masks, a layout, a schedule and a kernel; shards and unshards.

A context is immutable. ``replace()`` makes the context of the next batch, which shares the transport,
the buffers and the counters of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.arguments.values import integer, listed, shown
from ringattn.comm import Meeting, Solo, Transport, told
from ringattn.comm.shield import shield
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import Expression
from ringattn.masks import Mask, causal
from ringattn.planning.plan import Plan
from ringattn.planning.program import Program
from ringattn.planning.shape import Shape
from ringattn.runtime.binding import Load, Options, Settings, Shared, check_names
from ringattn.runtime.describe import describe
from ringattn.runtime.link import Link
from ringattn.runtime.sharding import position_ids, shard, unshard

DEADLINE = 300.0  # seconds
STACK = 1024  # masks of one context

Group = dist.ProcessGroup | DeviceMesh | Transport | None


class ContextParallel:
    """How one sequence lies over the ranks of a group, and what each rank computes on it.

    ``position_ids``: int64 ``[local_seqlen]`` on the CPU, the global position of each local token, ``q_offset``
    included.

    Args:
        group_or_mesh: a ``ProcessGroup``, a 1-D ``DeviceMesh``, a ringattn transport, or None for one rank.
        seqlen: tokens of the whole sequence. Any length; shards differ by at most one token.
        mask: one mask, or several (those of a whole stack of layers); the first is ``attention()``'s default.
        kv_seqlen: tokens of the keys where they are another sequence (cross-attention, a cache).
        q_offset: position of the first query, for prefill in chunks and decoding.
        layout: auto, balanced, contiguous, zigzag, striped, or a :class:`Layout` of ``seqlen`` positions.
        shape: the :class:`Shape` of the calls to come, with which ``auto`` and ``describe()`` then count; None is a
            guess. A call of another shape is legal: layout and order of schedules are those chosen for this one.
        schedule: auto, ring, exchange, gather.
        ulysses: ranks of the head axis; 1 until the head split lands.
        kernel: auto, or one by name, which is then never replaced by another.
        options: see :class:`Options`.

    Raises:
        ValueError: a length, mask, name or layout that does not fit, before anything is sent.
        NotImplementedError: a 2-D mesh or ``ulysses`` other than 1.
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
        shape: Shape | None = None,
        schedule: str = "auto",
        ulysses: int = 1,
        kernel: str = "auto",
        options: Options = Options(),  # noqa: B008 - frozen
        _shared: Shared | None = None,
    ) -> None:
        given = dict(
            seqlen=seqlen, mask=mask, kv_seqlen=kv_seqlen, q_offset=q_offset, layout=layout, schedule=schedule,
            kernel=kernel, options=options, ulysses=ulysses, shape=shape,
        )  # fmt: skip
        self._shared = _first(group_or_mesh, given) if _shared is None else _shared
        with told(self.link.transport, "a new context"):  # what one rank refuses, all of them refuse
            self._settings = _checked(given)
            self._settle(**self._settings)

    def _settle(
        self, seqlen: int, mask: tuple[Mask, ...], kv_seqlen: int | None, q_offset: int, layout: str | Layout,
        schedule: str, kernel: str, options: Options, ulysses: int, shape: Shape | None,
    ) -> None:  # fmt: skip
        """Takes the arguments, which are checked, and plans."""
        self.seqlen, self.kv_seqlen, self.q_offset = seqlen, seqlen if kv_seqlen is None else kv_seqlen, q_offset
        self.masks, self.options, self.kernel = mask, options, kernel
        self._check_link()
        self.rank, self.world_size = self.link.transport.rank, self.link.transport.world_size
        self._check_ranks(self_attention=kv_seqlen is None and q_offset == 0)
        settings = Settings(
            seqlen, mask, self.kv_seqlen, q_offset, layout, schedule, kernel, options, shape, self._shared.device
        )
        self.binding = self._shared.bind(settings)
        self.q_layout, self.k_layout = self.binding.q_layout, self.binding.k_layout
        self.schedules = self.binding.schedules  # best first; a call takes the first whose buffers fit
        self.schedule = self.schedules[0]
        self.local_seqlen = int(self.q_layout.sizes[self.rank])
        self.local_kv_seqlen = int(self.k_layout.sizes[self.rank])
        self.handle = self.binding.handle
        self.mask_handles = tuple(torch.from_numpy(m.handle) for m in mask)
        self.position_ids = position_ids(self.q_layout.frame(self.rank), q_offset)

    def _check_link(self) -> None:
        link, options = self.link, self.options
        if options.compare_every != link.compare_every:
            raise ValueError(
                f"Options.compare_every={options.compare_every}, but contexts that follow each other count calls "
                f"together, and the first said {link.compare_every}"
            )
        if options.timeout not in (None, link.transport.timeout):
            raise ValueError(
                f"Options.timeout={options.timeout}, but the transport's deadline is {link.transport.timeout} s: it is "
                "set when the transport is made; leave Options.timeout out here"
            )

    def _check_ranks(self, self_attention: bool) -> None:
        if self_attention and self.world_size > self.seqlen:
            raise ValueError(
                f"seqlen={self.seqlen} over {self.world_size} ranks: more ranks than tokens; use fewer ranks "
                "(empty shards are legal with kv_seqlen or q_offset only)"
            )

    def replace(self, **changes: Any) -> ContextParallel:
        """The context of the next batch: any argument of the constructor but the group, replaced.

        Shares transport, buffers and counters with this one; both stay usable.
        """
        with told(self.link.transport, "replace()"):
            unknown = sorted(set(changes) - set(self._settings))
            if unknown:
                raise ValueError(f"replace() cannot change {', '.join(unknown)}; it can: {', '.join(self._settings)}")
        return ContextParallel(None, **{**self._settings, **changes}, _shared=self._shared)

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
        """The plan of the first mask; ``plans[mask]`` has the others."""
        return self.plans[self.masks[0]]

    def program(self, mask: Mask, load: Load | None = None) -> Program:
        """This rank's compiled schedule for one of the masks and a call of these sizes: without any, of the last
        call, or before any call of the ``shape`` told or guessed."""
        return self.binding.program(mask, load or self.binding.last)

    @property
    def link(self) -> Link:
        return self._shared.link

    def describe(self) -> str:
        """Printable text: lengths, layout and schedule with the reasons, and each mask's work, bytes and steps."""
        return describe(self.binding)

    def traffic(self) -> dict[str, Any]:
        """Bytes ``sent`` and ``received`` by this rank so far, by kind, and ``wait_seconds``.

        Kinds: ``forward kv``, ``backward kv``, ``backward grad``, ``unshard``, ``roll``, and of queries that travel
        ``forward q``, ``forward partial``, ``backward q``, ``backward dq``. Replacements count together.
        """
        traffic = self._shared.link.traffic
        return {
            "sent": dict(traffic.sent),
            "received": dict(traffic.received),
            "wait_seconds": traffic.wait_seconds,
        }

    def __repr__(self) -> str:
        return (
            f"ContextParallel(rank {self.rank} of {self.world_size}, seqlen={self.seqlen}, "
            f"layout={self.q_layout.name}, schedule={self.schedule}, masks={list(self.masks)})"
        )


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """A context's arguments, as what they stand for."""
    if not isinstance(given["options"], Options):
        raise ValueError(f"options={shown(given['options'])}: must be a ringattn.Options")
    if integer("ulysses", given["ulysses"], 1) != 1:
        raise NotImplementedError(f"ulysses={given['ulysses']}: the head split is not built yet; use ulysses=1")
    if given["shape"] is not None and not isinstance(given["shape"], Shape):
        raise ValueError(f"shape={shown(given['shape'])}: must be a ringattn.Shape(num_heads, num_kv_heads, head_dim)")
    lengths = _lengths(given["seqlen"], given["kv_seqlen"], given["q_offset"])
    masks = _masks(given["mask"])
    check_names(given["layout"], given["schedule"], given["kernel"])
    for mask in masks:
        mask.bind(lengths["seqlen"], lengths["kv_seqlen"] or lengths["seqlen"], lengths["q_offset"])
    return {**given, **lengths, "mask": masks}


def _lengths(seqlen: Any, kv_seqlen: Any, q_offset: Any) -> dict[str, Any]:
    hint = ", a number of tokens"
    seqlen, q_offset = (
        integer(name, value, least, hint=hint, rule="an integer of ")
        for name, value, least in (("seqlen", seqlen, 1), ("q_offset", q_offset, 0))
    )
    if kv_seqlen is not None:
        kv_seqlen = integer("kv_seqlen", kv_seqlen, 1, hint=hint, rule="an integer of ")
    return {"seqlen": seqlen, "kv_seqlen": kv_seqlen, "q_offset": q_offset}


def _masks(mask: Mask | Iterable[Mask]) -> tuple[Mask, ...]:
    several = isinstance(mask, Iterable) and not isinstance(mask, str)
    masks = [mask] if isinstance(mask, Expression) else listed("mask", mask, "masks", STACK) if several else []
    if not masks or not all(isinstance(m, Expression) for m in masks):
        raise ValueError(f"mask={shown(mask)}: give one mask or several, e.g. ringattn.causal()")
    return tuple(dict.fromkeys(masks))


def _first(group_or_mesh: Group, given: dict[str, Any]) -> Shared:
    """What a first context shares with those that replace it."""
    link = _link(group_or_mesh, given)
    gpus = "cuda" in link.transport.blind and torch.cuda.is_available()
    return Shared(link, torch.cuda.get_device_name() if gpus else "cpu")


def _link(group_or_mesh: Group, given: dict[str, Any]) -> Link:
    """What a first context moves messages with."""
    group = _group(group_or_mesh)
    if group is None:
        options = _checked(given)["options"]
        return Link(Solo(options.timeout or DEADLINE), options.compare_every)
    if isinstance(group, dist.ProcessGroup):
        return _meet(group, given)
    with told(group, "a new context"):
        return Link(group, _checked(given)["options"].compare_every)


def _meet(group: dist.ProcessGroup, given: dict[str, Any]) -> Link:
    """The link that all ranks of a group make, or none."""
    meetings: list[Meeting] = []
    links: list[Link] = []

    def meet(refusal: BaseException | None = None) -> None:
        with Meeting(group) as meeting:
            meetings.append(meeting)
            if refusal is not None:
                raise refusal
            options = _checked(given)["options"]  # what does not fit says so before anything is sent
            links.append(Link(meeting.transport(options.timeout or DEADLINE), options.compare_every))

    def stop() -> None:
        for meeting in meetings:
            meeting.give_up()

    try:
        shield(meet, stop)
    except BaseException as error:
        if not meetings:  # interrupted before it began
            shield(partial(meet, error))
        for link in links:  # the others have theirs already
            with told(link.transport, "a new context"):
                raise
        raise
    return links[0]


def _group(group: Group) -> dist.ProcessGroup | Transport | None:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise NotImplementedError(
                f"a {group.ndim}-D mesh {group.mesh_dim_names}: ring x ulysses is not built yet; pass its 1-D "
                "sub-mesh of the context axis, e.g. mesh['cp']"
            )
        return group.get_group()
    if isinstance(group, (dist.ProcessGroup, Transport)):
        return group
    if group is not None:
        raise ValueError(
            f"group_or_mesh={shown(group)}: pass a ProcessGroup, a 1-D DeviceMesh, a ringattn transport, or None"
        )
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many and dist.is_torchelastic_launched() and not dist.is_initialized():
        raise ValueError(
            "group_or_mesh is None under torchrun, before torch.distributed is initialised: this rank would "
            "attend alone; call init_process_group() first, then pass dist.group.WORLD"
        )
    return None
