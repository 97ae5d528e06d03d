"""A model that was never registered attends to each rank's shard alone, and nobody is asked. It shows all the same:
batches are cut, used up, and no layer asks for attention."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ringattn.comm import PlanningRank, Transport
from ringattn.context import ContextParallel
from ringattn.integrations.transformers.attention import RingAttention
from ringattn.integrations.transformers.ring import Ring
from ringattn.runtime.link import Link

REMEDY = (
    "call register(cp, model) before its first forward (register(cp) alone is for models whose attn_implementation is "
    "'ringattn')"
)
OF_TRANSFORMERS = ("eager", "sdpa", "flash_attention", "flex_attention", "paged")
# Of each link the first batch that was cut for its ranks, as long as there is something to wait for.
_cut: WeakKeyDictionary[Link, Callable[[], object]] = WeakKeyDictionary()


def watch(cp: ContextParallel, ids: Tensor) -> None:
    """Notes a batch that is cut for several ranks, by its `input_ids`, and warns, once, where an earlier one is gone
    and nothing has attended over these ranks. Batches that are cut ahead are held by somebody, and so not gone."""
    link = cp.link
    if cp.world_size == 1 or isinstance(link.transport, PlanningRank):
        return
    if not any(plan.received.any() for plan in cp.plans.values()):
        return  # calls of a user's own leave no trace where nothing has to travel
    if _cut.setdefault(link, weakref.ref(ids))() is not None:
        return
    _cut[link] = lambda: True  # asked once
    if not _attended(link):
        warnings.warn(
            f"a batch was cut for {cp.world_size} ranks and used up, and no layer has asked for attention: a model of "
            f"Transformers that is not registered attends to each rank's own tokens alone; {REMEDY}",
            stacklevel=3,
        )


def check_registered(model: nn.Module) -> None:
    """Raises `ValueError` for a model that attends by a function of Transformers' own."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name is not None and name.startswith(OF_TRANSFORMERS):
        raise ValueError(f"{type(model).__name__} attends with {name!r}, each rank to its own tokens alone; {REMEDY}")


def _attended(link: Link) -> bool:
    """Whether anything has attended over these ranks: a model's ring, or calls of a user's own."""
    kinds = link.traffic.sent.keys() | link.traffic.received.keys()
    rings = (ring for ring in _rings() if _whole(ring.cp.link) is _whole(link))
    return any(kind.startswith("forward") for kind in kinds) or any(ring.attended for ring in rings)


def _whole(link: Link) -> Transport:
    """What moves messages between all ranks, where the link is of some."""
    return getattr(link.transport, "whole", link.transport)


def _rings() -> Iterator[Ring]:
    for held in ALL_ATTENTION_FUNCTIONS.values():
        registered = getattr(held, "inner", held)  # inside of DeepSpeed's Ulysses
        if isinstance(registered, RingAttention):
            yield from (ring for ring in (registered.default, *registered.of_layer.values()) if ring is not None)
