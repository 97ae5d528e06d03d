"""A run that is checked, as a step: where its context places attention, what lies there all the time, and the numbers
it computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ringattn.budget.amounts import Amount, named
from ringattn.budget.attention import Attention, kind_of, received, scratch_of
from ringattn.budget.layers import LayerCode, Numerics
from ringattn.budget.setup import OPTIMIZERS, Setup, Shard, shards
from ringattn.budget.step import Gathering, Step, Way
from ringattn.budget.tape import Tensor
from ringattn.budget.updates import updating
from ringattn.budget.zero import BUCKET, GATHERED, KEPT
from ringattn.comm.planning_rank import PlanningRank
from ringattn.context import ContextParallel
from ringattn.masks import Mask
from ringattn.planning.cost import cost
from ringattn.planning.shape import Shape
from ringattn.runtime.settings import Options


@dataclass(frozen=True, slots=True)
class Placed:
    """Attention's memory and the tokens of the rank that needs most of the others; the layout and schedule taken, and
    of a layer of each mask the seconds of its calls by the shared cost function, and the bytes that this rank receives
    in a call forward and in its backward; whose layers they are."""

    attention: Attention
    tokens: int
    layout: str
    schedule: str
    seconds: tuple[float, ...]
    received: tuple[tuple[int, int], ...]
    layer: Callable[..., LayerCode] = LayerCode

    def transient(self) -> Placed:
        """With buffers that are there only while a call runs."""
        of = self.attention
        ahead, back = (*of.scratch.forward, *of.buffers), (*of.scratch.backward, *of.buffers)
        return replace(
            self, attention=replace(of, buffers=(), scratch=replace(of.scratch, forward=ahead, backward=back))
        )

    def grown(self, tokens: int) -> Placed:
        """With so many tokens: all that attention takes is a multiple of them."""
        was = named("tokens before", self.tokens)

        def longer(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            now = named("local tokens", tokens)
            return tuple(replace(x, size=(x.size * now).over(was)) for x in tensors)

        of = self.attention
        scratch = replace(of.scratch, forward=longer(of.scratch.forward), backward=longer(of.scratch.backward))
        return replace(self, attention=replace(of, buffers=longer(of.buffers), scratch=scratch), tokens=tokens)


def placed_of(setup: Setup) -> Placed:
    """As the context of a run places its attention."""
    first = setup.model.layers[0].attention
    shape = Shape(first.num_heads, first.num_kv_heads, first.head_dim, first.v_head_dim, setup.batch, setup.dtype)
    how = setup.layout, setup.schedule, setup.ulysses, setup.head_chunks, setup.device
    placed = _placed(setup.context, setup.seqlen, setup.masks(), shape, *how)
    return placed.transient() if setup.transient else placed


@lru_cache(maxsize=256)
def _placed(
    ranks: int, seqlen: int, masks: tuple[Mask, ...], shape: Shape, layout: str, schedule: str, ulysses: int,
    head_chunks: int, device: str,
) -> Placed:  # fmt: skip
    def context(rank: int) -> ContextParallel:
        return ContextParallel(
            PlanningRank(rank, ranks, device=f"NVIDIA {device}"), seqlen, mask=masks, shape=shape, layout=layout,
            schedule=schedule, ulysses=ulysses, options=Options(head_chunks=head_chunks),
        )  # fmt: skip

    cp = context(0)
    needed = np.sum([plan.received for plan in cp.plans.values()], axis=0)
    if needed.max() > needed[0]:
        cp = context(cp.ulysses * int(needed.argmax()))
    kind, tokens = kind_of(cp, "cuda"), int(cp.q_layout.sizes.max())
    moved = tuple(received(cp, mask, kind) for mask in masks)
    return Placed(scratch_of(cp, "cuda"), tokens, cp.q_layout.name, cp.schedule, _seconds(cp), moved)


def _seconds(cp: ContextParallel) -> tuple[float, ...]:
    """Of the calls of a layer of each mask: all of them by the cost function, where there is one."""
    offer, terms = cp.binding.offers[0], cp.binding.settings.terms
    if len(cp.masks) == 1:
        return (offer.seconds,)
    swapping = offer.swapping / len(cp.masks)
    return tuple(cost(cp.plans[mask], cp.schedule, terms).seconds + swapping for mask in cp.masks)


def step_of(setup: Setup, placed: Placed) -> Step:
    """What a step of a run holds, attention placed so."""
    shard, numerics = shards(setup.dtype, setup.autocast)[setup.shard], _numerics(setup)
    attention, zero = placed.attention, _zero(setup)
    tokens = named("local tokens", placed.tokens) * named("batch", setup.batch)
    chunks = setup.token_chunks if setup.token_chunks > 1 else 0
    way = Way(setup.recompute, chunks, setup.offload, setup.loss_chunks, setup.fused_loss)
    sharded = named("bytes of a gradient in parts", 0 if setup.offload_states == "all" else shard.part_gradients)
    parts = shard.gathered and not (setup.autocast and setup.world == 1)  # one rank alone of the job's shards nothing
    gathering = Gathering(setup.world, numerics.weight, numerics.weight, gradient=sharded) if parts else None
    return Step(
        setup.model, setup.code, tokens, numerics, way, attention.scratch,
        persistent=tuple((x, 1) for x in _persistent(setup, shard)),
        around=tuple((x, 1) for x in (*_inputs(setup, tokens), *attention.buffers, *_kept(setup, numerics))),
        gathering=gathering, zero=zero, generators=False, updating=tuple((x, 1) for x in updating(setup, shard)),
        layer=placed.layer,
    )  # fmt: skip


def _zero(setup: Setup) -> tuple[int, int, int] | None:
    """How DeepSpeed sums gradients in the job with ZeRO 1 and 2; elsewhere it is taken to do so as they are made, and
    with ZeRO 3 to gather parameters a layer at a time."""
    stage = {"zero1": 1, "zero2": 2}.get(setup.shard) if setup.autocast and setup.world > 1 else None
    return None if stage is None else (stage, setup.world, min(BUCKET, setup.model.parameters))


def _kept(setup: Setup, numerics: Numerics) -> Iterator[Tensor]:
    """The most that the job's ZeRO 3 keeps gathered beside the layer that computes."""
    if setup.shard == "zero3" and setup.autocast:
        numbers = named("numbers", min(KEPT, setup.model.parameters))
        yield Tensor(GATHERED, "parameters kept, at most", numbers * numerics.weight)


def _numerics(setup: Setup) -> Numerics:
    low = 2 if setup.dtype == "bfloat16" else 4
    if setup.shard == "none" or setup.autocast:
        return Numerics.of(4, low, 4, low == 2, True)
    return Numerics.of(low, low, low, False, True)


def _persistent(setup: Setup, shard: Shard) -> Iterator[Tensor]:
    """Parameters, gradients that are there all the time, and the optimizer's states."""
    model, ranks = setup.model, named("ranks", setup.world)
    parameters = named("parameters", model.parameters)
    if shard.whole_weights:
        yield Tensor("parameters", "weights", parameters * named("bytes", shard.whole_weights))
    if shard.buckets:
        yield Tensor("communication buffers", "buckets of gradients", parameters * named("bytes", shard.buckets))
    if setup.offload_states == "all":
        return
    if shard.part_weights:
        yield Tensor("parameters", "weights in parts", (parameters * named("bytes", shard.part_weights)).over(ranks))
    if setup.offload_states == "optimizer":
        return
    if shard.master:
        yield Tensor("parameters", "fp32 weights in parts", (parameters * named("bytes", shard.master)).over(ranks))
    matrix, other = OPTIMIZERS[setup.optimizer]
    rest = model.embedding + model.head
    inner = named("parameters of layers", model.parameters - rest) * named("bytes of state", matrix)
    outer = named("of embedding and head", rest) * named("bytes of state", other)
    states = inner + outer
    yield Tensor("optimizer states", setup.optimizer, states if shard.moments_whole else states.over(ranks))


def _inputs(setup: Setup, tokens: Amount) -> Iterator[Tensor]:
    size, first = named("bytes of an id", 8), setup.model.layers[0].attention
    for name in ("tokens", "labels", "positions"):
        yield Tensor("tokens and labels", name, tokens * size)
    dim = named("rotary size", first.latent.rope_dim if first.latent else first.head_dim)
    own = setup.code == "decoder"
    number = named("bytes", 2 if setup.dtype == "bfloat16" and not (own or setup.autocast) else 4)
    for name in ("rotation",) if own else ("cos", "sin"):
        yield Tensor("rotation", name, tokens * dim * number)


__all__ = ["Placed", "placed_of", "step_of"]
